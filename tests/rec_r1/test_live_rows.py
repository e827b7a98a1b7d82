"""Rows of advantage 0 are left out of the loss, and the gradient is that of the whole batch."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rec_r1 import config, models
from rec_r1.scoring.earned import exact_in_groups
from rec_r1.training.live_rows import add_nothing, live_rows
from rec_r1.trl_options import grpo_config

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")


def trainer_for(tiny_model, folder, **grpo):
    from datasets import Dataset

    from rec_r1.training.trainer import Trainer

    recipe = config.load("quickstart", [f"model.name={tiny_model}", "model.dtype=float32", "lora=null"])
    recipe = dataclasses.replace(recipe, output_dir=str(folder), grpo={**recipe.grpo, **grpo})
    tokenizer = models.load_tokenizer(str(tiny_model))
    trainer = Trainer(
        recipe,
        lambda completions, **_: [0.0] * len(completions),  # stands in for a Scorer, which nothing calls here
        model=models.load_policy(str(tiny_model), recipe.model, all_weights_train=True),
        args=grpo_config(recipe),
        train_dataset=Dataset.from_list([{"prompt": "face"}] * 12),
        processing_class=tokenizer,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def batch(advantages, seed=0, tool_mask=False, old=False):
    """Inputs of the loss as TRL makes them: prompts padded on the left, completions on the right."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    rows, p, c = len(advantages), 9, 7
    prompts, lengths = torch.randint(1, p + 1, (rows,), generator=rng), torch.randint(1, c + 1, (rows,), generator=rng)
    inputs = {
        "prompt_ids": torch.randint(2, 250, (rows, p), generator=rng),
        "prompt_mask": (torch.arange(p) >= p - prompts[:, None]).long(),
        "completion_ids": torch.randint(2, 250, (rows, c), generator=rng),
        "completion_mask": (torch.arange(c) < lengths[:, None]).long(),
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": lengths.sum() * 4,
    }
    if tool_mask:
        inputs["tool_mask"] = (torch.arange(c) < lengths[:, None] - 1).long()
    if old:
        inputs["old_per_token_logps"] = -5 + torch.rand((rows, c), generator=rng)
    return inputs


def gradient(trainer, inputs, skip):
    import torch

    trainer.skips_dead_rows = skip
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, {k: v.clone() for k, v in inputs.items()})
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module", params=LOSSES)
def trainer(request, tiny_model, tmp_path_factory):
    return trainer_for(tiny_model, tmp_path_factory.mktemp(request.param), loss_type=request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    "advantages",
    [[0.0, 1.2, 0.0, -0.7, 0.0, 0.0, 0.3, 0.0], [0.0] * 8, [1.0, -1.0, 0.5, -0.5, 0.1, 0.2, 0.3, -0.6], [0, 0, 0, 2.0]],
    ids=["half dead", "all dead", "none dead", "one live"],
)
@pytest.mark.parametrize("more", [{}, {"tool_mask": True}, {"old": True}], ids=["plain", "tool mask", "old log-probs"])
def test_the_gradient_is_that_of_the_whole_batch(trainer, advantages, more):
    import torch

    inputs = batch(advantages, **more)
    whole, all_rows = gradient(trainer, inputs, False)
    live, rows_left = gradient(trainer, inputs, True)
    assert torch.allclose(all_rows, rows_left, atol=1e-6, rtol=0)
    assert math.isclose(float(whole), float(live), abs_tol=1e-6)
    assert bool(all_rows.any()) == any(advantages)


def shared(trainer, inputs, share):
    trainer.shares_prompts = share
    return gradient(trainer, inputs, False)


@pytest.mark.parametrize("more", [{}, {"tool_mask": True}, {"old": True}], ids=["plain", "tool mask", "old log-probs"])
def test_prompts_read_once_give_the_same_gradient(trainer, more):
    import torch

    inputs = batch([1.0, -1.0, 0.5, -0.5, 0.1, 0.2, 0.3, -0.6], **more)
    for name in ("prompt_ids", "prompt_mask"):  # three prompts, of different lengths
        inputs[name] = inputs[name][[0, 0, 1, 2, 2, 0, 2, 1]]
    calls = []
    hook = trainer.model.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape), with_kwargs=True)
    (loss, whole), (same, once) = shared(trainer, inputs, False), shared(trainer, inputs, True)
    hook.remove()
    assert calls == [(8, 16), (3, 8), (8, 8)]
    assert torch.allclose(whole, once, atol=1e-6, rtol=0) and math.isclose(float(loss), float(same), abs_tol=1e-6)
    assert whole.abs().max() > 1e-4


