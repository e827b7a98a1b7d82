"""What the rules about settings of GRPO say about TRL, PEFT and transformers."""

import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_live_rows import batch, gradient, trainer_for

from rec_r1.checks import grpo_rules


@pytest.mark.slow
def test_the_trainer_refuses_a_synchronised_reference_with_lora(tiny_model, tmp_path):
    """The reason for a rule: without it the weights are loaded first, and the error is no UserError."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.1, sync_ref_model=True, report_to=[])
    rows = Dataset.from_list([{"prompt": "face"}] * 8)
    with pytest.raises(NotImplementedError, match="sync_ref_model"):
        GRPOTrainer(str(tiny_model), lambda completions, **_: [0.0], args, rows, peft_config=LoraConfig(r=2))


@pytest.mark.slow
def test_cispo_multiplies_the_loss_by_epsilon_high(tiny_model, tmp_path):
    import torch

    advantages = [1.0, -1.0, 0.5, -0.5]
    default, wide = (
        gradient(trainer_for(tiny_model, tmp_path / name, loss_type="cispo", **more), batch(advantages), False)[1]
        for name, more in (("default", {}), ("wide", {"epsilon_high": 5.0}))
    )
    assert wide.abs().max() > 1e-4 and torch.allclose(default, 0.2 * wide, atol=1e-7)


@pytest.mark.slow
def test_the_vllm_correction_multiplies_the_loss(tiny_model, tmp_path):
    import torch

    trainer = trainer_for(tiny_model, tmp_path)
    inputs = batch([1.0, -1.0, 0.5, -0.5])
    _, plain = gradient(trainer, inputs, False)
    trainer.use_vllm = True
    _, weighted = gradient(trainer, inputs | {"importance_sampling_ratio": torch.full((4, 1), 0.105)}, False)
    assert trainer.vllm_importance_sampling_correction and plain.abs().max() > 1e-4
    assert torch.allclose(weighted, 0.105 * plain, atol=1e-7)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.floats(0.1, 0.99), st.integers(0, 29))
def test_the_ratio_of_a_token_is_the_kept_probability(logits, top_p, place):
    """With transformers' nucleus: the trainer's probability of a kept token over that among the kept ones."""
    import torch
    from transformers import TopPLogitsWarper

    scores = torch.tensor([logits], dtype=torch.float64)
    kept = TopPLogitsWarper(top_p)(None, scores)
    whole, among = scores.log_softmax(-1)[0], kept.log_softmax(-1)[0]
    tokens = [i for i in range(len(logits)) if math.isfinite(float(kept[0, i]))]
    token = tokens[place % len(tokens)]
    ratio = math.exp(whole[token] - among[token])
    mass = sum(math.exp(whole[i]) for i in tokens)
    assert ratio == pytest.approx(mass) and top_p - 1e-9 <= ratio <= 1 + 1e-9


def test_the_lines_of_trl_that_the_rules_rest_on():
    """A change of TRL in these lines is a reason to read the rules again."""
    from trl import GRPOTrainer
    from trl.generation import vllm_generation

    source = inspect.getsource(GRPOTrainer)
    for line in (
        "advantages = advantages / (std_rewards + 1e-4)",
        "per_token_logps_diff = (old_per_token_logps - sampling_per_token_logps) * mask",
        "per_sequence_logps_diff = per_token_logps_diff.sum(dim=-1, keepdim=True)",
        'per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]',
        "is_truncated = torch.tensor([ids[-1] not in eos_and_pad for ids in completion_ids_list], device=device)",
        "if self.args.gradient_accumulation_steps % generate_every != 0 or (",
        "clamped_ratios = torch.clamp(coef_1, max=self.epsilon_high).detach()",
        "loss = (per_token_loss * mask).sum() / (per_token_loss.size(0) * self.max_completion_length)",
        "log_is_ratio = torch.clamp(torch.log(importance_sampling_ratio), lower_clamp, 20.0)",
    ):
        assert line in source, line
    assert 'logprobs_mode="processed_logprobs"' in inspect.getsource(vllm_generation)


@pytest.mark.parametrize("init", [True, False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica"])
def test_which_initialisations_of_lora_change_the_model_without_its_adapter(init):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 8))
    x = torch.randn(5, 12)
    before = base(x).detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=init))
    with model.disable_adapter():
        same = torch.allclose(model(x), before, atol=1e-5)
    assert same != (isinstance(init, str) and init.startswith(grpo_rules.CHANGE_THE_BASE))


def test_which_schedulers_ignore_the_warmup():
    import torch
    from transformers import SchedulerType, get_scheduler

    more = {"cosine_with_min_lr": {"min_lr": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1},
            "warmup_stable_decay": {"num_decay_steps": 2}}  # fmt: skip
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        get_scheduler(kind, optimizer, 5, 10, more.get(kind.value))
        starts_at_its_rate = optimizer.param_groups[0]["lr"] == 1.0
        assert starts_at_its_rate == (kind.value in grpo_rules.IGNORE_WARMUP), kind
