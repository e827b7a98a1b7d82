"""The loop behind `ranks` in `text/bm25_ranks.py`, which numba compiles. It also runs as plain Python, but slowly."""

from typing import Any

import numpy as np

BLOCK = 1 << 15  # So many documents are scored at a time. Their float32 scores, 128 KiB, fit into a core's own cache.
# Postponed terms add up to less than this share of the target's score. It was measured to be the best of 0.3 to 0.98.
POSTPONED_SHARE = 0.5
LOOKUP_COST = 20  # Looking up one document in a posting list takes as long as reading so many postings in order.


def count(
    data: Any, rows: Any, starts: Any, peaks: Any, documents: int,  # Impacts
    query_starts: Any, terms: Any, counts: Any, bounds: Any,  # Packed
    targets: Any, out: Any, first: int, last: int,
) -> None:  # fmt: skip
    """Write the ranks of ``targets``, (Q, T) int64, into ``out``, (Q, T) int32, for the queries first to last - 1.

    The other arguments are the fields of `Impacts` and `Packed` in `text/bm25_ranks.py`, which explains the method.
    """
    places = targets.shape[1]
    buffer = np.empty(BLOCK, np.float32)
    candidates = np.empty(BLOCK, np.int64)
    for q in range(first, last):
        start = query_starts[q]
        used = query_starts[q + 1] - start
        position = np.empty(used, np.int64)  # The next posting of each term that has not been read.
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
            continue  # No target matches the query, and out is 0 already.
        # Postpone the terms with the smallest bounds, as long as they add up to less than the target's score.
        now, rest, postings = used, 0.0, 0
        while now > 0 and rest + bounds[start + now - 1] < POSTPONED_SHARE * least:
            now -= 1
            rest += bounds[start + now]
            postings += starts[terms[start + now] + 1] - starts[terms[start + now]]
        # A document with a smaller score from the other terms cannot reach the target's score. The bounds are exact.
        # The margin allows for the rounding of a float32 sum, which is at most 6e-8 per addition.
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
                for j in range(stop - block):  # A loop that only counts is vectorised. In most blocks it finds none.
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
                    for j in range(min(stop, targets[q, t]) - block):  # Of equal scores, the smaller row is better.
                        beaten += buffer[j] == own[t]
                    above[t] += beaten
        for t in range(places):
            if own[t] > 0:
                out[q, t] = above[t] + 1
