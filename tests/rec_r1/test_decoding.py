"""Completions that share their prompt's cache, and end where their answer does, are those of one plain call."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_r1 import config, models
from rec_r1.config import FormatConfig, ModelConfig
from rec_r1.decoding import Ends, can_share, decode
from rec_r1.generation import generation_config, sampling_of
from rec_r1.prompts import ends
from rec_r1.rollouts import rollout_function, stop_for_vllm


@pytest.fixture(scope="module")
def policy(tiny_model):
    tokenizer = models.load_tokenizer(str(tiny_model))
    return models.load_policy(str(tiny_model), ModelConfig(dtype="float32")).eval(), tokenizer


def recipe_for(tiny_model, *more):
    return config.load("quickstart", [f"model.name={tiny_model}", "model.dtype=float32", "lora=null", *more])


def how_to(policy, recipe, samples=1):
    return generation_config(sampling_of(recipe, samples), policy[1], policy[0].generation_config.eos_token_id)


prompts_ = st.lists(st.lists(st.integers(2, 250), min_size=1, max_size=12), min_size=1, max_size=5)
examples = st.sampled_from([[], [7, 8, 9], list(range(20, 50))])  # what every prompt begins with


@given(
    examples,
    prompts_,
    st.lists(st.integers(1, 3), min_size=5, max_size=5),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.5]),
)
@settings(max_examples=25, deadline=None)
def test_greedy_completions_are_those_of_one_plain_call(policy, tiny_model, head, prompts, copies, length, penalty):
    prompts = [head + prompt for prompt in prompts]
    more = [f"grpo.max_completion_length={length}"] + ([f"grpo.repetition_penalty={penalty}"] if penalty else [])
    how, model, tokenizer = how_to(policy, recipe_for(tiny_model, *more)), *policy
    counts = copies[: len(prompts)]
    whole = decode(model, tokenizer, prompts, counts, how, share=False)
    assert decode(model, tokenizer, prompts, counts, how, share=True) == whole
    assert len(whole) == sum(counts) and all(len(one.ids) <= length for one in whole)
    # What ends a completion cuts it there, and changes nothing before.
    last = tokenizer.decode(whole[0].ids[-1:])
    if "�" not in last and last.strip():
        for share in (False, True):
            ended = decode(model, tokenizer, prompts, counts, how, (last,), share)
            assert all(two.ids[: len(one.ids)] == one.ids for one, two in zip(ended, whole, strict=True))
            assert ended[0].ended and last in tokenizer.decode(ended[0].ids)
            assert all(last not in tokenizer.decode(one.ids[:-1]) for one in ended)


def test_draws_follow_the_model_s_distribution(policy, tiny_model):
    model, tokenizer = policy
    recipe = recipe_for(tiny_model, "grpo.max_completion_length=2", "grpo.temperature=0.3")
    how, prompt = how_to(policy, recipe, 2), tokenizer("the red heart")["input_ids"]
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / 0.3, dim=-1)
    torch.manual_seed(0)
    found = decode(model, tokenizer, [prompt], [4000], how, share=True)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=len(expected)) / 4000
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts - expected).abs() <= 5 * error + 1e-3).all()
    assert expected.max() > 2 / len(expected)  # else a uniform draw would pass, too


@pytest.mark.parametrize(
    ("ends_with", "text", "cut"),
    [
        ("\n", "red cat\nblue dog", "red cat\n"),
        ("\n", "red cat", None),
        ("</answer>", '<answer>{"query": "a"}</answer> and more', '<answer>{"query": "a"}</answer>'),
        ("</answer>", '<answer>{"query": "a"}</answer', None),
    ],
)
def test_an_end_may_take_several_tokens(policy, ends_with, text, cut):
    tokenizer = policy[1]
    ids = tokenizer(text)["input_ids"]
    found = Ends(tokenizer, [1], [ends_with]).completion(ids)
    assert found.ended == (cut is not None) and tokenizer.decode(found.ids) == (cut or text)
    assert Ends(tokenizer, [ids[0]], [ends_with]).completion(ids).ids == ids[:1]


@pytest.mark.parametrize(
    ("answer", "action", "expected"),
    [
        ("line", "replace", ("\n",)), ("line", "expand", ("\n",)), ("line", "ranking", ("\n",)), ("line", "items", ()),
        ("line", "edit", ()), ("json", "items", ("</answer>",)), ("think_json", "replace", ("</answer>",)),
    ],
)  # fmt: skip
def test_a_format_says_where_its_answers_end(answer, action, expected):
    assert ends(FormatConfig(answer=answer, action=action)) == expected


def test_options_that_mean_something_else_in_segments_are_not_shared():
    assert can_share({"max_new_tokens": 5, "do_sample": True, "temperature": 1.0, "cache_implementation": None})
    for option in ({"min_new_tokens": 2}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert not can_share({"max_new_tokens": 5, **option})


def test_rollouts_are_what_trl_asks_for(policy, tiny_model):
    model, tokenizer = policy
    recipe = recipe_for(tiny_model, "grpo.max_completion_length=6")
    trainer = SimpleNamespace(
        model_wrapped=model, accelerator=Accelerator(cpu=True), processing_class=tokenizer,
        args=SimpleNamespace(ds3_gather_for_generation=True, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    asked = ["cat dog", "cat dog", "cat dog", "face", "cat dog"]
    torch.manual_seed(0)
    out = rollout_function(recipe)(asked, trainer)
    assert out["prompt_ids"] == [tokenizer(prompt)["input_ids"] for prompt in asked] and out["logprobs"] is None
    for ids, mask in zip(out["completion_ids"], out["env_mask"], strict=True):
        assert len(ids) == len(mask) and sum(mask) <= 6
        if 0 in mask:  # it ended at its line, and TRL sees an end of sequence
            assert mask == [1] * (len(mask) - 1) + [0] and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]).count("\n") == 1


def test_vllm_is_told_the_ends():
    recipe = config.load("quickstart", ["grpo.use_vllm=true"])
    assert rollout_function(recipe) is None
    told = stop_for_vllm(recipe, {"stop": "x", "seed": 1})
    assert told == {"stop": ["x", "\n"], "include_stop_str_in_output": True, "seed": 1}
    assert stop_for_vllm(config.load("quickstart", ["speed.end_at_answer=false"]), {}) == {}
    assert stop_for_vllm(config.load("quickstart", ["grpo.mask_truncated_completions=true"]), {}) == {}
    assert json.dumps(told)
