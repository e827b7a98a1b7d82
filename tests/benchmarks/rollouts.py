"""The size of a run's rollouts at 384 completions a step, and the time that writing and reading them takes.

    python tests/benchmarks/rollouts.py --corpus cranfield/corpus.jsonl [--steps 12]

Each of 32 training queries of the quickstart is asked as in the recipes after the paper (prompt `sparse`, format
think_json), and has 12 completions: texts of a corpus in the format of BEIR, cut to 250 words, between the tags, and
some of their words as the JSON. The texts of a group have other subjects, which those of a model do not.

The Scorer of that recipe then scores 384 of them a step, and writes them as in a training. The completions are used
again and again, but the same one returns after more than zlib's window of 32 kB, so this does not help compression.
Prints the bytes of a row, what compressors make of rows that occur once, and for all steps: the seconds of scoring, of
writing plain rows alone, and of writing with closed parts, the largest of them, and the seconds of reading all rows.
All times are of the processor.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

GROUP, PROMPTS_OF_STEP, WORDS = 12, 32, 250
SETTINGS = ["format.prompt=sparse", "format.answer=think_json", "format.chat=true", "format.repeat=1",
            "format.action=replace", "format.examples=0", "format.example_words=0", "rewards={rec_r1@1000: 1.0}",
            "evaluation.metrics=[ndcg@10, ndcg@100, recall@100]"]  # fmt: skip


def written(corpus: Path) -> list[list[str]]:
    """The completions of each prompt, in the format think_json."""
    chance = random.Random(0)
    documents = [json.loads(line) for line in corpus.read_text(encoding="utf-8").split("\n") if line]
    texts = [f"{one.get('title', '')} {one['text']}".split()[:WORDS] for one in documents]
    texts = [text for text in texts if len(text) > WORDS // 2]
    if len(texts) < GROUP * PROMPTS_OF_STEP:
        raise SystemExit(f"{corpus}: {GROUP * PROMPTS_OF_STEP} texts of more than {WORDS // 2} words are needed")
    chance.shuffle(texts)
    queries = [json.dumps({"query": " ".join(chance.sample(text, 10))}) for text in texts]
    made = [
        f"<think>{' '.join(text)}</think><answer>{query}</answer>" for text, query in zip(texts, queries, strict=True)
    ]
    return [made[q * GROUP : (q + 1) * GROUP] for q in range(PROMPTS_OF_STEP)]


def timed(function: Callable[[], Any]) -> float:
    """The seconds of processor time of a call, which other work on the machine changes less than the clock's."""
    started = time.process_time()
    function()
    return time.process_time() - started


def compressed(rows: bytes) -> Iterator[tuple[str, int, float]]:
    """Name, bytes and seconds of each compressor."""
    arms: dict[str, Callable[[bytes], bytes]] = {
        f"gzip -{level}": lambda data, level=level: gzip.compress(data, level) for level in (1, 6, 9)
    }
    arms["xz"] = lzma.compress
    try:
        import zstandard
    except ImportError:
        print("zstd: not measured (pip install zstandard)")
    else:
        arms["zstd -3"] = zstandard.ZstdCompressor(3).compress
    for name, arm in arms.items():
        started = time.process_time()
        packed = arm(rows)
        yield name, len(packed), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="corpus.jsonl of a data set of BEIR")
    parser.add_argument("--steps", type=int, default=12, help="so many steps of 384 completions are written")
    args = parser.parse_args()
    from rec_r1 import config
    from rec_r1.environment import open_environment
    from rec_r1.runs import rollouts
    from rec_r1.tasks import prompts

    env = open_environment(config.load("quickstart", SETTINGS))
    split = env.task.train.take(range(PROMPTS_OF_STEP))
    asked = prompts(split, env.task.catalog, env.format)
    groups = written(args.corpus)
    every = itertools.cycle([(q, text) for q, group in enumerate(groups) for text in group])
    steps = [list(itertools.islice(every, GROUP * PROMPTS_OF_STEP)) for _ in range(args.steps)]

    def run(folder: Path, part_bytes: int) -> tuple[list[float], list[float]]:
        """Seconds of each call of the Scorer, and of writing in it."""
        rollouts.PART_BYTES, appends = part_bytes, []
        append = rollouts.append
        rollouts.append = lambda file, rows: appends.append(timed(lambda: append(file, rows)))
        env.scorer.transcript = rollouts.file_of(folder, 0)
        calls = []
        for number, step in enumerate(steps):
            of_step = split.take([q for q, _ in step])
            state = SimpleNamespace(global_step=number)
            arguments = ([asked[q] for q, _ in step], [text for _, text in step], of_step.queries, of_step.rows,
                         of_step.grades)  # fmt: skip
            more = {"query_id": list(of_step.ids), "trainer_state": state}
            calls.append(timed(lambda arguments=arguments, more=more: env.scorer(*arguments, **more)))
        rollouts.append = append
        return calls, appends

    with tempfile.TemporaryDirectory() as name:
        parts_of = rollouts.PART_BYTES
        plain, closed = Path(name) / "plain", Path(name) / "closed"
        sizes, seconds = {}, {}
        for folder, size in ((plain, 2**60), (closed, parts_of)):
            folder.mkdir()
            seconds[folder] = run(folder, size)
            sizes[folder] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        lines = rollouts.file_of(plain, 0).read_bytes().split(b"\n")
        once = b"\n".join(lines[: GROUP * len(groups)])
        print(f"{len(lines) - 1:,} rows of {sizes[plain] / (len(lines) - 1):,.0f} bytes; {len(once):,} bytes once")
        for arm, size, took in compressed(once):
            print(f"{arm:10} {len(once) / size:5.2f}x  {len(once) / took / 1e6:6.0f} MB/s")
        tail = rollouts.file_of(closed, 0).stat().st_size
        ratio = (sizes[plain] - tail) / (sizes[closed] - tail)
        of_run = sizes[plain] / args.steps * 1000
        print(f"1000 steps: {of_run / 1e6:,.0f} MB plain; in parts {of_run / ratio / 1e6:,.0f} MB ({ratio:.2f}x), and "
              f"{parts_of / 1e6:.0f} MB of the newest rows, which are plain")  # fmt: skip
        for arm, folder in (("plain", plain), ("parts", closed)):
            calls, appends = (np.array(found) * 1000 for found in seconds[folder])
            print(f"{arm}: a call of the Scorer {calls.mean():,.0f} ms, of which writing {appends.mean():,.1f} ms, "
                  f"at most {appends.max():,.0f} ms")  # fmt: skip
        for arm, folder in (("plain", plain), ("parts", closed)):
            took = timed(lambda folder=folder: sum(1 for _ in rollouts.rows(rollouts.file_of(folder, 0))))
            print(f"{arm}: all rows read in {took:.1f} s, {sizes[plain] / took / 1e6:,.0f} MB/s of text")


if __name__ == "__main__":
    main()
