"""Texts as PostgreSQL stores and reads them."""

from __future__ import annotations

from collections.abc import Iterable


def storable(text: str, most: int | None = None) -> str:
    """A text as PostgreSQL can store it: without NUL characters and halves of surrogate pairs, and of at most ``most``
    bytes in UTF-8."""
    encoded = text.replace("\0", " ").encode("utf-8", "replace")
    return encoded[:most].decode("utf-8", "ignore")


def array(texts: Iterable[str]) -> str:
    """Texts as the literal of an array of PostgreSQL, in which every text is quoted."""
    quoted = (storable(one).replace("\\", "\\\\").replace('"', '\\"') for one in texts)
    return "{" + ",".join(f'"{one}"' for one in quoted) + "}"
