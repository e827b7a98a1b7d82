"""What a trained policy must beat, at the same number of rollouts: all baselines of two seeds, and what each used."""

import json
import math
import zlib

import numpy as np
import pytest

from rec_r1 import baselines, cli, config, generation, train
from rec_r1.checks import steps, validate
from rec_r1.environment import open_environment
from rec_r1.evaluation import budget, records, seeds
from rec_r1.evaluation.budget import Used
from rec_r1.tasks import keep_headroom
from rec_r1.trl_options import grpo_config

pytestmark = pytest.mark.usefixtures("fewer_queries")

# rm3 needs a JVM, and is tested in test_baselines.py.
NAMES = ("few_shot", "best_of", "sft", "reward_weighted_sft", "dpo", "rloo", "prompt_search")
SHOWN = {name.replace("_", " ") for name in NAMES if name != "best_of"} | {"best of 4, upper bound"}
ROLLOUTS = 2 * 8  # Two steps of eight completions.


def lottery(outcome):
    """A reward that differs between nearly any two completions, (B,) float32."""
    return np.array([zlib.crc32(text.encode()) % 1000 / 1000 for text in outcome.completions], np.float32)


def settings(tiny_model, out) -> list[str]:
    """Two steps in which nearly every group is live."""
    return [
        f"model.name={tiny_model}", "model.dtype=float32", "lora={r: 4, target_modules: [q_proj, v_proj]}",
        f"output_dir={out}", "format.repeat=1", "rewards={test_budget.lottery: 1.0}", "evaluation.metrics=[ndcg@10]",
        "evaluation.every_steps=0", "evaluation.test_limit=12", "evaluation.validation_limit=4",
        "evaluation.repetition_penalty=null", "grpo.max_steps=2", "grpo.save_steps=2",
        "prompts_per_step=null", "grpo.per_device_train_batch_size=8", "grpo.num_generations=4",
        "grpo.max_completion_length=6",
        "grpo.disable_tqdm=true", "baselines.sft={max_steps: 1}", "baselines.dpo={max_steps: 1}",
        "baselines.reward_weighted_sft={max_steps: 1}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A folder of two seeds with all baselines."""
    out, patch = tmp_path_factory.mktemp("budget") / "runs", pytest.MonkeyPatch()
    patch.setattr(baselines, "ALL", NAMES)
    given = ["quickstart", *settings(tiny_model, out)]
    assert train.main([*given, "--seeds", "2"]) == 0
    assert cli.main(["baseline", given[0], "all", *given[1:], "--seeds", "2"]) == 0
    patch.undo()
    return out


@pytest.mark.slow
def test_every_baseline_has_the_rollouts_of_the_training(folder):
    for run in seeds.runs_in(folder):
        found = records.load_all(run, "test")
        assert set(found) == {"trained", "raw query", "untrained", *SHOWN}
        used = {name: Used(**system.used) for name, system in found.items()}
        for name in ("trained", "rloo", "reward weighted sft"):
            assert used[name].rollouts == ROLLOUTS and used[name].seconds > 0, name
        recipe = config.load(run / "config.yaml")
        env = open_environment(recipe)
        kept = keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
        for name in ("sft", "dpo"):  # The fewest samples are two for each prompt.
            assert used[name].rollouts == 2 * len(kept) > ROLLOUTS and used[name].seconds > 0
        for name in ("untrained", "few shot", "best of 4, upper bound", "raw query"):
            assert used[name].rollouts == used[name].seconds == 0, name
        assert 0 < used["prompt search"].rollouts <= ROLLOUTS and used["prompt search"].seconds > 0
        assert used["best of 4, upper bound"].completions == 4 and used["raw query"].completions == 0
        assert all(one.query_seconds > 0 for name, one in used.items() if name != "raw query")
        rows = [json.loads(line) for line in (run / "baselines/rloo/rollouts.jsonl").read_text().splitlines()]
        mine = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
        assert len(rows) == len(mine) == ROLLOUTS
        # The first generation is of the same policy, prompts and draws.
        assert [r["completion"] for r in rows[:8]] == [r["completion"] for r in mine[:8]]
        weighted = found["reward weighted sft"].used["seconds"]
        assert weighted > budget.of_run(run).seconds  # It cannot do without the run's rollouts.


@pytest.mark.slow
def test_nothing_is_made_twice(folder, tiny_model, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("a completion is written again")

    monkeypatch.setattr(generation, "generate", never)
    monkeypatch.setattr(baselines, "ALL", NAMES)
    before = records.load_all(folder / "seed-0", "test")
    assert cli.main(["baseline", "quickstart", "all", *settings(tiny_model, folder), "--seeds", "2"]) == 0
    assert records.load_all(folder / "seed-0", "test") == before
    shown = capsys.readouterr().out
    assert "trained - prompt search" in shown and "trained - best of 4" not in shown
    assert "the trained policies are" in shown and "\nrloo " in shown
    assert any(line.startswith("best of 4, upper bound ") for line in shown.splitlines())
    (table,) = [part for part in shown.split("\n\n") if part.startswith("used ")]
    assert [line.split()[1] for line in table.splitlines() if line.startswith(("trained", "rloo"))] == ["16", "16"]


@pytest.mark.slow
def test_a_baseline_of_some_seeds_is_compared_on_these(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rec_r1.evaluation.seeds.RECORD", "other.json")
    for name in ("dpo", "rloo"):
        for path in (folder / "seed-1" / "evaluation" / "test").glob(f"{name}.*"):
            path.rename(tmp_path / path.name)
    try:
        result = seeds.measure(folder)
    finally:
        for path in tmp_path.glob("*.*"):
            path.rename(folder / "seed-1" / "evaluation" / "test" / path.name)
    shown = {row["system"] for row in result["tables"][0]["rows"]}
    assert "sft" in shown and not shown & {"dpo", "rloo"}  # One seed gives no interval.


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["grpo.max_steps=5"],
        ["grpo.max_steps=5", "grpo.num_iterations=3", "grpo.gradient_accumulation_steps=2"],
        ["grpo.max_steps=-1", "grpo.num_train_epochs=1.5"],
        ["grpo.max_steps=-1", "grpo.num_train_epochs=2", "grpo.steps_per_generation=4"],
    ],
)
def test_the_planned_rollouts_are_those_of_the_plan(tiny_model, tmp_path, more):
    recipe = config.load("quickstart", [*settings(tiny_model, tmp_path), *more])
    args, queries = grpo_config(recipe), 37
    whole = steps.plan(recipe, queries, args)
    passes = whole.total * args.gradient_accumulation_steps
    generations = math.ceil(passes / (args.steps_per_generation * args.num_iterations))
    assert budget.planned(recipe, queries) == generations * args.generation_batch_size
    assert validate.check_recipe(recipe)


@pytest.mark.slow
def test_a_baseline_that_cannot_be_made_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "ALL", ("last_title", "random"))
    assert cli.main(["baseline", "quickstart", "all", f"output_dir={tmp_path}", "evaluation.test_limit=12"]) == 2
    said = capsys.readouterr()
    assert "random - raw query" in said.out
    assert f"baseline last_title in {tmp_path} was not made: task emoji has no histories" in said.err


