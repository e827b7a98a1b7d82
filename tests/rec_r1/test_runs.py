import contextlib
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rec_r1 import config, runs
from rec_r1.checks import check
from rec_r1.config import UserError
from rec_r1.runs import checkpoints, run_config

INFO = {"model_source": "m", "retriever_fingerprint": "f", "data_fingerprint": "d", "processes": "1", "versions": {}}


@pytest.fixture
def recipe(tmp_path):
    return config.load("quickstart", [f"output_dir={tmp_path / 'run'}"])


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    """What the trainer saves for an adapter; trainer_state.json last."""
    import torch
    from safetensors.numpy import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    save_file({"weight": np.ones(50, np.float32)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step, "of": np.arange(40, dtype=np.uint32), "at": torch.ones(30)}, path / name)
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0}))
    return path


def resumed_from(recipe, period: int = 1, steps: int = 500) -> str | None:
    runs.prepare(recipe, resume=True)
    step, path = runs.last_state(recipe, period, steps, resume=True)
    assert step == (checkpoints.step_of(path) if path else 0)
    return path and path.name


def test_a_new_or_empty_folder_starts(recipe):
    assert runs.prepare(recipe, resume=False) is None
    Path(recipe.output_dir).mkdir()
    assert runs.prepare(recipe, resume=False) is None


def test_refusals(recipe, tmp_path):
    folder = Path(recipe.output_dir)
    with pytest.raises(UserError, match="holds no run"):
        runs.prepare(recipe, resume=True)
    runs.begin(recipe, 0, INFO)
    with pytest.raises(UserError, match="continue its run with --resume"):
        runs.prepare(recipe, resume=False)
    with pytest.raises(UserError, match="started with another seed "):
        runs.prepare(dataclasses.replace(recipe, seed=7), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        runs.prepare(dataclasses.replace(recipe, output_dir=str(tmp_path / "file")), resume=False)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]


def test_resume_takes_the_newest_complete_checkpoint(recipe, caplog):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    assert resumed_from(recipe) is None
    assert "begins again" in caplog.messages[0]
    caplog.clear()
    checkpoint(folder, 2), checkpoint(folder, 10), checkpoint(folder, 12, complete=False)
    more = dataclasses.replace(recipe, grpo=recipe.grpo | {"max_steps": 500})  # longer is not another experiment
    assert resumed_from(more) == "checkpoint-10"
    assert caplog.messages == [
        "--resume: grpo.max_steps was 39 and is now 500",
        "--resume: checkpoint-12 cannot be continued from (trainer_state.json: missing): continuing from checkpoint-10",
    ]


FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":  # one byte of a tensor
        path.write_bytes(content[:-300] + bytes([content[-300] ^ 255]) + content[-299:])
    else:
        half, zeros = content[: len(content) // 2], bytes(len(content))
        whole = {"empty": b"", "cut": half, "short": content[:-1], "garbage": b"\x80\x02garbage", "zeros": zeros}
        path.write_bytes(whole[how])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "short", "garbage", "zeros"])
@pytest.mark.parametrize("name", [*FILES, "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(recipe, caplog, name, how):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    checkpoint(folder, 2), checkpoint(folder, 4)
    runs.record(folder, saved=4)
    damage(folder / "checkpoint-4" / name, how)
    assert resumed_from(recipe) == "checkpoint-2"
    assert len(caplog.messages) == 1 and name in caplog.messages[0]
    damage(folder / "checkpoint-2" / name, how)
    with pytest.raises(UserError, match=rf"checkpoint-4 .*{name}.*checkpoint-2 .*start a new run") as raised:
        resumed_from(recipe)
    assert "\n" not in str(raised.value)


def test_a_pickle_in_a_checkpoint_is_not_executed(recipe, tmp_path):
    import pickle

    import torch

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    checkpoint(folder, 2)
    (checkpoint(folder, 4) / "optimizer.pt").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), checkpoint(folder, 6) / "scheduler.pt")
    assert resumed_from(recipe) == "checkpoint-2"
    assert not (tmp_path / "executed").exists()


