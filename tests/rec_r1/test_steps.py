"""How many steps a training has, against TRL's own sampler and transformers' own count."""

import math
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1 import cli, config, models, train
from rec_r1.checks.steps import plan
from rec_r1.config import UserError
from rec_r1.trl_options import grpo_config


def options(size=2, parts=3, group=2, iterations=1, again=None, world=1, epochs=3.0, steps=-1):
    again = again or parts
    return SimpleNamespace(
        per_device_train_batch_size=size, gradient_accumulation_steps=parts, num_generations=group,
        num_iterations=iterations, steps_per_generation=again, generation_batch_size=size * again * world,
        world_size=world, num_train_epochs=epochs, max_steps=steps,
    )  # fmt: skip


RECIPE = config.load("quickstart")
COUNTS = st.integers(1, 6)


@given(st.integers(0, 60), COUNTS, COUNTS, st.integers(2, 6), st.integers(1, 3), COUNTS, st.integers(1, 3), COUNTS)
def test_the_plan_is_what_sampler_and_trainer_make(queries, size, parts, group, iterations, again, world, epochs):
    from trl.trainer.utils import RepeatSampler

    args = options(size, parts, group, iterations, again, world, float(epochs))
    if args.generation_batch_size % group:
        return
    sampler = RepeatSampler(range(queries), group, args.generation_batch_size // group, iterations * again, seed=0)
    if not len(sampler):
        with pytest.raises(UserError, match=f"and {queries} are left, so training would end after 0 steps"):
            plan(RECIPE, queries, args)
        return
    # One batch of the loader is per_device_train_batch_size x steps_per_generation on each process.
    batches = math.ceil(len(sampler) / (size * again * world))
    planned = plan(RECIPE, queries, args)
    assert planned.used == len(set(sampler))
    assert planned.epoch == max(batches // parts + (batches % parts > 0), 1)
    assert planned.total == math.ceil(epochs * planned.epoch)
    assert plan(RECIPE, queries, options(size, parts, group, iterations, again, world, steps=7)).total == 7


@pytest.mark.slow
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 8), st.integers(2, 12), st.sampled_from(["no", "set"]))
def test_the_settings_that_are_named_work(queries, size, parts, group, again):
    grpo = {"per_device_train_batch_size": size * group, "gradient_accumulation_steps": parts, "num_generations": group}
    if again == "set":
        grpo["steps_per_generation"] = parts * 2
    overrides = ["prompts_per_step=null", *(f"grpo.{name}={value}" for name, value in grpo.items())]
    recipe = config.load("quickstart", overrides)
    try:
        plan(recipe, queries, grpo_config(recipe))
    except UserError as error:
        named = re.findall(r"grpo\.\w+=\w+", str(error))
        assert named, error
        fixed = config.load("quickstart", [*overrides, *named])
        assert plan(fixed, queries, grpo_config(fixed)).used >= 1


@pytest.fixture
def folder(beir_folder):
    """A BEIR folder with as many training queries as asked for."""

    def with_queries(count):
        queries = beir_folder / "queries.jsonl"
        lines = "".join(f'{{"_id": "t{i}", "text": "query {i} about shoes"}}\n' for i in range(count))
        queries.write_text(queries.read_text() + lines)
        judged = "".join(f"t{i}\td{i % 12 + 1}\t1\n" for i in range(count))
        (beir_folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
        return beir_folder

    return with_queries


@pytest.mark.slow
@pytest.mark.parametrize("queries", [17, 12, 26])
def test_a_folder_with_fewer_queries_than_a_step_takes(queries, folder, tiny_model, tmp_path, capsys, monkeypatch):
    """The BEIR recipe takes 32 queries a step. Both verbs refuse, in the same words; what they name works."""

    def weights(*_, **__):
        raise RuntimeError("weights would be loaded")

    monkeypatch.setattr(models, "load_policy", weights)
    arguments = ["beir_bm25", f"task.path={folder(queries)}", f"model.name={tiny_model}", f"output_dir={tmp_path}/run"]
    arguments += [
        "grpo.use_vllm=false",
        "lora={r: 4, target_modules: [q_proj]}",
        "task.train_filter.raw_ndcg_below=1.01",
    ]
    said = []
    for main in (train.main, lambda given: cli.main(["check", *given])):
        assert main(arguments) == 2
        said.append(next(line for line in capsys.readouterr().err.splitlines() if line.startswith("rec-r1: ")))
    assert said[0] == said[1] and f"takes 32 training queries, and {queries} are left" in said[0]
    fix = re.findall(r"prompts_per_step=\d+", said[0])
    assert len(fix) == 1
    assert cli.main(["check", *arguments, *fix]) == 0
    assert re.search(rf"1000 in all; an epoch asks \d+ of {queries} training queries", capsys.readouterr().out)
    with pytest.raises(RuntimeError, match="weights would be loaded"):
        train.main([*arguments, *fix])


@pytest.mark.slow
def test_a_filter_that_leaves_too_few_names_itself(folder, tiny_model, capsys):
    settings = [
        f"model.name={tiny_model}",
        "lora={r: 4, target_modules: [q_proj]}",
        "task.train_filter.raw_ndcg_below=0.05",
    ]
    settings += ["prompts_per_step=768"]
    assert cli.main(["check", "quickstart", *settings]) == 2
    message = capsys.readouterr().err
    assert "raise task.train_filter.raw_ndcg_below=0.05" in message and "training would end after 0 steps" in message