def test_baselines_of_seeds_that_are_not_trained_are_refused_before_they_are_made(tmp_path, capsys):
    assert cli.main(["baseline", "quickstart", "random", f"output_dir={tmp_path}", "--seeds", "2"]) == 2
    assert f"{tmp_path}: fewer than two runs called seed-N: rec-r1 train RECIPE --seeds 5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_log_used_what_is_not_known(tmp_path):
    recipe = config.load("quickstart", [f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    assert budget.of_run(tmp_path) == Used(None, None)
    assert budget.of_training(recipe, 156) == budget.planned(recipe, 156) == 39 * 96
    assert budget.lines({"trained": Used(None, None)})[1] == ["trained", "–", "–", "1", "–"]


def test_the_seconds_are_of_all_steps_also_where_not_every_step_is_logged(tmp_path):
    recipe = config.load("quickstart", [f"output_dir={tmp_path}", "grpo.logging_steps=2", "grpo.max_steps=4"])
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    rows = [{"step": 0, "eval/seconds": 9.0}, {"step": 2, "step_time": 3.0}, {"step": 4, "step_time": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert budget.of_run(tmp_path) == Used(4 * 96, 2 * 3.0 + 2 * 5.0)


def begin_run(folder, recipe, last_step: int, processes: int = 1) -> None:
    """The files of a run, as they are after ``last_step``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.dump(recipe))
    rows = [{"step": step, "step_time": 1.0} for step in range(1, last_step + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"processes": processes}))


@pytest.mark.parametrize(
    ("more", "processes", "steps", "rollouts"),
    [
        ([], 1, 39, 39 * 96),
        (["warm_start.samples=8"], 1, 39, 8 * 156 + 39 * 96),
        (["grpo.max_steps=-1", "grpo.num_train_epochs=2"], 1, 26, 2 * 156 * 8),
        (["prompts_per_step=null", "grpo.per_device_train_batch_size=8"], 4, 39, 39 * 4 * 8),
        (["grpo.max_steps=5", "grpo.num_iterations=3"], 1, 5, 2 * 96),  # The second generation is used in part.
    ],
)
def test_the_order_of_the_commands_does_not_decide_the_budget(tmp_path, more, processes, steps, rollouts):
    recipe = config.load("quickstart", [f"output_dir={tmp_path}", *more])
    if processes == 1:  # On more processes the number is not known before the training.
        assert budget.of_training(recipe, 156) == rollouts
    for last_step in (steps // 3, steps):
        begin_run(tmp_path, recipe, last_step, processes)
        if recipe.warm_start.samples:
            (tmp_path / "warm_start").mkdir(exist_ok=True)
            budget.write(tmp_path / "warm_start", Used(8 * 156, 1.0))
        assert budget.of_training(recipe, 156) == rollouts
    if recipe.warm_start.samples:
        assert budget.updates(recipe, 156) == steps  # A warm start makes none of them.


def test_a_baseline_beside_a_shorter_run_has_the_rollouts_of_that_run(tmp_path):
    begin_run(tmp_path, config.load("quickstart", [f"output_dir={tmp_path}", "grpo.max_steps=13"]), 5)
    assert budget.of_training(config.load("quickstart", [f"output_dir={tmp_path}"]), 156) == 13 * 96