def test_checkpoints_that_are_all_gone_are_no_beginning(recipe):
    runs.begin(recipe, 0, INFO)
    runs.record(Path(recipe.output_dir), saved=4)
    with pytest.raises(UserError, match="its checkpoints are gone"):
        resumed_from(recipe)


def test_a_checkpoint_inside_a_generation_is_only_an_end(recipe, caplog):
    runs.begin(recipe, 0, INFO)
    checkpoint(Path(recipe.output_dir), 4), checkpoint(Path(recipe.output_dir), 7)
    assert resumed_from(recipe, period=2, steps=7) == "checkpoint-7"
    assert resumed_from(recipe, period=2, steps=9) == "checkpoint-4"
    assert "inside a generation of 2 steps" in caplog.text


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
    runs.begin(recipe, checkpoints.step_of(at), INFO)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").read_text().splitlines()] == [0, 1]
    assert not (folder / "best").exists() and not (folder / "best.json").exists()
    assert checkpoints.found(folder) == [at]
    runs.begin(recipe, 0, INFO)  # no checkpoint: everything is written again
    assert (folder / "metrics.jsonl").read_text() == (folder / "rollouts.jsonl").read_text() == ""


@pytest.mark.parametrize("key", ["model_source", "retriever_fingerprint", "data_fingerprint", "processes"])
def test_another_model_or_retriever_does_not_resume(recipe, key):
    runs.begin(recipe, 0, INFO)
    with pytest.raises(UserError, match=f"{key} was '.' and is now 'other'"):
        runs.begin(recipe, 0, INFO | {key: "other"})


