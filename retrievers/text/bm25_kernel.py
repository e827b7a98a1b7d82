"""The loop of `text/bm25_ranks.py`, compiled by numba. Without numba it runs as plain Python, slowly."""

from typing import Any

import numpy as np

BLOCK = 1 << 15  # documents scored at a time: 128 KiB of float32 stay in a core's own cache
POSTPONED_SHARE = 0.5  # of the target's score that the postponed terms may add up to; measured best of 0.3 to 0.98
LOOKUP_COST = 20  # what looking a document up in a posting list costs, in postings read one after the other


def count(
    data: Any, rows: Any, starts: Any, peaks: Any, documents: int,  # Impacts
    query_starts: Any, terms: Any, counts: Any, bounds: Any,  # Packed
    targets: Any, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Fill out[first:last], (Q, T) int32, with the ranks of targets[first:last], (Q, T) int64; see `bm25_ranks`."""
    places = targets.shape[1]
    buffer = np.empty(BLOCK, np.float32)
    candidates = np.empty(BLOCK, np.int64)
    for q in range(first, last):
        start = query_starts[q]
        used = query_starts[q + 1] - start
        position = np.empty(used, np.int64)  # the next posting of each term
        own = np.zeros(places, np.float32)
        for i in range(used):
            position[i] = starts[terms[start + i]]
            end = starts[terms[start + i] + 1]
            for t in range(places):
                if targets[q, t] >= 0:
                    at = position[i] + np.searchsorted(rows[position[i] : end], targets[q, t])
                    if at < end and rows[at] == targets[q, t]:
                        own[t] += counts[start + i] * data[at]
        least = np.float32(np.inf)
        for t in range(places):
            if 0 < own[t] < least:
                least = own[t]
        if least == np.inf:
            continue  # no target matches: out is 0
        # Postpone the terms with the smallest bounds, as long as together they stay below the target's score.
        now, rest, postings = used, 0.0, 0
        while now > 0 and rest + bounds[start + now - 1] < POSTPONED_SHARE * least:
            now -= 1
            rest += bounds[start + now]
            postings += starts[terms[start + now] + 1] - starts[terms[start + now]]
        # A document that has less after the other terms cannot reach the target. The bounds are exact; the margin
        # is for the rounding of a float32 sum, at most 6e-8 an addition.
        needed = np.float32((least - rest) * (1 - 1e-4))
        worthwhile = postings / documents * BLOCK / LOOKUP_COST / max(1, used - now)
        above = np.zeros(places, np.int64)
        for block in range(0, documents, BLOCK):
            stop = min(block + BLOCK, documents)
            buffer[:] = 0
            for i in range(now):
                at, end, repeated = position[i], starts[terms[start + i] + 1], counts[start + i]
                while at < end and rows[at] < stop:
                    buffer[rows[at] - block] += repeated * data[at]
                    at += 1
                position[i] = at
            if now < used:
                found = 0
                for j in range(stop - block):  # counted first: that loop is vectorised, and mostly finds none
                    found += buffer[j] >= needed
                if 0 < found <= worthwhile:
                    found = 0
                    for j in range(stop - block):
                        if buffer[j] >= needed:
                            candidates[found] = j
                            found += 1
                for i in range(now, used if found else now):
                    at, end, repeated = position[i], starts[terms[start + i] + 1], counts[start + i]
                    at += np.searchsorted(rows[at:end], block)
                    if found > worthwhile:
                        while at < end and rows[at] < stop:
                            buffer[rows[at] - block] += repeated * data[at]
                            at += 1
                    else:
                        end = at + np.searchsorted(rows[at:end], stop)
                        for c in range(found):
                            at += np.searchsorted(rows[at:end], block + candidates[c])
                            if at < end and rows[at] == block + candidates[c]:
                                buffer[candidates[c]] += repeated * data[at]
                    position[i] = at
            for t in range(places):
                if own[t] > 0:
                    beaten = 0
                    for j in range(stop - block):
                        beaten += buffer[j] > own[t]
                    for j in range(min(stop, targets[q, t]) - block):  # ties by row
                        beaten += buffer[j] == own[t]
                    above[t] += beaten
        for t in range(places):
            if own[t] > 0:
                out[q, t] = above[t] + 1
