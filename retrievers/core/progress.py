"""Progress bars over what may take long: encoding, and the answers to the thousands of queries of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

PATIENCE = 5.0  # A bar appears only after this many seconds.
_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


def bar(total: int, what: str, unit: str, done: int = 0) -> Any:
    """A tqdm bar, a context manager with `update`, which appears once the work takes longer than five seconds. Of
    several processes of a launcher, only the first shows it.

    total: the number of units.
    what: what is done, before the bar.
    unit: what one unit is, in plural.
    done: how many units were done before. Default 0.
    """
    from tqdm import tqdm

    quiet = _hidden.get() or os.environ.get("RANK", "0") != "0"
    how: dict[str, Any] = {"delay": PATIENCE, "mininterval": 1, "leave": False, "disable": quiet}
    return tqdm(total=total, initial=done, desc=what, unit=f" {unit}", **how)


@contextmanager
def hidden() -> Iterator[None]:
    """No bar of :func:`bar` appears in this block, such as a step of a training, which has a bar of its own.

    with hidden():
        retriever.ranks(queries, targets)
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)
