"""Loops for numba to compile, in threads that share the work. Without numba its callers take numpy's slower way."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

MIN_QUERIES_PER_THREAD = 16  # queries from which on a second thread pays


@cache
def compiled(function: Callable[..., None]) -> Any:
    """The compiled loop, or None without numba."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(function, nogil=True)


def shared(some: Callable[[int, int], None], count: int) -> None:
    """Run ``some(first, last)`` over the parts of 0 to ``count``, on as many threads as pay."""
    # Threads of Python, not of numba: those of numba's own pool may not be entered from two threads at once.
    workers = max(1, min(threads(), count // MIN_QUERIES_PER_THREAD))
    if workers == 1:
        some(0, count)
        return
    # More parts than workers: queries differ in length, and the last to finish should not be late.
    cuts = np.linspace(0, count, 4 * workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(some, cuts[:-1], cuts[1:]))


def threads() -> int:
    """The cores this process may use: the machine's, divided by the training processes of the node."""
    # sched_getaffinity knows of containers and pinning; macOS has no such call
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
