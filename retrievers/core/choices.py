"""What a message says of a name that is unknown, or of a module that cannot be imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# How similar a name must be to be suggested, from 0 to 1 (difflib): "bm52" is to "bm25", and "nonsense" not to "dense".
SIMILAR = 0.65


def similar(name: object, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is most similar to; None where it is similar to none."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=SIMILAR)), None)


def choose(name: object, known: Iterable[str], synonyms: Iterable[str] = ()) -> str:
    """The end of a message: "did you mean 'bm25'? Choose from bm25, …", or only "choose from bm25, …" where no known
    name is similar. synonyms: names that may be suggested and are not listed. Default ()."""
    known = list(known)
    near = similar(name, [*known, *synonyms])
    return f"{'choose' if near is None else f'did you mean {near!r}? Choose'} from {', '.join(known)}"


def not_imported(path: str, error: Exception) -> str:
    """The end of a message on a module that cannot be imported: the reason, and what to do.

    path: the dotted path that was imported. error: what importing it raised.
    """
    reason = " ".join(str(error).split())
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and not f"{path}.".startswith(f"{missing}."):
        return f"({reason}): install {missing.partition('.')[0]}, which it needs"
    return f"({reason}): check the path, and that it is on PYTHONPATH"
