import dataclasses
import json
from pathlib import Path

import pytest

from rec_r1 import config, runs
from rec_r1.config import UserError

INFO = {"model_source": "m", "retriever_fingerprint": "f", "versions": {}}


@pytest.fixture
def recipe(tmp_path):
    return config.load("quickstart", [f"output_dir={tmp_path / 'run'}"])


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_a_new_or_empty_folder_starts(recipe):
    assert runs.prepare(recipe, resume=False) is None
    Path(recipe.output_dir).mkdir()
    assert runs.prepare(recipe, resume=False) is None


def test_refusals(recipe, tmp_path):
    folder = Path(recipe.output_dir)
    with pytest.raises(UserError, match="holds no run"):
        runs.prepare(recipe, resume=True)
    runs.begin(recipe, None, INFO)
    with pytest.raises(UserError, match="continue its run with --resume"):
        runs.prepare(recipe, resume=False)
    with pytest.raises(UserError, match="started with another seed"):
        runs.prepare(dataclasses.replace(recipe, seed=7), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        runs.prepare(dataclasses.replace(recipe, output_dir=str(tmp_path / "file")), resume=False)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]


def test_resume_takes_the_newest_complete_checkpoint(recipe, caplog):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, None, INFO)
    assert runs.prepare(recipe, resume=True) is None
    checkpoint(folder, 2), checkpoint(folder, 10), checkpoint(folder, 12, complete=False)
    more = dataclasses.replace(recipe, grpo=recipe.grpo | {"max_steps": 500})  # longer is not another experiment
    assert runs.prepare(more, resume=True) == folder / "checkpoint-10"
    assert [record.getMessage() for record in caplog.records] == ["--resume: grpo.max_steps was 52 and is now 500"]
    (folder / "checkpoint-10" / "trainer_state.json").write_text('{"global')
    assert runs.prepare(recipe, resume=True) == folder / "checkpoint-2"


def test_begin_cuts_the_logs_behind_the_checkpoint(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, None, INFO)
    at = checkpoint(folder, 2)
    steps = [json.dumps({"step": step}) for step in (0, 1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join([*steps, '{"step": 4, "rew']))
    (folder / "rollouts.jsonl").write_text("\n".join(steps) + "\n")
    (folder / "best").mkdir()
    (folder / "best.json").write_text(json.dumps({"step": 3, "metric": "ndcg@10", "value": 1.0}))
    runs.begin(recipe, at, INFO)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").read_text().splitlines()] == [0, 1]
    assert not (folder / "best").exists() and not (folder / "best.json").exists()
    runs.begin(recipe, None, INFO)  # no checkpoint: everything is written again
    assert (folder / "metrics.jsonl").read_text() == (folder / "rollouts.jsonl").read_text() == ""


@pytest.mark.parametrize("key", ["model_source", "retriever_fingerprint"])
def test_another_model_or_retriever_does_not_resume(recipe, key):
    runs.begin(recipe, None, INFO)
    with pytest.raises(UserError, match=f"{key} was '.' and is now 'other'"):
        runs.begin(recipe, None, INFO | {key: "other"})


def test_best_policy(tmp_path):
    with pytest.raises(UserError, match="no run with a trained policy"):
        runs.best_policy(tmp_path)
    checkpoint(tmp_path, 4)
    assert runs.best_policy(tmp_path).name == "checkpoint-4"
    (tmp_path / "best").mkdir()
    (tmp_path / "best.json").write_text("{}")
    assert runs.best_policy(tmp_path).name == "best"


def test_an_error_on_the_main_process_reaches_the_caller():
    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        runs.on_main_process(fail)
    assert runs.on_main_process(lambda: 3) == 3


def test_write_atomically(tmp_path):
    runs.write_atomically(tmp_path / "a", "old")
    runs.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
