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


def test_checkpoints_that_are_none(tmp_path):
    assert runs.last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9), checkpoint(tmp_path, 10), checkpoint(tmp_path, 0)
    (tmp_path / "checkpoint-77").write_text("a file")
    for name, state in (("best", "{}"), ("30", "{}"), ("31", '{"global_step"'), ("32", "")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert runs.last_checkpoint(tmp_path).name == "checkpoint-10"  # by number: "9" stands behind "10" as text


CHANGES = {
    "seed": "seed=7",
    "model": "model.dtype=float32",
    "lora": "lora.r=8",
    "task": "task.train_filter.k=5",
    "format": "format.repeat=1",
    "retriever": "retriever.params.k1=0.9",
    "rewards": "rewards.ndcg@10=0.5",
}


def test_every_fixed_section_has_a_change_below():
    assert set(CHANGES) == set(runs._FIXED)


@pytest.mark.parametrize(("section", "override"), CHANGES.items())
def test_a_changed_section_does_not_resume(recipe, section, override):
    runs.begin(recipe, None, INFO)
    before = (Path(recipe.output_dir) / "config.yaml").read_text()
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", override])
    with pytest.raises(UserError, match=f"started with another {section} "):
        runs.prepare(changed, resume=True)
    assert (Path(recipe.output_dir) / "config.yaml").read_text() == before


def test_evaluation_may_change(recipe):
    runs.begin(recipe, None, INFO)
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", "evaluation.every_steps=1"])
    assert runs.prepare(changed, resume=True) is None


def test_a_folder_with_anything_in_it_is_not_started_in(recipe):
    Path(recipe.output_dir).mkdir()
    (Path(recipe.output_dir) / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        runs.prepare(recipe, resume=False)
    with pytest.raises(UserError, match="holds no run"):
        runs.prepare(recipe, resume=True)
    assert [path.name for path in Path(recipe.output_dir).iterdir()] == ["notes.txt"]


def test_a_refused_begin_writes_nothing(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, None, INFO)
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="retriever_fingerprint"):
        runs.begin(dataclasses.replace(recipe, grpo={}), None, INFO | {"retriever_fingerprint": "other"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_begin_keeps_the_best_of_before_the_checkpoint_and_trims_every_process_s_rollouts(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, None, INFO)
    at = checkpoint(folder, 2)
    (folder / "best").mkdir()
    (folder / "best.json").write_text(json.dumps({"step": 2}))
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        (folder / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 1, 2)))
    runs.begin(recipe, at, INFO)
    assert (folder / "best").is_dir() and (folder / "best.json").is_file()
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        assert [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()] == [0, 1, 1]


def test_begin_of_a_new_run_writes_what_it_was_given(recipe):
    runs.begin(recipe, None, INFO)
    assert config.load(Path(recipe.output_dir) / "config.yaml") == recipe
    assert runs.read_info(Path(recipe.output_dir)) == INFO


def test_metrics_are_read_without_a_line_cut_short(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        runs.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert runs.read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    runs.write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        runs.write_atomically(tmp_path / "a", "new \ud83d")
    assert (tmp_path / "a").read_text() == "old"


def resumed_rollouts(recipe, content: bytes) -> list[dict]:
    """What stays of rollouts.jsonl when a run goes on from checkpoint 2."""
    folder = Path(recipe.output_dir)
    runs.begin(recipe, None, INFO)
    (folder / "rollouts.jsonl").write_bytes(content)
    runs.begin(recipe, checkpoint(folder, 2), INFO)
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_completion_with_a_line_separator_survives_a_resume(recipe, separator):
    rows = [{"step": 0, "completion": f"a{separator}b"}, {"step": 1, "completion": "c"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert resumed_rollouts(recipe, content.encode()) == rows


def test_a_last_line_cut_inside_a_character_is_dropped(recipe):
    cut = '{"step": 1, "completion": "🎉'.encode()[:-2]
    assert resumed_rollouts(recipe, b'{"step": 0}\n' + cut) == [{"step": 0}]
