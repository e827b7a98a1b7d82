"""The one place where a retriever's failure that may pass is told from a mistake and from a broken index."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from retrievers.types import RetrieverError, UnavailableError

LONGEST = 500  # characters of a message


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
        raise UnavailableError(f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]) from error
