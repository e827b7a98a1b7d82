"""The loss computes the probabilities with which completions are sampled, also for models with absolute positions."""

import shutil

import pytest
from test_live_rows import trainer_for

from rec_r1 import cli
from rec_r1.checks.policy_check import NOT_COMPUTED_BY_TRL
from rec_r1.training.positions import NEEDED_BY, give_positions
from rec_r1.training.shared_prompts import SharedPrompts

PROMPTS = [[5, 9, 12, 44], [7, 31, 8, 90, 17, 22, 60, 61, 33, 3], [7, 31, 8, 90, 17, 22, 60, 61, 33, 3], [5, 9, 12, 44]]
COMPLETIONS = [[20, 21, 22], [50, 51, 52, 53], [66, 67], [70, 71, 72, 73]]
SMALL = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "num_experts": 4, "num_experts_per_tok": 2, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip
OF_TYPE = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "attention_heads": 4, "ffn_dim": 64, "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
}


def tiny(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **OF_TYPE.get(kind, {})}))
    made = made.eval().float()
    for weights in made.parameters():
        weights.data += 0.05 * torch.randn_like(weights)
    return made


def alone(model):
    """The log-probabilities of each completion after its prompt, from the logits of this one sequence."""
    import torch

    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        rows = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        found += [float(row[token]) for row, token in zip(rows, completion, strict=True)]
    return found


def in_a_batch(model, share):
    """The same as TRL's loss computes them: prompts padded on the left, completions on the right."""
    import torch

    longest, most = max(map(len, PROMPTS)), max(map(len, COMPLETIONS))
    pairs = list(zip(PROMPTS, COMPLETIONS, strict=True))
    ids = torch.tensor([[0] * (longest - len(p)) + p + c + [0] * (most - len(c)) for p, c in pairs])
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :longest] = -100
    called = SharedPrompts(model, longest) if share else model
    with torch.no_grad():
        rows = called(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -most:]
    return [value for row, (_, c) in zip(rows.tolist(), pairs, strict=True) for value in row[: len(c)]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*NEEDED_BY, "llama", "opt", "bloom"])
def test_padding_changes_no_probability(kind):
    from trl.trainer.utils import add_fused_lm_head

    model = tiny(kind)
    expected = alone(model)
    add_fused_lm_head(model, temperature=1.0)
    without = in_a_batch(model, False)
    give_positions(model)
    assert in_a_batch(model, False) == pytest.approx(expected, abs=1e-5)
    if kind != "openai-gpt":  # It keeps no cache, so its prompts are not shared.
        assert in_a_batch(model, True) == pytest.approx(expected, abs=1e-5)
    assert (without != pytest.approx(expected, abs=1e-3)) == (kind in NEEDED_BY)


@pytest.mark.slow
@pytest.mark.parametrize("grpo", [{}, {"beta": 0.1}], ids=["policy", "with a reference"])
def test_the_loss_of_a_policy_with_absolute_positions(tmp_path, tiny_model, grpo):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2048, "initializer_range": 0.3}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes |= {"vocab_size": 400, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    trainer = trainer_for(folder, tmp_path / "run", **grpo)

    def loss(padding):
        row = torch.tensor([[5, 9, 12, 44]])
        inputs = {
            "prompt_ids": torch.nn.functional.pad(row, (padding, 0)),
            "prompt_mask": torch.nn.functional.pad(torch.ones_like(row), (padding, 0)),
            "completion_ids": torch.tensor([[20, 21, 22]]), "completion_mask": torch.ones((1, 3), dtype=torch.long),
            "advantages": torch.tensor([1.0]), "num_items_in_batch": torch.tensor(3),
            "old_per_token_logps": torch.tensor([[-5.0, -5.5, -6.0]]),
        }  # fmt: skip
        if grpo:
            inputs["ref_per_token_logps"] = torch.tensor([[-5.0, -5.1, -5.2]])
        return float(trainer.compute_loss(trainer.model, inputs).detach())

    assert loss(7) == pytest.approx(loss(0), abs=1e-5)
    if grpo:
        hooks = trainer.accelerator.unwrap_model(trainer.ref_model)._forward_pre_hooks
        assert len(hooks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOT_COMPUTED_BY_TRL)
def test_a_model_whose_probabilities_trl_does_not_compute_is_refused(kind, tiny_model, tmp_path, capsys):
    from transformers import AutoConfig

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    AutoConfig.for_model(kind, **SMALL).save_pretrained(folder)
    assert cli.main(["check", "quickstart", f"model.name={folder}", "lora=null"]) == 2
    assert f"({kind})" in capsys.readouterr().err