@pytest.mark.slow
@given(st.lists(st.sampled_from([0.0, 0.0, 0.5, -1.3]), min_size=1, max_size=8), st.integers(0, 1000))
@example([0.0], 2)  # a prompt of one token, which leaves nothing to read before the completion
@settings(max_examples=25, deadline=None)
def test_any_batch(tiny_trainer, advantages, seed):
    import torch

    inputs = batch(advantages, seed)
    assert torch.allclose(gradient(tiny_trainer, inputs, False)[1], gradient(tiny_trainer, inputs, True)[1], atol=1e-6)


@pytest.fixture(scope="module")
def tiny_trainer(tiny_model, tmp_path_factory):
    return trainer_for(tiny_model, tmp_path_factory.mktemp("any"))


def test_rows_and_padding_leave():
    import torch

    inputs = batch([0.0, 1.0, 0.0, -1.0], tool_mask=True)
    live, factor = live_rows(inputs, "grpo")
    rows = torch.tensor([1, 3])
    mask = (inputs["completion_mask"] * inputs["tool_mask"])[rows]
    assert live["advantages"].tolist() == [1.0, -1.0] and float(factor) == 0.5
    assert live["prompt_mask"].shape[1] == inputs["prompt_mask"][rows].sum(dim=1).max()
    assert live["completion_ids"].shape[1] == mask.sum(dim=1).max()
    assert live["num_items_in_batch"] == inputs["num_items_in_batch"]
    unknown = {**inputs, "pixel_values": torch.zeros(4, 3)}
    assert live_rows(unknown, "grpo") == (unknown, 1.0)


@pytest.mark.parametrize(
    "grpo",
    [{"beta": 0.1}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}, {"top_entropy_quantile": 0.5}],
    ids=lambda grpo: next(iter(grpo)),
)
def test_where_dead_rows_count_they_stay(tmp_path, grpo):
    recipe = config.load("quickstart", [f"output_dir={tmp_path}"])
    assert add_nothing(grpo_config(recipe), False) and not add_nothing(grpo_config(recipe), True)
    assert not add_nothing(grpo_config(dataclasses.replace(recipe, grpo={**recipe.grpo, **grpo})), False)


def test_equal_rewards_have_advantage_zero():
    """TRL's own arithmetic on a group of equal rewards; without the rounding 37% of these means are off."""
    import torch

    for reward in np.random.default_rng(0).uniform(-1, 1, 500).astype(np.float32):
        for size in (2, 3, 7, 8, 12, 16):
            group = torch.tensor(exact_in_groups(np.full(size, reward)), dtype=torch.float32)[None]
            assert not (group - torch.nanmean(group, dim=1, keepdim=True)).any()
    assert np.abs(exact_in_groups(np.array([0.1, 1 / 3])) - [0.1, 1 / 3]).max() < 5e-7


def test_a_mixture_of_experts_reads_whole_batches(tiny_model, tmp_path):
    """Its router's loss is over all tokens: leaving any out, or reading them apart, would change it."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config_ = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    MixtralForCausalLM(config_).save_pretrained(tmp_path / "experts")
    tokenizer.save_pretrained(tmp_path / "experts")
    trainer = trainer_for(tmp_path / "experts", tmp_path / "run")
    assert trainer.aux_loss_enabled and not trainer.skips_dead_rows and not trainer.shares_prompts
    inputs = batch([1.0, 0.0, -1.0, 0.0])
    for name in ("prompt_ids", "prompt_mask"):
        inputs[name] = inputs[name][[0, 0, 1, 1]]
    assert trainer.compute_loss(trainer.model, inputs).isfinite()
