"""The order of prompts, and the steps at which a run can be resumed, against TRL and the trainer themselves."""

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1.training.prompt_order import LEAST_PROBABILITY, PromptOrder, draw


def repeated(prompts: int = 11, shuffle: bool = True, seed: int = 3):
    from trl.trainer.utils import RepeatSampler

    return RepeatSampler(range(prompts), 2, batch_size=3, repeat_count=2, shuffle=shuffle, seed=seed)


def test_an_epoch_s_order_does_not_depend_on_those_before():
    epochs = itertools.count()
    whole = PromptOrder(repeated(), 3, lambda: next(epochs))
    orders = [list(whole) for _ in range(6)]
    for epoch, order in enumerate(orders):
        assert list(PromptOrder(repeated(), 3, lambda epoch=epoch: epoch)) == order
    assert orders[0] == list(repeated())  # TRL's own
    assert len({tuple(order) for order in orders}) == 6
    assert list(PromptOrder(repeated(), 4, lambda: 1)) != orders[1]
    for order in orders:  # TRL's structure: 3 prompts, each twice, the whole twice; the rest of an epoch is left out
        assert len(order) == len(whole) == 36
        for block in (order[i : i + 12] for i in range(0, 36, 12)):
            assert block[:6] == block[6:] and block[0:6:2] == block[1:6:2] and len(set(block)) == 3


def test_without_shuffling_the_order_is_the_data_s():
    order = PromptOrder(repeated(shuffle=False), 3, lambda: 5)
    assert list(order) == list(repeated(shuffle=False))


@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 9]), min_size=1, max_size=60),
    st.sampled_from([0.01, 0.5, 0.9]),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_prompts_that_teach_take_the_place_of_those_that_do_not(dead, explore, batch, seed):
    order = draw(dead, explore, batch, seed)
    times = Counter(order)
    live, others = (frozenset(i for i, n in enumerate(dead) if bool(n) == taught_nothing) for taught_nothing in (0, 1))
    assert len(order) == len(dead) and order == draw(dead, explore, batch, seed)
    assert all(1 <= times[i] <= 2 for i in live) and all(times[i] <= 1 for i in others)
    if sum(times[i] for i in others):  # the others only fill what prompts that teach leave
        assert all(times[i] == 2 for i in live) or sum(times[i] - 1 for i in live) <= len(others)
    batches = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
    if len(dead) >= 4 * batch:
        assert all(len(set(one)) == batch for one in batches)


def test_prompts_are_left_out_as_often_as_explore_says():
    dead = [0] * 3000 + [1] * 1000 + [2] * 1000 + [60] * 1000
    asked = Counter(prompt for seed in range(10) for prompt in draw(dead, 0.5, 1, seed))
    assert all(10 <= asked[prompt] <= 20 for prompt in range(3000))
    for start, expected in ((3000, 0.5), (4000, 0.25), (5000, LEAST_PROBABILITY)):  # standard deviation below 0.005
        assert abs(sum(asked[i] for i in range(start, start + 1000)) / 10_000 - expected) < 0.025


def test_from_the_second_epoch_on_the_record_decides():
    known = {0: [0] * 11, 1: [0] * 8 + [5] * 3, 2: [1] * 11}
    orders = [list(PromptOrder(repeated(), 3, lambda epoch=epoch: epoch, known.get, 0.01)) for epoch in known]
    plain = [list(PromptOrder(repeated(), 3, lambda epoch=epoch: epoch)) for epoch in known]
    assert orders[0] == plain[0] and orders[1] != plain[1]
    for order in orders[1:]:  # TRL's structure, as above
        for block in (order[i : i + 12] for i in range(0, 36, 12)):
            assert block[:6] == block[6:] and block[0:6:2] == block[1:6:2] and len(set(block)) == 3
    assert list(PromptOrder(repeated(), 3, lambda: 1, known.get, 1.0)) == plain[1]  # 1: all equally often


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [9, 12, 17])
@pytest.mark.parametrize("setting", [{}, {"num_iterations": 2}, {"steps_per_generation": 4}, {"max_steps": 7},
                                     {"num_train_epochs": 2.5}])  # fmt: skip
def test_the_steps_are_those_the_trainer_counts(tiny_model, tmp_path, prompts, setting):
    from datasets import Dataset
    from trl import GRPOConfig

    from rec_r1 import models
    from rec_r1.checks.steps import plan
    from rec_r1.config import ModelConfig, Recipe
    from rec_r1.training.trainer import Trainer

    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], num_generations=2,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, **setting,
    )  # fmt: skip
    trainer = Trainer(
        Recipe(),
        lambda completions, **_: [0.0] * len(completions),  # stands in for a Scorer, which nothing calls here
        model=models.load_policy(str(tiny_model), ModelConfig(dtype="float32")),
        args=args,
        train_dataset=Dataset.from_dict({name: [f"q{i}" for i in range(prompts)] for name in ("prompt", "query_id")}),
        processing_class=models.load_tokenizer(str(tiny_model)),
    )
    loader = trainer.get_train_dataloader()
    assert isinstance(trainer._get_train_sampler(), PromptOrder)
    assert plan(Recipe(), prompts, args).total == trainer.set_initial_training_values(args, loader)[-1]


@pytest.mark.parametrize(
    ("batches", "iterations", "accumulated", "period"),
    [(1, 1, 1, 1), (4, 1, 4, 1), (4, 2, 4, 2), (2, 1, 4, 1), (4, 3, 2, 6)],
)
def test_checkpoints_lie_between_generations(batches, iterations, accumulated, period):
    from rec_r1.training.callbacks import Between
    from rec_r1.trl_options import steps_a_generation

    args = SimpleNamespace(
        steps_per_generation=batches, num_iterations=iterations, gradient_accumulation_steps=accumulated
    )
    assert steps_a_generation(args) == period
    between, saved = Between(), []
    for step in range(1, 25):
        control = SimpleNamespace(should_save=step % 4 == 0, should_training_stop=False, should_log=False)
        between.on_step_end(args, SimpleNamespace(global_step=step), control)
        if control.should_save:
            saved.append(step)
            assert control.should_log
    assert saved == sorted({-(-step // period) * period for step in range(4, 25, 4)} & set(range(25)))


@pytest.mark.slow
def test_a_step_across_two_generations_is_refused(capsys, tmp_path):
    from rec_r1 import cli, train

    settings = ["prompts_per_step=null", "grpo.num_generations=4"]
    settings += ["grpo.steps_per_generation=3", "grpo.gradient_accumulation_steps=2"]
    assert train.main(["quickstart", f"output_dir={tmp_path / 'run'}", *settings]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "grpo.gradient_accumulation_steps: 2" in message and not Path(tmp_path / "run").exists()
    assert cli.main(["check", "quickstart", *settings]) == 2
    assert message in capsys.readouterr().err
