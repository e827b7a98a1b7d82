"""Tells outages, which may pass, from bad arguments and broken indexes. This is the only place that decides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from retrievers.types import RetrieverError, UnavailableError

MAX_MESSAGE = 500  # Longer error messages are cut to so many characters.


@contextmanager
def outages() -> Iterator[None]:
    """Raise UnavailableError for any exception of a retriever in this block, whichever library it comes from.

    ValueError (bad arguments) and RetrieverError (a broken or replaced index) pass unchanged, because another attempt
    cannot succeed.
    """
    try:
        yield
    except (RetrieverError, ValueError, UnavailableError):
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_MESSAGE]) from error
