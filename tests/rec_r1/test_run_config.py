"""A run is a folder one can move: config.yaml holds absolute paths, and its own place is where it lies."""

import dataclasses
import operator
import re
import shutil
from pathlib import Path

import pytest

from rec_r1 import cli, config, runs
from rec_r1.config import UserError
from rec_r1.runs import run_config

PATHS = [
    "task.path=data", "retriever.index=indexes/a", "retriever.cache.disk=kept", "baselines.rollouts=old/rollouts.jsonl",
    "baselines.outputs=given.jsonl", "output_dir=runs/a",
]  # fmt: skip


def flat(value: object, key: str = "") -> dict[str, object]:
    """Every value of a recipe by its dotted key."""
    if not isinstance(value, dict):
        return {key.removeprefix("."): value}
    return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}").items()}


def test_paths_become_absolute_and_nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my-model").mkdir()
    Path("bm25").mkdir()  # a folder that is called as a kind is: a kind is no path
    names = ["model.name=my-model", "task.params={categories: my-model, split: data}"]
    inner = "{backend: {kind: dense, params: {model: my-model}}, text: {kind: bm25}}"
    recipe = config.load("quickstart", [*PATHS, *names, f"grounding.params={inner}"])
    made = run_config.absolute(recipe)
    before, after = flat(dataclasses.asdict(recipe)), flat(dataclasses.asdict(made))
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {o.partition("=")[0] for o in PATHS} | {
        "model.name", "task.params.categories", "grounding.params.backend.params.model",
    }  # fmt: skip
    for key in changed:
        assert after[key] == str(tmp_path / str(before[key]))
    assert run_config.absolute(made) == made


def test_paths_in_every_trainer_s_options_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text("{}")
    for section in ("grpo", "baselines.sft", "baselines.reward_weighted_sft", "baselines.dpo"):
        made = run_config.absolute(config.load("quickstart", [f"{section}.deepspeed=zero.json"]))
        options = operator.attrgetter(section)(made)
        assert options["deepspeed"] == str(tmp_path / "zero.json")


def test_names_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = config.load("quickstart", ["task.path=hub:me/data", "retriever.params={}", f"output_dir={tmp_path}"])
    assert run_config.absolute(recipe) == recipe


def test_a_path_may_be_spelled_in_another_way_on_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "model", "elsewhere"):
        Path(folder).mkdir()
    info = {"model_source": "m", "retriever_fingerprint": "f", "versions": {}}
    runs.begin(config.load("quickstart", ["output_dir=run", "model.name=model", "task.path=data"]), 0, info)
    monkeypatch.chdir("elsewhere")
    now = ["output_dir=../run", "model.name=../model", "task.path=../data"]
    runs.prepare(config.load("quickstart", now), resume=True)
    (tmp_path / "elsewhere" / "model").mkdir()
    with pytest.raises(UserError, match=r"another model\.name "):
        runs.prepare(config.load("quickstart", [now[0], "model.name=model", now[2]]), resume=True)


@pytest.mark.slow
def test_a_run_is_where_it_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    info = {"model_source": "m", "retriever_fingerprint": "f", "versions": {}}
    runs.begin(config.load("quickstart", ["output_dir=old"]), 0, info)
    shutil.move("old", "new")
    assert config.load("new/config.yaml").output_dir == "new"
    assert config.load("new/config.yaml", ["output_dir=third"]).output_dir == "third"
    runs.prepare(config.load("new/config.yaml"), resume=True)
    runs.prepare(config.load("quickstart", ["output_dir=new"]), resume=True)
    assert cli.main(["baseline", "new/config.yaml", "random"]) == 0  # not into the old place
    assert Path("new/evaluation/test/random.json").is_file() and not Path("old").exists()


def test_a_run_s_recipe_that_was_cut_short_is_refused(tmp_path):
    info = {"model_source": "m", "retriever_fingerprint": "f", "versions": {}}
    runs.begin(config.load("quickstart", [f"output_dir={tmp_path}"]), 0, info)
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    ends = [number for number, text in enumerate(lines) if re.match(r"[a-z_]+:", text)]
    for end in ends[1:]:  # before each section: what is left is valid YAML
        path.write_text("".join(lines[:end]))
        with pytest.raises(UserError, match=r"config\.yaml: damaged"):
            config.load(path)
