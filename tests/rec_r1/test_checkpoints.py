"""Which checkpoint a run continues from, which policy is its best, and what damage does to both."""

import contextlib
import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs_ import INFO, checkpoint, damage, policy, resumed_from
from safetensors.numpy import load_file

from rec_r1 import runs
from rec_r1.config import UserError
from rec_r1.runs import checkpoints

FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


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


@pytest.mark.slow
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


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.slow
def test_a_pickle_among_the_parts_of_deepspeed_is_not_executed(recipe, tmp_path, caplog):
    """DeepSpeed would load them as pickles that may run anything."""
    import torch

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    for step, content in ((2, {"weight": torch.ones(3)}), (4, Trap())):
        path = checkpoint(folder, step)
        (path / "optimizer.pt").unlink()
        (path / f"global_step{step}").mkdir()
        (path / "latest").write_text(f"global_step{step}")
        torch.save(content, path / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert resumed_from(recipe) == "checkpoint-2"
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt: damaged" in caplog.text
    assert not (tmp_path / "executed").exists()
    (folder / "checkpoint-2" / "latest").write_text("../elsewhere")
    with pytest.raises(UserError, match=r"latest: it names '../elsewhere', and the folder is global_step2"):
        runs.record(folder, saved=4) or resumed_from(recipe)


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "optimizer.bin"])
def test_a_checkpoint_of_fsdp_needs_its_own_files(recipe, name):
    import torch

    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    for step in (2, 4):
        path = checkpoint(folder, step)
        (path / "optimizer.pt").unlink()
        (path / "training_args.bin").write_bytes(b"a pickle that nothing reads")
        for file in ("pytorch_model_fsdp.bin", "optimizer.bin"):
            torch.save({"weight": torch.ones(3)}, path / file)
    assert resumed_from(recipe) == "checkpoint-4"
    damage(folder / "checkpoint-4" / name, "missing")
    assert resumed_from(recipe) == "checkpoint-2"


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


def test_checkpoints_that_are_none(tmp_path):
    assert checkpoints.last(tmp_path) is None
    checkpoint(tmp_path, 9), checkpoint(tmp_path, 10), checkpoint(tmp_path, 0)
    (tmp_path / "checkpoint-77").write_text("a file")
    for name, state in (("best", "{}"), ("30", "{}"), ("31", '{"global_step"'), ("32", ""), ("33", '{"x": 1}')):
        (tmp_path / f"checkpoint-{name}").mkdir()
        (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert checkpoints.last(tmp_path).name == "checkpoint-10"  # by number: "9" stands behind "10" as text


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


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("moment", range(6))
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
            assert not list(tmp_path.glob("[._]best-*"))
        if (tmp_path / "best.json").is_file():
            best = runs.best_policy(tmp_path)
            assert load_file(best / "adapter_model.safetensors")["weight"][0] == runs.step_of(tmp_path, best)
        else:
            assert first


def test_a_run_that_goes_on_from_a_checkpoint_has_the_best_policy_of_then(recipe):
    """Whichever checkpoint it is: the newest one may be damaged. A policy that no checkpoint needs is not kept."""
    from rec_r1.training import callbacks  # It imports transformers.

    folder = Path(recipe.output_dir)

    def improve(*steps: int) -> None:
        for step in steps:
            record = {"step": step, "metric": "m", "value": step / 100}
            runs.replace_best(folder, policy(folder / ".best.tmp", step), record)

    def state() -> tuple[int, float, set[str]]:
        best = runs.best_policy(folder)
        kept = {path.name for path in folder.iterdir() if path.name.startswith("_")}
        return runs.step_of(folder, best), load_file(best / "adapter_model.safetensors")["weight"][0], kept

    runs.begin(recipe, 0, INFO)
    improve(2, 4)
    assert state() == (4, 4, set())
    checkpoint(folder, 5)
    improve(7, 8)
    checkpoint(folder, 10)
    improve(12)
    assert state() == (12, 12, {"_best-4", "_best-4.json", "_best-8", "_best-8.json"})
    runs.begin(recipe, 10, INFO, resume=True)
    assert state() == (8, 8, {"_best-4", "_best-4.json"})
    assert runs.best_record(folder) == {"step": 8, "metric": "m", "value": 0.08}
    improve(12)
    runs.begin(recipe, 5, INFO, resume=True)
    assert state() == (4, 4, set())
    improve(7)
    shutil.rmtree(folder / "checkpoint-5")  # The trainer keeps the newest ones.
    checkpoint(folder, 10)
    control = SimpleNamespace(is_world_process_zero=True, global_step=10)
    callbacks.Log(folder).on_save(None, control, None)
    assert state() == (7, 7, set())
    (folder / "best").rename(folder / ".best-7.old")  # An older version was killed while it replaced the policy.
    policy(folder / "best", 9)
    assert state() == (7, 7, set())
    runs.begin(recipe, 10, INFO, resume=True)
    assert state() == (7, 7, set()) and not list(folder.glob(".best*"))
