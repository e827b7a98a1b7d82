"""When stored completions are those that a policy would write: the hash of its files, the prompts and the sampling."""

import dataclasses

import pytest
from test_generation import PROMPTS, recipe_for, with_file

from rec_r1 import config, generation, models
from rec_r1.generation import sampling_of


def test_the_same_files_prompts_and_options_are_the_same_policy(tiny_model, tmp_path):
    made = recipe_for(tiny_model)
    base = generation.identity(made, str(tiny_model), None, PROMPTS, sampling_of(made))
    copy = with_file(tiny_model, tmp_path / "elsewhere", {})
    (copy / "README.md").write_text("x")
    (copy / "generation_config.json").write_bytes((tiny_model / "generation_config.json").read_bytes())
    assert generation.identity(made, str(copy), None, PROMPTS, sampling_of(made)) == base
    half = dataclasses.replace(made, model=config.ModelConfig(dtype="float16"))
    others = [
        (made, tiny_model, None, PROMPTS[:-1], sampling_of(made)),
        (made, tiny_model, copy, PROMPTS, sampling_of(made)),
        (made, tiny_model, None, PROMPTS, sampling_of(made, 2)),
        (made, tiny_model, None, PROMPTS, sampling_of(recipe_for(tiny_model, repetition_penalty=1.1))),
        (half, tiny_model, None, PROMPTS, sampling_of(made)),
    ]  # fmt: skip
    found = [generation.identity(r, str(source), weights, asked, how) for r, source, weights, asked, how in others]
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    found.append(generation.identity(made, str(copy), None, PROMPTS, sampling_of(made)))
    assert len({base, *found}) == 1 + len(found)


@pytest.mark.parametrize(("end", "same"), [("line", False), ("numbers", False), ("first line", True), (None, True)])
def test_completions_that_a_special_token_may_have_ended_are_made_again(tiny_model, monkeypatch, end, same):
    made = recipe_for(tiny_model)
    how = dataclasses.replace(sampling_of(made), end=end)
    now = generation.identity(made, str(tiny_model), None, PROMPTS, how)
    monkeypatch.setattr(generation.decoding, "counts_words", lambda end: False)  # as before
    assert (generation.identity(made, str(tiny_model), None, PROMPTS, how) == now) == same


def test_another_machine_s_numeric_type_is_another_policy(tiny_model, monkeypatch):
    import torch

    with_lora = dataclasses.replace(recipe_for(tiny_model), lora={"r": 4})
    made = {
        dtype: dataclasses.replace(with_lora, model=config.ModelConfig(dtype=dtype))
        for dtype in ("auto", "bfloat16", "float32")
    }

    def of(dtype):
        return generation.identity(made[dtype], str(tiny_model), None, PROMPTS, sampling_of(made[dtype]))

    for automatic in ("bfloat16", "float32"):
        monkeypatch.setattr("rec_r1.models.fast_dtype", lambda name=automatic: getattr(torch, name))
        assert of("auto") == of(automatic)
    assert of("bfloat16") != of("float32")
    made = {dtype: dataclasses.replace(recipe, lora=None) for dtype, recipe in made.items()}
    assert of("auto") == of("float32") != of("bfloat16")


@pytest.mark.parametrize(
    ("lora", "dtype", "grpo", "gpu", "expected"),
    [
        (None, "auto", {}, False, "float32"),
        (None, "auto", {"bf16": True}, False, "float32"),
        (None, "bfloat16", {}, False, "bfloat16"),
        ({"r": 4}, "auto", {}, False, "bfloat16"),
        ({"r": 4}, "float32", {}, False, "float32"),
        (None, "auto", {}, True, "bfloat16"),
        (None, "auto", {"bf16": False}, True, "float32"),
        (None, "auto", {"fp16": True}, True, "float32"),
    ],
)
def test_weights_that_all_train_are_rounded_only_where_training_rounds_them(
    tiny_model, monkeypatch, lora, dtype, grpo, gpu, expected
):
    """Updates of 1e-6 are lost in the 8 significant bits of bfloat16."""
    import torch

    monkeypatch.setattr("rec_r1.models.fast_dtype", lambda: torch.bfloat16)
    recipe = config.Recipe(lora=lora, model=config.ModelConfig(dtype=dtype), grpo=grpo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    exact = not models.is_rounded(recipe)
    monkeypatch.undo()
    monkeypatch.setattr("rec_r1.models.fast_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr("rec_r1.models.is_rounded", lambda _: not exact)
    policy = models.load_policy_for_evaluation(str(tiny_model), recipe, None)
    assert str(policy.dtype) == f"torch.{expected}"


@pytest.mark.parametrize(("samples", "same"), [(1, True), (2, False)])
def test_the_batch_size_decides_what_is_drawn_and_no_greedy_answer(tiny_model, samples, same):
    made = recipe_for(tiny_model)
    other = dataclasses.replace(made, evaluation=dataclasses.replace(made.evaluation, batch_size=3))
    one, two = (generation.identity(r, str(tiny_model), None, PROMPTS, sampling_of(r, samples)) for r in (made, other))
    assert (one == two) == same
