"""The baseline RLOO: the update of its options is that of TRL's RLOOTrainer, and what it refuses."""

import json

import pytest

from rec_r1 import config
from rec_r1.baselines import rloo
from rec_r1.config import UserError
from rec_r1.trl_options import grpo_config

WORDS = ["red", "blue dog", "cat cat cat", "sun", "rain party", "face", "heart arrow button", "hand"]
EARNED = dict(zip(WORDS, [0.0, 0.5, 1.0, 0.25, 0.75, 0.5, 0.0, 0.125], strict=True))


def reward(completions, **_):
    return [EARNED[text] for text in completions]


def settings(tiny_model, out, *more) -> list[str]:
    return [
        f"model.name={tiny_model}", "model.dtype=float32", "lora=null", f"output_dir={out}", "grpo.max_steps=1",
        "prompts_per_step=null", "grpo.per_device_train_batch_size=8", "grpo.num_generations=4",
        "grpo.max_completion_length=8",
        "grpo.learning_rate=0.5", "grpo.lr_scheduler_type=constant", "grpo.save_strategy='no'",
        "grpo.disable_tqdm=true", "grpo.shuffle_dataset=false", *more,
    ]  # fmt: skip


def updated(trainer_class, model_folder, args, **more):
    """The change of all weights by one step of a trainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    data = Dataset.from_list([{"prompt": "party:"}, {"prompt": "smile face:"}])
    trainer = trainer_class(
        model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer, **more
    )
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in WORDS]
    if not more:
        asked = [tokenizer(text)["input_ids"] for text in ("party:", "smile face:") for _ in range(4)]
        trainer._generate = lambda prompts: (asked, ids, WORDS)
    trainer.train()
    return {name: weight.detach() - before[name] for name, weight in trainer.model.named_parameters()}


def ours(tiny_model, out, *more):
    """The change of all weights by one step of GRPOTrainer with the options of the baseline."""
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    recipe = rloo.recipe_of(config.load("quickstart", settings(tiny_model, out, *more)))

    def completions(prompts, trainer):
        return {
            "prompt_ids": [tokenizer(text)["input_ids"] for text in prompts],
            "completion_ids": [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in WORDS],
            "logprobs": None,
        }

    return recipe, updated(GRPOTrainer, tiny_model, grpo_config(recipe), rollout_func=completions)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [1000.0, 0.1])
def test_the_update_is_that_of_trl_s_rloo_trainer(tiny_model, tmp_path, clip):
    """With SGD the factor (G - 1) / G shows, with and without clipping. An optimizer like Adam divides it out."""
    import torch
    from trl import RLOOConfig, RLOOTrainer

    recipe, changed = ours(tiny_model, tmp_path / "ours", "grpo.optim=sgd", f"grpo.max_grad_norm={clip}")
    names = (
        "optim", "max_steps", "per_device_train_batch_size", "num_generations", "max_completion_length",
        "learning_rate", "lr_scheduler_type", "save_strategy", "shuffle_dataset", "disable_tqdm",
        "gradient_checkpointing",
    )  # fmt: skip
    options = {name: recipe.grpo[name] for name in names} | {"use_cpu": True, "bf16": False, "report_to": []}
    args = RLOOConfig(str(tmp_path / "theirs"), beta=0.0, max_grad_norm=clip, **options)
    expected = updated(RLOOTrainer, tiny_model, args)
    largest = max(float(one.abs().max()) for one in expected.values())
    assert largest > 1e-3
    for name, one in changed.items():
        # Weights near 1 are rounded to multiples of 6e-8.
        assert torch.allclose(one, 3 / 4 * expected[name], rtol=1e-3, atol=5e-7), name


def test_its_options_replace_those_of_the_training(tiny_model, tmp_path):
    more = ["grpo.loss_type=dapo", "baselines.rloo.learning_rate=0.125", "grpo.max_grad_norm=0.5"]
    recipe = rloo.recipe_of(config.load("quickstart", settings(tiny_model, tmp_path, *more)))
    assert recipe.output_dir == str(tmp_path / "baselines" / "rloo")
    assert recipe.grpo["learning_rate"] == 0.125 and recipe.grpo["num_generations"] == 4
    assert recipe.grpo["loss_type"] == "luspo" and recipe.grpo["max_grad_norm"] == 0.375
    args = grpo_config(recipe)
    assert args.scale_rewards == "none" and args.beta == 0 and json.dumps(recipe.grpo)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("grpo.num_iterations=2", "2 steps use the completions of one generation.*set baselines.rloo="),
        ("baselines.rloo.loss_type=dapo", r"baselines\.rloo\.loss_type is set by the toolkit"),
        ("baselines.rloo.lerning_rate=1", r"baselines\.rloo\.lerning_rate: GRPOConfig has no such option"),
        ("baselines.rloo.output_dir=x", r"baselines\.rloo\.output_dir is set by output_dir: remove it"),
    ],
)
def test_mistakes(tiny_model, tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        rloo.recipe_of(config.load("quickstart", settings(tiny_model, tmp_path, setting)))
