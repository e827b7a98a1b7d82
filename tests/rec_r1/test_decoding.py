"""Completions that share their prompt's cache, and end where their answer does, are those of one plain call."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_r1 import config, models
from rec_r1.config import FormatConfig, ModelConfig
from rec_r1.generation import generate, generation_config, sampling_of
from rec_r1.generation.decoding import Ends, can_share, decode
from rec_r1.generation.rollouts import rollout_function, stop_for_vllm
from rec_r1.prompts import ENDS, Format, end_of


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


@pytest.mark.slow
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
        how.stop_strings = [last]
        for share in (False, True):
            ended = decode(model, tokenizer, prompts, counts, how, None, share)
            assert all(two.ids[: len(one.ids)] == one.ids for one, two in zip(ended, whole, strict=True))
            assert ended[0].ended and last in tokenizer.decode(ended[0].ids)
            assert all(last not in tokenizer.decode(one.ids[:-1]) for one in ended)


READ_PROMPTS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.5, 1.3, 3.0]),
        "encoder_repetition_penalty": st.sampled_from([0.5, 3.0]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "min_length": st.integers(1, 9),
        "num_beams": st.just(2),
    },
)


@pytest.mark.slow
@given(examples, prompts_, READ_PROMPTS, st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_completion_does_not_depend_on_the_prompts_beside_it(policy, head, prompts, options, share):
    """Penalties read the prompt, and would read the padding of its batch, which is often the end-of-sequence token."""
    from transformers import GenerationConfig

    model, tokenizer = policy
    prompts = [head + prompt for prompt in prompts]
    how = GenerationConfig(
        **options, max_new_tokens=8, do_sample=False, disable_compile=True,
        pad_token_id=tokenizer.eos_token_id, eos_token_id=[tokenizer.eos_token_id],
    )  # fmt: skip
    found = decode(model, tokenizer, prompts, [1] * len(prompts), how, share=share and can_share(options))
    assert found == [decode(model, tokenizer, [ids], [1], how, share=False)[0] for ids in prompts]


def test_draws_follow_the_model_s_distribution(policy, tiny_model):
    import torch

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "cut"),
    [
        ("line", "red cat\nblue dog", "red cat\n"),
        ("line", "\n- \nred cat\nblue", "\n- \nred cat\n"),
        ("line", "red cat", None),
        ("first line", "\nred cat", "\n"),
        ("numbers", "The order:\n3, 1, 2\nand 4", "The order:\n3, 1, 2\n"),
        ("tag", '<answer>{"query": "a"}</answer> and more', '<answer>{"query": "a"}</answer>'),
        ("tag", '<answer>{"query": "a"}</answer', None),
        (None, "red cat\nblue dog", None),
    ],
)
def test_an_end_may_take_several_tokens(policy, name, text, cut):
    tokenizer = policy[1]
    ids = tokenizer(text)["input_ids"]
    found = Ends(tokenizer, [1], name).completion(ids)
    assert found.ended == (cut is not None) and tokenizer.decode(found.ids) == (cut or text)
    assert Ends(tokenizer, [ids[0]], name).completion(ids).ids == ids[:1]


def test_a_special_token_ends_no_line(policy):
    """As in the text that is scored, which has none."""
    tokenizer = copy.deepcopy(policy[1])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|word 1|>"]})
    text = "<|word 1|>\nred cat 2\nblue"
    ids = tokenizer(text)["input_ids"]
    for name, cut in (("line", text[:-4]), ("numbers", text[:-4]), ("first line", "<|word 1|>\n")):
        found = Ends(tokenizer, [1], name).completion(ids)
        assert found.ended and tokenizer.decode(found.ids) == cut
    assert tokenizer.decode(Ends(tokenizer, [1], None, ["<|word 1|>\n"]).completion(ids).ids) == "<|word 1|>\n"


PIECES = st.lists(
    st.sampled_from(
        ["\n", " ", "- ", "1. ", "3", ", 1", "red", " cat", "?", "\r", "<answer>", "</answer>", "…", "more: "]
    ),
    max_size=10,
)


@pytest.mark.slow
@given(PIECES, st.sampled_from(["replace", "expand", "ranking", "items", "edit"]), st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_is_left_out_behind_a_line_changes_no_action(pieces, action, keep):
    """Cut where it ends, a completion is parsed as the whole one."""
    prompt = "{query} {candidates}"
    format_ = Format(FormatConfig(answer="line", action=action, keep_query=keep, prompt=prompt))
    whole, end = "".join(pieces), end_of(format_.config)
    cut = next((whole[:n] for n in range(len(whole) + 1) if end and ENDS[end](whole[:n])), whole)
    assert format_.parse(cut, "q") == format_.parse(whole, "q")


@pytest.mark.parametrize(
    ("answer", "action", "expected"),
    [
        ("line", "replace", "line"), ("line", "expand", "line"), ("line", "ranking", "numbers"),
        ("line", "items", None), ("line", "edit", None), ("json", "items", "tag"), ("think_json", "replace", "tag"),
    ],
)  # fmt: skip
def test_a_format_says_where_its_answers_end(answer, action, expected):
    assert end_of(FormatConfig(answer=answer, action=action)) == expected


def test_layers_that_see_a_window_share_nothing(tmp_path):
    """Padding between what prompts share and the rest would use the window up."""
    import torch
    from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    window = MistralForCausalLM(
        MistralConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=6, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    how = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=[1])
    prompts = [[*range(10, 22), 30], [*range(10, 22), 40, 41, 42, 43, 44, 45]]
    tokenizer = _Pads()
    assert decode(window, tokenizer, prompts, [2, 1], how) == decode(
        window, tokenizer, prompts, [2, 1], how, share=False
    )


class _Pads:
    """What `decode` needs of a tokenizer."""

    def pad(self, batch, return_tensors):
        import torch
        from transformers import BatchEncoding

        rows = batch["input_ids"]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long()})


def test_options_that_mean_something_else_in_segments_are_not_shared():
    assert can_share({"max_new_tokens": 5, "do_sample": True, "temperature": 1.0, "cache_implementation": None})
    for option in ({"min_new_tokens": 2}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert not can_share({"max_new_tokens": 5, **option})


def test_rollouts_are_what_trl_asks_for(policy, tiny_model):
    import torch
    from accelerate import Accelerator

    model, tokenizer = policy
    recipe = recipe_for(tiny_model, "grpo.max_completion_length=6")
    trainer = SimpleNamespace(
        model_wrapped=model, accelerator=Accelerator(cpu=True), processing_class=tokenizer,
        args=SimpleNamespace(ds3_gather_for_generation=True, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    asked = ["cat dog"] * 40 + ["face"] + ["cat dog"] * 7
    torch.manual_seed(0)
    newline = tokenizer("\n")["input_ids"][-1]
    hook = model.get_output_embeddings().register_forward_hook(lambda module, given, out: _likelier(out, newline))
    out = rollout_function(recipe)(asked, trainer)
    hook.remove()
    assert out["prompt_ids"] == [tokenizer(prompt)["input_ids"] for prompt in asked] and out["logprobs"] is None
    for ids, mask in zip(out["completion_ids"], out["env_mask"], strict=True):
        assert len(ids) == len(mask) and sum(mask) <= 6
        if 0 in mask:  # it ended at its line, and TRL sees an end of sequence
            assert mask == [1] * (len(mask) - 1) + [0] and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]).strip() and tokenizer.decode(ids[:-1]).endswith("\n")
    assert 5 < sum(0 in mask for mask in out["env_mask"]) < len(asked)


@pytest.mark.slow
def test_rollouts_are_drawn_without_dropout(tiny_model):
    """The policy that is measured and saved has none. At this temperature all completions of a prompt are equal."""
    import torch
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    recipe = recipe_for(tiny_model, "grpo.max_completion_length=6", "grpo.temperature=1e-6")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(models.load_policy(str(tiny_model), recipe.model, all_weights_train=True), lora).train()
    trainer = SimpleNamespace(
        model_wrapped=model, accelerator=Accelerator(cpu=True), processing_class=models.load_tokenizer(str(tiny_model)),
        args=SimpleNamespace(ds3_gather_for_generation=True, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    model.base_model.model.lm_head.eval()  # A module that does not train, of its own accord, stays so.
    modes = [module.training for module in model.modules()]
    out = rollout_function(recipe)(["cat dog"] * 8, trainer)
    assert len(set(map(tuple, out["completion_ids"]))) == 1
    assert [module.training for module in model.modules()] == modes and modes.count(False) >= 1


def _likelier(logits, token):
    logits = logits.clone()
    logits[..., token] += 4
    return logits


def test_vllm_is_told_the_end_that_a_string_can_say(policy, tiny_model):
    assert rollout_function(config.load("quickstart", ["grpo.use_vllm=true"])) is None
    tagged = ["format.answer=json", "grpo.use_vllm=true"]
    told = stop_for_vllm(config.load("quickstart", tagged), {"stop": "x", "seed": 1})
    assert told == {"stop": ["x", "</answer>"], "include_stop_str_in_output": True, "seed": 1}
    for more in (["format.answer=line"], ["speed.end_at_answer=false"], ["grpo.mask_truncated_completions=true"]):
        assert stop_for_vllm(config.load("quickstart", [*tagged, *more]), {}) == {}
    # The recipe's own strings end held-out answers, too, whatever the format's end is.
    own = recipe_for(tiny_model, "grpo.use_vllm=true", "grpo.generation_kwargs={stop: [a, e, i, o, u]}")
    for recipe in (own, dataclasses.replace(own, speed=config.SpeedConfig(end_at_answer=False))):
        texts = generate(*policy, ["cat dog", "face"], sampling_of(recipe), 2)
        assert all(not set(text[:-8]) & set("aeiou") for text in texts) and any(
            set(text) & set("aeiou") for text in texts
        )
