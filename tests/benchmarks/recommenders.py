"""Compares the linear recommenders with those of other libraries, on synthetic interactions.

    python tests/benchmarks/recommenders.py                      # fits and recommendation, 4,000 documents
    python tests/benchmarks/recommenders.py --documents 4000 10000

*fit* measures EASE: the seconds from the matrix X to the weights, the processor seconds (compare these on a machine
that runs other programs), and the peak memory of the process (ru_maxrss). Every arm has a process of its own, which
also loads its library. *ours* is the default, which chooses its precision by the number of items and by the measured
error (ease.py). The other two arms of ours set the precision.

*recommend* measures users per second: the 100 best items for each user without those of the history, from histories to
rows. One comparison has dense weights (EASE, with irspack's own method for new users, and with irspack's scores and
numpy's partition), and one has sparse weights (100 neighbours per item, with implicit).

The numbers are medians of --rounds rounds, in which the arms take turns. Every arm has one thread unless --threads sets
another number, because on a busy machine several threads wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
FITS = ("irspack", "ours", "ours, float64", "ours, float32")  # irspack computes the inverse in float32.
USERS, ASKED, K, LAMBDA, NEIGHBOURS = 20_000, 10_000, 100, 100.0, 100


def synthetic(n: int) -> Any:
    """Synthetic interactions, a scipy CSR matrix (USERS, n): about 40 items per user, whose popularity is a power."""
    import numpy as np

    from retrievers import Interactions

    rng = np.random.default_rng(0)
    law = np.cumsum(1 / np.arange(1, n + 1) ** 0.8)
    lengths = np.clip(rng.geometric(1 / 40, USERS), 5, 400)
    rows = np.searchsorted(law / law[-1], rng.random(lengths.sum())).clip(0, n - 1).astype(np.int32)
    return Interactions(n, np.concatenate([[0], np.cumsum(lengths)]), rows)


def fit(arm: str, n: int) -> dict[str, Any]:
    data = synthetic(n)
    x = data.matrix()
    how: dict[str, Any] = {}
    if arm == "irspack":
        from irspack import DenseSLIMRecommender

        started, used = time.perf_counter(), time.process_time()
        DenseSLIMRecommender(x, reg=LAMBDA).learn()
    else:
        from retrievers.recommenders.ease import solve
        from retrievers.recommenders.item_item import as_float32, gram

        precision = arm.removeprefix("ours").removeprefix(", ") or None
        for each in ("float32", "float64"):  # This loads numba, as the import of the other arm loads its library.
            gram(x[:50, :50], each)
        started, used = time.perf_counter(), time.process_time()
        weights, how = solve(x, LAMBDA, precision)
        as_float32(weights)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"seconds": seconds, "CPU": cpu, "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **how}


def recommend(n: int, rounds: int, threads: int) -> dict[str, float]:
    """The users per second of each arm."""
    import numpy as np

    import retrievers
    from retrievers import Catalog, Query, Unseen

    data = synthetic(n)
    x = data.matrix()
    catalog = Catalog.from_records({"id": str(i), "text": str(i)} for i in range(n))
    queries = [Query(history=tuple(data.sequence(u).tolist())) for u in range(ASKED)]
    dense = Unseen(retrievers.open("ease", catalog, None, data, regularization=LAMBDA), n)
    sparse = Unseen(retrievers.open("itemknn", catalog, None, data, neighbours=NEIGHBOURS, shrink=0), n)
    arms: dict[str, Callable[[], Any]] = {
        "ease: ours": lambda: dense.search(queries, K),
        **irspack_arms(x, queries, threads, np),
        f"{NEIGHBOURS} neighbours: ours": lambda: sparse.search(queries, K),
        f"{NEIGHBOURS} neighbours: implicit": implicit_arm(x, threads, np),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            started = time.perf_counter()
            run()
            if turn:  # The first turn compiles and loads, and is not counted.
                times[name].append(time.perf_counter() - started)
    return {name: ASKED / statistics.median(found) for name, found in times.items()}


def irspack_arms(x: Any, queries: list, threads: int, np: Any) -> dict[str, Callable[[], Any]]:
    from irspack import DenseSLIMRecommender
    from irspack.utils import ItemIDMapper

    model = DenseSLIMRecommender(x, reg=LAMBDA).learn()
    model._W = np.asarray(model._W)  # It would be an np.matrix otherwise.
    mapper = ItemIDMapper(list(range(x.shape[1])))
    profiles = [list(dict.fromkeys(query.history)) for query in queries]

    def own() -> None:
        for start in range(0, ASKED, 1000):  # The dense scores of all users at once would take several GB.
            mapper.recommend_for_new_user_batch(model, profiles[start : start + 1000], K, n_threads=threads)

    def partition() -> None:
        for start in range(0, ASKED, 1000):
            scores = model.get_score_remove_seen(np.arange(start, start + 1000))
            best = np.argpartition(-scores, K, axis=1)[:, :K]
            np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1), 1)

    return {"ease: irspack, for new users": own, "ease: irspack and numpy's partition": partition}


def implicit_arm(x: Any, threads: int, np: Any) -> Callable[[], Any]:
    import warnings

    from implicit.nearest_neighbours import CosineRecommender

    warnings.filterwarnings("ignore", module="implicit")  # It warns about its own conversions.

    model = CosineRecommender(K=NEIGHBOURS + 1, num_threads=threads)  # There, an item is its own first neighbour.
    model.fit(x.astype(np.float64), show_progress=False)
    users, histories = np.arange(ASKED), x[:ASKED].astype(np.float64)
    return lambda: model.recommend(users, histories, N=K, filter_already_liked_items=True)


def child(threads: int, *arguments: object) -> Any:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "IRSPACK_NUM_THREADS_DEFAULT", "NUMBA_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(threads))
    command = [sys.executable, __file__, "--child", *map(str, arguments), "--threads", str(threads)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[4000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fit-only", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *rest = args.child
        if what == "recommend":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        found = fit(rest[0], int(rest[1])) if what == "fit" else recommend(int(rest[0]), int(rest[1]), args.threads)
        print(json.dumps(found))
        return
    print(f"{USERS:,} users, {args.threads} thread(s), medians of {args.rounds} rounds")
    for n in args.documents:
        rounds = [{arm: child(args.threads, "fit", arm, n) for arm in FITS} for _ in range(args.rounds)]
        print(f"\nEASE fit, {n:,} documents{'seconds':>12}{'CPU s':>12}{'peak MB':>12}")
        medians = {}
        for arm in FITS:
            medians[arm] = [statistics.median(r[arm][key] for r in rounds) for key in ("seconds", "CPU", "MB")]
            print(f"{arm:<28}{medians[arm][0]:>12.2f}{medians[arm][1]:>12.2f}{medians[arm][2]:>12.0f}")
        for arm in FITS[1:]:
            ratios = [ours / theirs for ours, theirs in zip(medians[arm], medians[FITS[0]], strict=True)]
            print(f"{arm + ' / irspack':<28}{''.join(f'{ratio:>12.2f}' for ratio in ratios)}", flush=True)
        error = f", columns of B off by {how['error']:.1e}" if "error" in (how := rounds[0]["ours"]) else ""
        print(f"ours, unasked: {how['precision']}{error}")
        if args.fit_only:
            continue
        found = child(args.threads, "recommend", n, args.rounds)
        print(f"\n{ASKED:,} users, k = {K}, {n:,} documents{'users/s':>12}{'ours / it':>12}")
        for arm, rate in found.items():
            ours = next(value for name, value in found.items() if name == arm.split(":")[0] + ": ours")
            print(f"{arm:<40}{rate:>12.0f}{ours / rate:>12.2f}", flush=True)


if __name__ == "__main__":
    main()