def policy(folder: Path, value: float) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"weight": np.full(3, value, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def test_best_policy(tmp_path):
    with pytest.raises(UserError, match="no run with a trained policy"):
        runs.best_policy(tmp_path)
    checkpoint(tmp_path, 4)
    assert runs.best_policy(tmp_path).name == "checkpoint-4"
    policy(tmp_path / "best", 1)
    (tmp_path / "best.json").write_text('{"step": 2, "metric": "ndcg@10", "value": 0.5}')
    assert runs.best_policy(tmp_path).name == "best"
    damage(tmp_path / "best" / "adapter_model.safetensors", "short")
    with pytest.raises(UserError, match=r"best: adapter_model\.safetensors: damaged"):
        runs.best_policy(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        {"metric": "m", "value": 0.5},
        {"step": 2, "value": 0.5},
        {"step": 2, "metric": None, "value": 0.5},
        {"step": 2, "metric": "m", "value": "0.5"},
    ],
)
def test_a_damaged_record_of_the_best_policy_is_named(tmp_path, record):
    (tmp_path / "best.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"best\.json: damaged \((step|metric|value): .*delete it"):
        runs.best_record(tmp_path)


@pytest.mark.parametrize("inside", ["", "run", "a/b"])
def test_check_refuses_the_file_that_train_refuses(tmp_path, inside):
    (tmp_path / "file").write_text("")
    recipe = config.load("quickstart", [f"output_dir={tmp_path / 'file' / inside}"])
    said = []
    for start in (lambda: runs.prepare(recipe, resume=False), lambda: next(check.check(recipe))):
        with pytest.raises(UserError, match=r"output_dir: .*file is a file: choose another") as raised:
            start()
        said.append(str(raised.value))
    assert said[0] == said[1]


def test_check_warns_of_a_folder_that_train_would_refuse(recipe):
    Path(recipe.output_dir).mkdir()
    (Path(recipe.output_dir) / "evaluation").mkdir()  # as of a baseline: a run may start beside it
    assert "not empty" not in next(check.check(recipe))
    (Path(recipe.output_dir) / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as raised:
        runs.prepare(recipe, resume=False)
    assert next(check.check(recipe)) == f"warning    {raised.value}"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("moment", range(4))
def test_best_and_its_record_change_together(tmp_path, monkeypatch, first, moment):
    """Killed at any of replace_best's renames and removals: best/ and best.json are of one step, before a resume and
    after it."""

    def pair(step: int) -> tuple[Path, dict]:
        return policy(tmp_path / ".best.tmp", step), {"step": step, "metric": "m", "value": float(step)}

    if not first:
        runs.replace_best(tmp_path, *pair(2))
    calls = 0

    def killed(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    new = pair(4)
    monkeypatch.setattr(Path, "replace", killed(Path.replace))
    monkeypatch.setattr(runs.shutil, "rmtree", killed(runs.shutil.rmtree))
    with contextlib.suppress(KeyboardInterrupt):
        runs.replace_best(tmp_path, *new)
    monkeypatch.undo()
    for resumed in (False, True):
        if resumed:
            runs.restore_best(tmp_path)
            assert (tmp_path / "best").is_dir() == (tmp_path / "best.json").is_file()
            assert not list(tmp_path.glob(".best-*"))
        if (tmp_path / "best.json").is_file():
            best = runs.best_policy(tmp_path)
            assert load_file(best / "adapter_model.safetensors")["weight"][0] == runs.step_of(tmp_path, best)
        else:
            assert first


def test_checkpoints_that_are_none(tmp_path):
    assert checkpoints.last(tmp_path) is None
    checkpoint(tmp_path, 9), checkpoint(tmp_path, 10), checkpoint(tmp_path, 0)
    (tmp_path / "checkpoint-77").write_text("a file")
    for name, state in (("best", "{}"), ("30", "{}"), ("31", '{"global_step"'), ("32", ""), ("33", '{"x": 1}')):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert checkpoints.last(tmp_path).name == "checkpoint-10"  # by number: "9" stands behind "10" as text


REFUSED = [
    "seed=7",
    "model.dtype=float32",
    "lora.r=8",
    "lora=null",
    "task.train_filter.k=5",
    "format.repeat=1",
    "retriever.params.k1=0.9",
    "rewards.ndcg@10=0.7",
    "grounding.kind=bm25",
    "evaluation.metrics=[mrr@10]",
    "evaluation.validation_limit=5",
    "speed.end_at_answer=false",
    "speed.explore=1",
    pytest.param("grpo.temperature=0.5", marks=pytest.mark.slow),  # imports TRL for its defaults
    "grpo.num_generations=4",
    "grpo.learning_rate=1.0",
    "grpo.save_steps=3",
]


@pytest.mark.parametrize("override", REFUSED)
def test_what_shapes_rewards_prompts_or_policy_does_not_change(recipe, override):
    runs.begin(recipe, 0, INFO)
    before = (Path(recipe.output_dir) / "config.yaml").read_text()
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", override])
    with pytest.raises(UserError, match=f"started with another {re.escape(override.partition('=')[0])} "):
        runs.prepare(changed, resume=True)
    assert (Path(recipe.output_dir) / "config.yaml").read_text() == before


def test_every_section_is_refused_or_may_change():
    """A section that is added later is compared unless somebody says that it need not be."""
    names = {field.name for field in dataclasses.fields(config.Recipe)}
    refused = {o.partition("=")[0].partition(".")[0] for o in REFUSED if isinstance(o, str)}
    assert names - refused == {name for name in names if run_config.may_change(name)} == {"output_dir", "baselines"}


@pytest.mark.parametrize(
    "override",
    [
        "grpo.max_steps=60",
        "grpo.save_total_limit=5",
        pytest.param("grpo.temperature=1.0", marks=pytest.mark.slow),
        "retriever.cache.memory_mb=1",
        "evaluation.batch_size=2",
        "baselines.few_shot=2",
        "grpo.hub_strategy=end",
    ],
)
def test_what_changes_nothing_may_change(recipe, override):
    runs.begin(recipe, 0, INFO)
    runs.prepare(config.load("quickstart", [f"output_dir={recipe.output_dir}", override]), resume=True)


def test_evaluation_may_change(recipe):
    runs.begin(recipe, 0, INFO)
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", "evaluation.every_steps=1"])
    runs.prepare(changed, resume=True)


@pytest.mark.parametrize(
    "left", [[".config.yaml.tmp"], [".run.json.tmp"], ["run.json"], ["run.json", ".config.yaml.tmp"]]
)
def test_killed_while_it_was_first_written(recipe, left):
    """Before config.yaml is there nothing has begun: the folder counts as empty."""
    folder = Path(recipe.output_dir)
    folder.mkdir()
    for name in left:
        (folder / name).write_text('{"retriever_fingerprint": "of another start"}')
    with pytest.raises(UserError, match="leave --resume out"):
        runs.prepare(recipe, resume=True)
    runs.prepare(recipe, resume=False)
    runs.begin(recipe, 0, INFO)
    assert runs.read_info(folder) == {"saved": 0} | INFO


def test_a_run_without_run_json_resumes(recipe):
    runs.begin(recipe, 0, INFO)
    (Path(recipe.output_dir) / "run.json").unlink()
    assert resumed_from(recipe) is None
    runs.begin(recipe, 0, INFO)


def test_a_resume_without_run_json_cuts_the_logs_too(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    checkpoint(folder, 2), checkpoint(folder, 4)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    (folder / "run.json").unlink()
    runs.begin(recipe, 2, INFO)
    assert [row["step"] for row in runs.read_metrics(folder)] == [0, 1, 2]
    assert [path.name for path in checkpoints.found(folder)] == ["checkpoint-2"]
    assert runs.read_info(folder)["saved"] == 2


def close(folder: Path, step: int) -> None:
    (folder / "evaluation" / "test").mkdir(parents=True)
    (folder / "evaluation" / "test" / "comparison.json").write_text("{}")
    runs.record(folder, closed=step)


@pytest.mark.parametrize(("step", "kept"), [(0, False), (2, False), (4, True), (6, True)])
def test_a_closing_evaluation_counts_for_its_own_step(recipe, step, kept):
    """The policy of a run that goes on from before it is another one, and is evaluated again."""
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    close(folder, 4)
    runs.begin(recipe, step, INFO)
    assert runs.is_closed(folder, 4) == kept


def test_a_finished_run_that_keeps_no_checkpoint_stays_finished(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    close(folder, 4)
    assert runs.last_state(recipe, 1, 4, resume=True) == (4, None)
    assert runs.last_state(recipe, 1, 3, resume=True) == (4, None)
    assert runs.last_state(recipe, 1, 5, resume=True) == (0, None)  # made longer: it begins again
    at = checkpoint(folder, 2)  # where it keeps some, these decide
    assert runs.last_state(recipe, 1, 4, resume=True) == (2, at)


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
    runs.begin(recipe, 0, INFO)
    (folder / "metrics.jsonl").write_text('{"step": 5}\n')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="retriever_fingerprint"):
        runs.begin(dataclasses.replace(recipe, grpo={}), 0, INFO | {"retriever_fingerprint": "other"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_begin_keeps_the_best_of_before_the_checkpoint_and_trims_every_process_s_rollouts(recipe):
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    at = checkpoint(folder, 2)
    (folder / "best").mkdir()
    (folder / "best.json").write_text(json.dumps({"step": 2, "metric": "m", "value": 0.5}))
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        (folder / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 1, 2)))
    runs.begin(recipe, checkpoints.step_of(at), INFO)
    assert (folder / "best").is_dir() and (folder / "best.json").is_file()
    for name in ("rollouts.jsonl", "rollouts.1.jsonl"):
        assert [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()] == [0, 1, 1]


def test_begin_of_a_new_run_writes_what_it_was_given(recipe):
    runs.begin(recipe, 0, INFO)
    assert config.load(Path(recipe.output_dir) / "config.yaml") == recipe
    assert runs.read_info(Path(recipe.output_dir)) == {"saved": 0} | INFO


def resumed_rollouts(recipe, content: bytes) -> list[dict]:
    """What stays of rollouts.jsonl when a run goes on from checkpoint 2."""
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    (folder / "rollouts.jsonl").write_bytes(content)
    runs.begin(recipe, checkpoints.step_of(checkpoint(folder, 2)), INFO)
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_completion_with_a_line_separator_survives_a_resume(recipe, separator):
    rows = [{"step": 0, "completion": f"a{separator}b"}, {"step": 1, "completion": "c"}]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert resumed_rollouts(recipe, content.encode()) == rows


def test_a_last_line_cut_inside_a_character_is_dropped(recipe):
    cut = '{"step": 1, "completion": "🎉'.encode()[:-2]
    assert resumed_rollouts(recipe, b'{"step": 0}\n' + cut) == [{"step": 0}]
