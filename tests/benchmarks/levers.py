"""What each lever on a training step is worth in a whole training: seconds, tokens, and the metric after equal time.

    rec-r1 train quickstart seed=N output_dir=EVERYTHING/seed-N          (for each seed; and the same into NOTHING with
        speed.end_at_answer=false speed.share_prompts=false speed.live_rows=false grpo.per_device_train_batch_size=24)
    python tests/benchmarks/step.py --json TIMES
    python tests/benchmarks/levers.py --everything EVERYTHING --nothing NOTHING --times TIMES

EVERYTHING and NOTHING are folders with a finished training `seed-N` for each seed, TIMES is the file of step.py. Two
trainings a seed are enough for most arms of step.py: *shares*, *live* and *one part* leave the gradient as it is, up to
rounding (tests/rec_r1/test_live_rows.py compares them), so that they learn by step what *nothing* learns, and *ends*
what *everything* learns. Only their seconds differ. The arm *old recipe* has other settings and needs trainings of its
own (step.py says which settings), whose folder is given by `--old`. Arms whose trainings are not given are left out.

The metric is that of the validation split, between two evaluations by linear interpolation, at 1/4, 1/2 and 1 of the
time that *nothing* takes for its steps, or of `--seconds`: the mean over seeds, and the smallest and the largest of
them. Evaluations are not part of the time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

CURVE_OF = {
    "old recipe": "old recipe",
    "nothing": "nothing",
    "ends": "everything",
    "shares": "nothing",
    "live": "nothing",
    "one part": "nothing",
    "everything": "everything",
}
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Curve:
    """A training: the metric at the evaluated steps, the number of steps, mean tokens, the share of live groups."""

    evaluated: list[int]
    values: list[float]
    steps: int
    tokens: float
    live: float

    def at(self, step: float) -> float:
        return float(np.interp(step, self.evaluated, self.values))


def read(run: Path, metric: str) -> Curve:
    """The curve of a finished run from its metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if f"eval/{metric}" in row]
    trained = [row for row in rows if "completions/mean_length" in row]
    return Curve(
        evaluated=[row["step"] for row in held_out],
        values=[row[f"eval/{metric}"] for row in held_out],
        steps=trained[-1]["step"],
        tokens=mean(row["completions/mean_length"] for row in trained),
        live=mean(row["groups/live"] for row in trained),
    )


def read_all(folder: Path, metric: str) -> list[Curve]:
    runs = sorted(folder.glob("seed-*"))
    if not runs:
        raise SystemExit(f"{folder} has no folder seed-N: train into it first (python {__file__} --help)")
    return [read(run, metric) for run in runs]


def table(curves: dict[str, list[Curve]], times: dict[str, float], metric: str, whole: float) -> list[str]:
    """The lines of the table: one arm a line, times in seconds.

    curves: the trainings, seed by seed, of *nothing*, *everything* and *old recipe*, or of some of them.
    times: the median seconds of a step, by arm.
    whole: the metric is shown after 1/4, 1/2 and 1 of so many seconds.
    """
    heads = [f"{metric} at {share * whole:.0f} s" for share in SHARES]
    lines = [
        f"{'':<11}{'seeds':>6}{'s a step':>10}{'s in all':>10}{'tokens':>8}{'live':>6}"
        + "".join(f"{h:>26}" for h in heads)
    ]
    for arm, source in CURVE_OF.items():
        if arm not in times or source not in curves:
            continue
        some = curves[source]
        cells = f"{len(some):>6}{times[arm]:>10.2f}{some[0].steps * times[arm]:>10.0f}"
        cells += f"{mean(one.tokens for one in some):>8.1f}{mean(one.live for one in some):>6.2f}"
        for share in SHARES:
            found = [one.at(share * whole / times[arm]) for one in some]
            cells += f"{f'{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})':>26}"
        lines.append(f"{arm:<11}{cells}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--old", type=Path, metavar="FOLDER", help="the trainings of the old recipe")
    parser.add_argument("--nothing", type=Path, metavar="FOLDER", help="the trainings without any saving")
    parser.add_argument("--everything", type=Path, metavar="FOLDER", help="the trainings with all savings")
    parser.add_argument("--times", type=Path, required=True, metavar="FILE", help="the seconds of a step, of step.py")
    parser.add_argument("--metric", default="ndcg@10")
    parser.add_argument("--seconds", type=float, help="of a whole training; default: those of nothing")
    args = parser.parse_args()
    folders = {"old recipe": args.old, "nothing": args.nothing, "everything": args.everything}
    curves = {arm: read_all(folder, args.metric) for arm, folder in folders.items() if folder}
    if args.seconds is None and "nothing" not in curves:
        parser.error("without --nothing, --seconds must say how long a whole training takes")
    times = json.loads(args.times.read_text())
    whole = args.seconds or curves["nothing"][0].steps * times["nothing"]
    print("\n".join(table(curves, times, args.metric, whole)))


if __name__ == "__main__":
    main()
