"""A run that is interrupted or killed, and resumed, is the uninterrupted one: every log, completion and weight.

REC_R1_KILLS=20 python -m pytest tests/rec_r1/test_kill.py -s     twenty runs killed at random instead of three
"""

import json
import os
from pathlib import Path

import pytest
from forks import Fork, finish

from rec_r1.runs import rollouts

pytestmark = pytest.mark.slow
RUNS = int(os.environ.get("REC_R1_KILLS", "3"))
TIMES = ("time", "seconds", "runtime", "_per_second", "total_flos", "train_loss", "cache_hits")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def contents(out: Path) -> dict[str, object]:
    """All that must be equal: logs without what clocks say, completions, answers, the best policy and the last."""
    steps = [row for row in rows(out / "metrics.jsonl") if "train_runtime" not in row]  # Ctrl-C ends a training, too.
    logged = [{k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in steps]
    recorded = [row for row, _ in rollouts.rows(out / "rollouts.jsonl")]
    found: dict[str, object] = {"metrics": logged, "rollouts": recorded}
    found["best"] = json.loads((out / "best.json").read_text())
    for path in sorted(out.glob("evaluation/test/*.jsonl")):
        found[path.name] = rows(path)
    for path in sorted(out.glob("*/adapter_model.safetensors")):
        found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def made(tiny_model, shared_beir_folder, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The folder of the uninterrupted run and of the others, and what killing.py reports of each of these."""
    folder = tmp_path_factory.mktemp("kill")
    settings = [
        "task.name=beir", f"task.path={shared_beir_folder}", "task.train_filter.raw_ndcg_below=1.01",
        "format.repeat=1",
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1",
        "evaluation.every_steps=2", "evaluation.metrics=[ndcg@10]", "evaluation.test_limit=30",
        "prompts_per_step=2", "grpo.num_generations=4",
        "grpo.max_completion_length=12", "grpo.learning_rate=1.0e-2", "grpo.max_steps=-1", "grpo.num_train_epochs=4",
        "grpo.save_steps=3", "grpo.save_total_limit=2",
    ]  # fmt: skip
    arguments = [str(folder), str(RUNS), "quickstart", *settings]
    killing = Fork(Path(__file__).parent / "killing.py", arguments, folder / "killing.log", folder)
    (printed,) = finish([killing], 500 + 200 * RUNS)
    assert killing.code == 0, printed[-3000:] + (folder / "whole.log").read_text()[-3000:]
    reports = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]  # libraries print, too
    return folder, {report["run"]: report for report in reports}


def assert_equal_to_the_whole(folder: Path, report: dict) -> None:
    log = (folder / f"{report['run']}.log").read_text()
    assert report["code"] == 0 and "Traceback" not in log, log[-4000:]
    found, expected = contents(folder / report["run"]), contents(folder / "whole")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], (name, report, log[-2000:])


def test_the_uninterrupted_run_has_something_to_compare(made):
    folder, _ = made
    expected = contents(folder / "whole")
    steps = [row["step"] for row in expected["metrics"] if "reward" in row]
    assert steps == list(range(1, 9))  # two steps an epoch, four epochs
    epochs = [[row["query"] for row in expected["rollouts"] if row["step"] // 2 == epoch] for epoch in range(4)]
    assert len({tuple(queries) for queries in epochs}) > 1  # each has an order of its own
    assert len({row["reward"] for row in expected["rollouts"]}) > 2 and len(expected) >= 7
    assert len(list((folder / "whole/rollouts.parts").glob("*.gz"))) > 1


@pytest.mark.parametrize(("run", "code"), [("killed", None), ("interrupted", 130)])
def test_stopped_after_a_step(made, run, code):
    """Ctrl-C after step 4 leaves a checkpoint of step 5, and a kill after step 5 that of step 3."""
    folder, reports = made
    report = reports[run]
    assert report["stopped"] == code and report["last"] == {"killed": 3, "interrupted": 5}[run]
    if code is not None:
        assert "--resume" in report["said"] and "Traceback" not in report["said"]
    refused = (folder / f"{run}.refused.log").read_text()
    assert report["refused"] == 2 and "--resume" in refused and "Traceback" not in refused
    assert_equal_to_the_whole(folder, report)


def test_killed_at_random_moments(made):
    folder, reports = made
    cut = [report for run, report in reports.items() if run.startswith("cut")]
    for report in cut:
        assert_equal_to_the_whole(folder, report)
    print(f"{len(cut)} of {RUNS} killed runs equal the uninterrupted one: {cut}")
    assert len(cut) == RUNS and sum(len(report["killed_after"]) for report in cut) >= RUNS
