"""Separates outages, which may pass, from bad arguments and broken indexes. No other module does this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from retrievers.types import RetrieverError, UnavailableError

MAX_MESSAGE = 500  # characters of a message


@contextmanager
def outages() -> Iterator[None]:
    """Raise whatever a retriever raises inside, whichever library it comes from, as UnavailableError.

    ValueError (bad arguments) and RetrieverError (a broken or exchanged index) pass unchanged: calling again cannot
    help.
    """
    try:
        yield
    except (RetrieverError, ValueError, UnavailableError):
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_MESSAGE]) from error
