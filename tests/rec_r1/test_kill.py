"""A run that is killed at random moments and resumed is the uninterrupted one: every log, completion and weight.

REC_R1_KILLS=20 python -m pytest tests/rec_r1/test_kill.py -s     twenty runs instead of three
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rec_r1.runs import rollouts

pytestmark = pytest.mark.slow
RUNS = int(os.environ.get("REC_R1_KILLS", "3"))
TIMES = ("time", "seconds", "runtime", "_per_second", "total_flos", "train_loss", "cache_hits")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contents(out: Path) -> dict[str, object]:
    """All that must be equal: logs without what clocks say, completions, answers, the best policy and the last."""
    logged = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows(out / "metrics.jsonl")]
    recorded = [row for row, _ in rollouts.rows(out / "rollouts.jsonl")]
    found: dict[str, object] = {"metrics": logged, "rollouts": recorded}
    found["best"] = json.loads((out / "best.json").read_text())
    for path in sorted(out.glob("evaluation/test/*.jsonl")):
        found[path.name] = rows(path)
    for path in sorted(out.glob("*/adapter_model.safetensors")):
        found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


def test_killed_at_random_moments(tiny_model, beir_folder, tmp_path):
    settings = [
        "task.name=beir", f"task.path={beir_folder}", "task.train_filter.raw_ndcg_below=1.01", "format.repeat=1",
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1",
        "evaluation.every_steps=2", "evaluation.metrics=[ndcg@10]", "evaluation.test_limit=30",
        "prompts_per_step=2", "grpo.num_generations=4",
        "grpo.max_completion_length=12", "grpo.learning_rate=1.0e-2", "grpo.max_steps=-1", "grpo.num_train_epochs=4",
        "grpo.save_steps=3", "grpo.save_total_limit=2",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "killing.py"), str(tmp_path), str(RUNS), "quickstart", *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300 + 200 * RUNS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + (tmp_path / "whole.log").read_text()[-3000:]
    expected = contents(tmp_path / "whole")
    steps = [row["step"] for row in expected["metrics"] if "reward" in row]
    assert steps == list(range(1, 9))  # two steps an epoch, four epochs
    epochs = [[row["query"] for row in expected["rollouts"] if row["step"] // 2 == epoch] for epoch in range(4)]
    assert len({tuple(queries) for queries in epochs}) > 1  # each has an order of its own
    assert len({row["reward"] for row in expected["rollouts"]}) > 2 and len(expected) >= 7
    assert len(list((tmp_path / "whole/rollouts.parts").glob("*.gz"))) > 1
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # libraries print, too
    equal = 0
    for report in reports:
        log = (tmp_path / f"cut{report['run']}.log").read_text()
        assert report["code"] == 0 and "Traceback" not in log, log[-4000:]
        found = contents(tmp_path / f"cut{report['run']}")
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == expected[name], (name, report, log[-2000:])
        equal += 1
    print(f"{equal} of {RUNS} killed runs equal the uninterrupted one: {reports}")
    assert equal == RUNS and sum(len(report["killed_after"]) for report in reports) >= RUNS
