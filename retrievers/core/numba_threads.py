"""Compiles loops with numba, and runs them on several threads. Without numba the callers use slower numpy code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

MIN_QUERIES_PER_THREAD = 16  # With fewer queries, starting a further thread takes longer than it saves.


@cache
def compiled(function: Callable[..., None]) -> Any:
    """The compiled ``function``, or None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # Neither the folder of the package nor the user's cache folder can be written.
        return numba.njit(function, nogil=True)


def read_only(arrays: Iterable[Any]) -> list[Any]:
    """Views of the ``arrays`` that cannot be written, for a loop that only reads them. Anything else stays as it is.

    numba compiles a loop once for arrays that can be written and once for those that cannot, such as the
    memory-mapped ones of an index. With these views it compiles it once.
    """
    views = [array.view() if isinstance(array, np.ndarray) else array for array in arrays]
    for view in views:
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
    return views


def run_in_threads(run: Callable[[int, int], None], count: int) -> None:
    """Split the range from 0 to ``count`` into parts, and call ``run(first, last)`` for each, on several threads."""
    # These are Python's threads, because two threads must not enter numba's own thread pool at the same time.
    workers = max(1, min(threads(), count // MIN_QUERIES_PER_THREAD))
    if workers == 1:
        run(0, count)
        return
    # There are more parts than threads, because queries differ in length and all threads should end at about one time.
    cuts = np.linspace(0, count, 4 * workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, cuts[:-1], cuts[1:]))


def threads() -> int:
    """The number of cores for this process: the machine's cores, divided by its training processes."""
    # sched_getaffinity respects containers and CPU pinning. macOS does not have it.
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
