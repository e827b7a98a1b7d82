"""What a run that goes on from a checkpoint keeps of its logs: what came before it."""

import json
from pathlib import Path

import pytest
from runs_ import INFO, checkpoint

from rec_r1 import runs
from rec_r1.runs import checkpoints


def test_begin_cuts_the_logs_behind_the_checkpoint(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    at = checkpoint(folder, 2)
    steps = [json.dumps({"step": step}) for step in (0, 1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join([*steps, '{"step": 4, "rew']))
    (folder / "rollouts.jsonl").write_text("\n".join(steps) + "\n")
    (folder / "best").mkdir()
    (folder / "best.json").write_text(json.dumps({"step": 3, "metric": "ndcg@10", "value": 1.0}))
    checkpoint(folder, 4)
    runs.begin(recipe, checkpoints.step_of(at), INFO, resume=True)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").read_text().splitlines()] == [0, 1]
    assert not (folder / "best").exists() and not (folder / "best.json").exists()
    assert checkpoints.found(folder) == [at]
    runs.begin(recipe, 0, INFO, resume=True)  # no checkpoint: everything is written again
    assert (folder / "metrics.jsonl").read_text() == (folder / "rollouts.jsonl").read_text() == ""


def test_a_resume_without_run_json_cuts_the_logs_too(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    checkpoint(folder, 2), checkpoint(folder, 4)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    (folder / "run.json").unlink()
    runs.begin(recipe, 2, INFO, resume=True)
    assert [row["step"] for row in runs.read_metrics(folder)] == [0, 1, 2]
    assert [path.name for path in checkpoints.found(folder)] == ["checkpoint-2"]
    assert runs.read_info(folder)["saved"] == 2


def test_begin_keeps_the_best_of_before_the_checkpoint_and_trims_every_process_s_rollouts(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    at = checkpoint(folder, 2)
    (folder / "best").mkdir()
    (folder / "best.json").write_text(json.dumps({"step": 2, "metric": "m", "value": 0.5}))
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        (folder / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 1, 2)))
    runs.begin(recipe, checkpoints.step_of(at), INFO, resume=True)
    assert (folder / "best").is_dir() and (folder / "best.json").is_file()
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        assert [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()] == [0, 1, 1]


def resumed_rollouts(recipe, content: bytes) -> list[dict]:
    """What stays of rollouts.jsonl when a run goes on from checkpoint 2."""
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    (folder / "rollouts.jsonl").write_bytes(content)
    runs.begin(recipe, checkpoints.step_of(checkpoint(folder, 2)), INFO, resume=True)
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_completion_with_a_line_separator_survives_a_resume(recipe, separator):
    rows = [{"step": 0, "completion": f"a{separator}b"}, {"step": 1, "completion": "c"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert resumed_rollouts(recipe, content.encode()) == rows


def test_a_last_line_cut_inside_a_character_is_dropped(recipe):
    cut = '{"step": 1, "completion": "🎉'.encode()[:-2]
    assert resumed_rollouts(recipe, b'{"step": 0}\n' + cut) == [{"step": 0}]
