"""A run's folder: where one starts, what is refused, what is written first, when it is finished."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs_ import INFO, checkpoint, close, resumed_from

from rec_r1 import config, models, runs
from rec_r1.checks import check
from rec_r1.config import UserError


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


@pytest.mark.parametrize("key", ["model_source", "retriever_fingerprint", "data_fingerprint", "processes", "sharding"])
def test_another_model_or_retriever_does_not_resume(recipe, key):
    runs.begin(recipe, 0, INFO)
    with pytest.raises(UserError, match=f"{key} was '.' and is now 'other'"):
        runs.begin(recipe, 0, INFO | {key: "other"}, resume=True)


def test_a_run_goes_on_in_its_numeric_type(recipe, monkeypatch):
    """On a machine where `auto` is another type, the recipe has to name the run's own one."""
    import torch

    def starts(dtype: str, automatic: torch.dtype) -> None:
        now = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=dtype))
        runs.prepare(now, resume=True)
        monkeypatch.setattr(models, "fast_dtype", lambda: automatic)
        args = SimpleNamespace(world_size=1, deepspeed_plugin=None, fsdp=None, device=torch.device("cpu"))
        runs.begin(now, 0, runs.describe(now, args, "m", "f", "d"), resume=True)

    runs.begin(recipe, 0, INFO | {"processes": 1, "sharding": "none"})  # of an older version
    with pytest.raises(UserError, match=r"another model\.dtype \('auto', now 'float32'\)"):
        starts("float32", torch.bfloat16)
    starts("auto", torch.bfloat16)
    assert runs.read_info(Path(recipe.output_dir))["dtype"] == "bfloat16"
    for dtype, automatic in (("auto", torch.float32), ("float32", torch.bfloat16)):
        with pytest.raises(UserError, match=r"dtype was 'bfloat16' and is now 'float32': set model\.dtype=bfloat"):
            starts(dtype, automatic)
    starts("bfloat16", torch.float32)
    starts("auto", torch.bfloat16)


def test_a_run_of_one_process_is_not_resumed_by_two(recipe, monkeypatch):
    runs.begin(recipe, 0, INFO | {"processes": 1})
    runs.prepare(recipe, resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trained with --num_processes=1, and this launch has 2: launch it with --num"):
        runs.prepare(recipe, resume=True)


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


@pytest.mark.slow
def test_check_warns_of_a_folder_that_train_would_refuse(recipe):
    Path(recipe.output_dir).mkdir()
    (Path(recipe.output_dir) / "evaluation").mkdir()  # as of a baseline: a run may start beside it
    assert "not empty" not in next(check.check(recipe))
    (Path(recipe.output_dir) / "notes.txt").write_text("mine")
    with pytest.raises(UserError) as raised:
        runs.prepare(recipe, resume=False)
    assert next(check.check(recipe)) == f"warning    {raised.value}"


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
    runs.begin(recipe, 0, INFO, resume=True)


@pytest.mark.parametrize(("step", "kept"), [(0, False), (2, False), (4, True), (6, True)])
def test_a_closing_evaluation_counts_for_its_own_step(recipe, step, kept):
    """The policy of a run that goes on from before it is another one, and is evaluated again."""
    folder = Path(recipe.output_dir)
    runs.begin(recipe, 0, INFO)
    close(folder, 4)
    runs.begin(recipe, step, INFO, resume=True)
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
        runs.begin(dataclasses.replace(recipe, grpo={}), 0, INFO | {"retriever_fingerprint": "other"}, resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_begin_of_a_new_run_writes_what_it_was_given(recipe):
    runs.begin(recipe, 0, INFO)
    assert config.load(Path(recipe.output_dir) / "config.yaml") == recipe
    assert runs.read_info(Path(recipe.output_dir)) == {"saved": 0} | INFO
