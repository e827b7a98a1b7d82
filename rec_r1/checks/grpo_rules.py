"""Rules about settings of GRPO that cannot work, or that silently weaken the gradient.

:func:`impossible` finds settings that TRL refuses only after the weights are loaded. Each function in RULES finds
settings that TRL accepts, and yields one line for each: the key, its value, what happens, and what to set. The rules
were read in the code of TRL 1.16, PEFT 0.21 and transformers 5.24. The table in rec_r1/README.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from rec_r1.checks import reward_probe
from rec_r1.checks.steps import Steps
from rec_r1.config import Recipe
from rec_r1.environment import rewards_of
from rec_r1.generation import generation_kwargs, sampling_of_rollouts
from rec_r1.trl_options import steps_a_generation

LEAST_GROUP = 4  # Smaller groups are warned of.
SUCCESS = 0.2  # The share of completions that earn something, in the example of a sparse reward.
LORA_RATES = (5e-6, 1e-3)  # The usual learning rates of AdamW with LoRA.
FULL_RATES = (1e-7, 1e-5)  # The usual learning rates of AdamW for all weights.
LEAST_TEMPERATURE = 0.3
MOST_EPOCHS = 100
SMALL_SHARE = 0.2  # A reward is small if its values differ by at most this share of the largest difference.
STD_OFFSET = 1e-4  # TRL divides by the standard deviation plus this number.
LEAST_THINKING = 256  # The tokens of a think_json completion: half of the limit of Rec-R1 (arXiv:2503.24289).
MANY_TOKENS = 128  # More tokens than a completion of one line has.
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # The losses that clip the importance ratio by epsilon.
SUMS_TOKENS = ("bnpo", "dr_grpo", "dapo", "cispo")  # The losses that sum over tokens, and not within completions.
# The initialisations of LoRA that change the model's own weights, so that it differs from the untrained model once the
# adapter is disabled. The number after pissa_niter_ is any.
CHANGE_THE_BASE = ("pissa", "olora")
IGNORE_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # The schedulers that take no warmup.


class Settings(NamedTuple):
    """What the rules read.

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    steps: the number of steps of its training.
    sampling: the options with which rollouts are drawn, those of `generation_kwargs` included.
    """

    recipe: Recipe
    args: Any
    steps: Steps
    sampling: Mapping[str, Any]


Rule = Callable[[Settings], Iterator[str]]


def weak(recipe: Recipe, args: Any, steps: Steps) -> Iterator[str]:
    """One line for each setting that is allowed, but weakens the gradient or has no effect.

    recipe: the recipe, which has passed `check_recipe`.
    args: its `trl.GRPOConfig`.
    steps: the number of steps of its training.
    """
    settings = Settings(recipe, args, steps, sampling_of_rollouts(recipe).options)
    for rule in RULES:
        yield from rule(settings)


def impossible(recipe: Recipe, args: Any) -> Iterator[str]:
    """One line for each combination of settings that the trainer refuses after the weights are loaded.

    recipe: the recipe.
    args: its `trl.GRPOConfig`.
    """
    if args.sync_ref_model and args.beta == 0:
        yield (
            "grpo.sync_ref_model: true, but grpo.beta is 0, so there is no reference model: set "
            "grpo.sync_ref_model=false, or grpo.beta above 0"
        )
    elif args.sync_ref_model and recipe.lora is not None:
        yield (
            "grpo.sync_ref_model: true, but with lora the reference is the model without its adapter, so there is no "
            "second model to update: set grpo.sync_ref_model=false, or lora=null"
        )
    if args.loss_type == "vespo" and _corrects(args) and args.vllm_importance_sampling_mode.startswith("sequence"):
        yield (
            f"grpo.vllm_importance_sampling_mode: {args.vllm_importance_sampling_mode}: grpo.loss_type=vespo needs one "
            "ratio for each token: set grpo.vllm_importance_sampling_mode=token_truncate"
        )


def _corrects(args: Any) -> bool:
    """Whether the loss is multiplied by the ratio of the trainer's probabilities to vLLM's."""
    return bool(args.use_vllm and args.vllm_importance_sampling_correction)


def _name(settings: Settings, option: str) -> str:
    """The full name of an option of generation, as the recipe sets it."""
    inner = option in generation_kwargs(settings.recipe)
    return f"grpo.generation_kwargs.{option}" if inner else f"grpo.{option}"


def small_groups(settings: Settings) -> Iterator[str]:
    """A group whose completions all earn the same is dead. With a reward that a share p of completions earns, that is
    p^G + (1 - p)^G of all groups. (Groups without a gradient: DAPO, arXiv:2503.14476, section 3.2.)"""
    size = settings.args.num_generations
    if size < LEAST_GROUP:
        dead, usual = (SUCCESS**g + (1 - SUCCESS) ** g for g in (size, 8))
        yield (
            f"grpo.num_generations: {size}: of a reward that one completion in five earns, {dead:.0%} of the groups "
            f"are dead, and {usual:.0%} with 8 completions: set grpo.num_generations=8"
        )


def truncated_sampling(settings: Settings) -> Iterator[str]:
    """vLLM's log-probabilities are those after all processors, renormalised over the tokens that are kept. The trainer
    computes its own over the whole vocabulary. Their ratio is the probability of the kept tokens, which TRL multiplies
    over the tokens of a completion in the sequence modes. (TRL 1.16, `logprobs_mode="processed_logprobs"` and
    `vllm_importance_sampling_ratio`; huggingface/trl issue 6789.)"""
    args, sampling = settings.args, settings.sampling
    if not _corrects(args):
        return
    whole = args.loss_type == "vespo" or args.vllm_importance_sampling_mode.startswith("sequence")
    weight = "the product of this over its tokens" if whole else "this for each token"
    for option, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        if sampling.get(option) not in (None, off):
            yield (
                f"{_name(settings, option)}: {sampling[option]}: vLLM's probabilities are those among the kept tokens, "
                "and the trainer's those in the whole vocabulary; their ratio is the kept probability, and "
                f"grpo.vllm_importance_sampling_correction multiplies the loss of a completion by {weight}: set "
                f"{_name(settings, option)}={off}"
            )


def penalized_sampling(settings: Settings) -> Iterator[str]:
    """vLLM's log-probabilities include the repetition penalty, and the trainer's do not, as in `truncated_sampling`."""
    penalty = settings.sampling.get("repetition_penalty")
    if _corrects(settings.args) and penalty not in (None, 1):
        yield (
            f"{_name(settings, 'repetition_penalty')}: {penalty}: vLLM's probabilities include the penalty, and the "
            "trainer's do not, so grpo.vllm_importance_sampling_correction weights completions by the penalty, or "
            f"drops them: set {_name(settings, 'repetition_penalty')}=1, and evaluation.repetition_penalty if needed"
        )


def scaled_small_rewards(settings: Settings) -> Iterator[str]:
    """With scale_rewards=group, the advantage is (reward - mean) / (standard deviation + 1e-4) in each group. A small
    reward that alone differs gets the same advantages as a large one; rewards that all differ by little get smaller
    ones. (TRL 1.16, `advantages / (std_rewards + 1e-4)`; bias of the division: Dr. GRPO, arXiv:2503.20783.)"""
    if settings.args.scale_rewards != "group":
        return
    total = rewards_of(settings.recipe)
    values = total.components(reward_probe.outcome(total.reads_raw))
    spreads = {
        name: abs(weight) * (_spread(values[name][:-1]) or _spread(values[name]))  # The last completion is malformed.
        for name, weight in zip(total.names, total.weights, strict=True)
    }
    largest = max(spreads.values())
    if largest < 100 * STD_OFFSET:
        yield (
            f"rewards: they differ by at most {largest:.2g}, and TRL adds {STD_OFFSET} to the standard deviation by "
            "which it divides, so advantages are too small: give the rewards weights of about 1"
        )
    for name, spread in spreads.items():
        if name not in total.ranking_names and 0 < spread <= SMALL_SHARE * largest:
            yield (
                f"rewards.{name}: it differs by at most {spread:.2g}, the largest reward by {largest:.2g}: in a group "
                "that differs in nothing else, grpo.scale_rewards=group makes it count as much as the largest: set "
                f"grpo.scale_rewards=batch, or leave {name} out"
            )


def _spread(values: np.ndarray) -> float:
    """The largest difference between the values that are no NaN. 0 = there is none."""
    known = values[~np.isnan(values)]
    return float(np.ptp(known)) if len(known) else 0.0


def masked_completions(settings: Settings) -> Iterator[str]:
    """mask_truncated_completions leaves out of the loss every completion that does not end with an end-of-sequence
    token. (TRL 1.16, `is_truncated`; DAPO, arXiv:2503.14476, overlong filtering.)"""
    recipe, length = settings.recipe, settings.sampling["max_new_tokens"]
    if not settings.args.mask_truncated_completions:
        return
    answer = recipe.format.answer
    if answer == "think_json" and length < LEAST_THINKING:
        yield (
            f"grpo.max_completion_length: {length}: few think_json completions end before it, and "
            "grpo.mask_truncated_completions leaves all others out of the loss: set grpo.max_completion_length=512, or "
            "grpo.mask_truncated_completions=false"
        )
    runs_on = settings.args.use_vllm or not recipe.speed.end_at_answer
    if answer == "line" and runs_on and not recipe.format.chat:
        why = "with grpo.use_vllm" if settings.args.use_vllm else "with speed.end_at_answer=false"
        yield (
            f"grpo.mask_truncated_completions: true: {why} a completion does not end with its line, and without a chat "
            "template a model seldom ends it itself, so nearly all completions are left out of the loss: set "
            "grpo.mask_truncated_completions=false"
        )


def learning_rate(settings: Settings) -> Iterator[str]:
    """The best rate with LoRA is about ten times that for all weights. (LoRA Without Regret, Schulman et al. 2025, and
    TRL's page of that name. For all weights, TRL's default, Rec-R1 and DAPO have 1e-6.)"""
    args = settings.args
    if not args.optim.value.startswith("adamw"):
        return
    rate, with_lora = args.learning_rate, settings.recipe.lora is not None
    least, most = LORA_RATES if with_lora else FULL_RATES
    trained, usual = ("a LoRA adapter", "1.0e-5") if with_lora else ("all weights", "1.0e-6")
    if not least <= rate <= most:
        happens = f"hardly changes {trained}" if rate < least else f"is likely to make {trained} diverge"
        yield (
            f"grpo.learning_rate: {rate:g}: it {happens}; usual are {least:g} to {most:g}: set a rate in this range, "
            f"such as grpo.learning_rate={usual}"
        )


def repeated_passes(settings: Settings) -> Iterator[str]:
    """Gradients are accumulated over gradient_accumulation_steps passes. If all passes over the completions of one
    generation are in one step, each iteration adds the same gradient again. (TRL 1.16, `generate_every`.)"""
    args = settings.args
    passes = args.steps_per_generation * args.num_iterations
    if args.num_iterations > 1 and args.gradient_accumulation_steps % passes == 0:
        smaller = f"grpo.gradient_accumulation_steps={args.steps_per_generation}"
        if settings.recipe.prompts_per_step is not None:
            smaller = f"prompts_per_step={args.generation_batch_size // args.num_generations}"
        yield (
            f"grpo.num_iterations: {args.num_iterations}: all its passes are in one optimizer step, so each adds the "
            f"same gradient again: set grpo.num_iterations=1, or {smaller}"
        )


def clipping(settings: Settings) -> Iterator[str]:
    """Steps after the first use completions of an earlier policy, and the clipped ratio keeps the policy near that one.
    cispo clips the ratio at epsilon_high itself, on policy too. (PPO, arXiv:1707.06347: 0.2; GSPO, arXiv:2507.18071,
    section 5.1: 3e-4 for ratios of sequences; ScaleRL, arXiv:2510.13786: 5 for cispo. TRL 1.16, `coef_2` and
    `clamped_ratios`.)"""
    args = settings.args
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    key = "grpo.epsilon" if args.epsilon_high is None else "grpo.epsilon_high"
    if args.loss_type == "cispo" and high < 1:
        yield (
            f"{key}: {high:g}: grpo.loss_type=cispo caps the importance ratio at this number, and not at 1 plus it, so "
            f"the loss of every token is multiplied by {high:g}: set grpo.epsilon_high=5.0"
        )
    updates = steps_a_generation(args)
    if args.loss_type not in CLIPPED or updates == 1:
        return
    sequence = args.importance_sampling_level == "sequence"
    most, usual = (0.01, "3.0e-4") if sequence else (1, "0.2")
    widest = max(args.epsilon, high)
    if widest >= most:
        ratio = "mean ratio of a completion" if sequence else "ratio of a token"
        yield (
            f"{'grpo.epsilon' if widest == args.epsilon else key}: {widest:g}: {updates} steps use the completions of "
            f"one generation, and the {ratio} seldom differs so much from 1 that it is clipped: set it to {usual}"
        )


def reference(settings: Settings) -> Iterator[str]:
    """With LoRA, the reference of the KL term is the model with its adapter disabled. That is the untrained model only
    if the model's own weights are as they were. (TRL 1.16, `use_adapter`; PEFT 0.21, `disable_adapter_layers`,
    `pissa_init`, `olora_init`.)"""
    lora, beta = settings.recipe.lora, settings.args.beta
    if lora is None or beta == 0:
        return
    init, bias = lora.get("init_lora_weights", True), lora.get("bias", "none")
    if isinstance(init, str) and init.startswith(CHANGE_THE_BASE):
        yield (
            f"lora.init_lora_weights: {init}: it changes the model's own weights, so the model without its adapter, "
            f"which is the reference of the KL term (grpo.beta={beta:g}), is not the untrained one: set "
            "lora.init_lora_weights=true, or grpo.beta=0"
        )
    if bias != "none":
        yield (
            f"lora.bias: {bias}: trained biases stay when the adapter is disabled, so the reference of the KL term "
            f"(grpo.beta={beta:g}) changes with the policy: set lora.bias=none, or grpo.beta=0"
        )


def dropout(settings: Settings) -> Iterator[str]:
    """The log-probabilities of an importance ratio come from two passes with different dropout. (TRL 1.16,
    `old_per_token_logps`, computed in train mode, and `disable_dropout`.)"""
    args, rate = settings.args, (settings.recipe.lora or {}).get("lora_dropout", 0)
    if rate > 0 and not args.disable_dropout and (_corrects(args) or steps_a_generation(args) > 1):
        yield (
            f"lora.lora_dropout: {rate:g}: the two passes whose probabilities are compared drop different weights, so "
            "the importance ratio is noise even where the policy has not changed: set lora.lora_dropout=0, or "
            "grpo.disable_dropout=true"
        )


def loss_types(settings: Settings) -> Iterator[str]:
    """Losses that need another setting. (TRL 1.16, documentation of `loss_type` and warnings of GRPOTrainer; Dr. GRPO,
    arXiv:2503.20783; GSPO, arXiv:2507.18071; LUSPO, arXiv:2602.05261; VESPO, arXiv:2602.10693.)"""
    args, length = settings.args, settings.args.max_completion_length
    loss, level = args.loss_type, args.importance_sampling_level
    if loss == "dr_grpo" and args.scale_rewards != "none":
        yield (
            f"grpo.scale_rewards: {args.scale_rewards}: grpo.loss_type=dr_grpo is meant to remove the bias of this "
            "division, by which prompts of nearly equal rewards weigh more: set grpo.scale_rewards=none"
        )
    if loss == "dr_grpo" and settings.recipe.format.answer == "line" and length >= MANY_TOKENS:
        yield (
            f"grpo.max_completion_length: {length}: grpo.loss_type=dr_grpo divides the loss of a completion by it, "
            "whatever the completion's length, and one line is far shorter: set it to about the tokens of a line, such "
            "as 32, or grpo.loss_type=dapo"
        )
    if level == "sequence" and loss in SUMS_TOKENS:
        yield (
            f"grpo.importance_sampling_level: sequence: grpo.loss_type={loss} sums over tokens, so a completion weighs "
            "by its length, and not once: set grpo.loss_type=grpo"
        )
    needed = {"luspo": "sequence", "vespo": "token"}.get(loss, level)
    if level != needed:
        yield (
            f"grpo.importance_sampling_level: {level}: grpo.loss_type={loss} is defined with {needed}: set "
            f"grpo.importance_sampling_level={needed}"
        )


def temperature(settings: Settings) -> Iterator[str]:
    """Completions of a low temperature are nearly equal, and so are their rewards. The trainer divides logits by
    grpo.temperature alone, and never by the one in generation_kwargs. (TRL 1.16, `self.temperature`.)"""
    drawn, assumed = settings.sampling["temperature"], settings.args.temperature
    if drawn < LEAST_TEMPERATURE:
        yield (
            f"{_name(settings, 'temperature')}: {drawn:g}: the completions of a prompt are nearly equal, so most "
            "groups are dead: set grpo.temperature to 0.6 or more"
        )
    if drawn != assumed:
        yield (
            f"grpo.generation_kwargs.temperature: {drawn:g}: completions are drawn with it, and the loss takes "
            f"grpo.temperature={assumed:g} for their probabilities: set grpo.temperature={drawn:g} instead"
        )


def epochs(settings: Settings) -> Iterator[str]:
    """max_steps decides alone where it is set. (transformers 5.24, `Trainer.set_initial_training_values`.)"""
    args, queries = settings.args, settings.steps.queries
    epoch, total = settings.steps.epoch, settings.steps.total
    key = "grpo.max_steps" if args.max_steps > 0 else "grpo.num_train_epochs"
    value = f"{args.max_steps if args.max_steps > 0 else args.num_train_epochs:g}"
    if total < epoch and settings.recipe.speed.explore < 1:
        yield (
            f"{key}: {value}: training ends within its first epoch, which has {epoch} steps, so some of the {queries} "
            "training queries are never asked, and speed.explore, which begins with the second epoch, has no effect: "
            f"set grpo.max_steps={epoch} or more, or speed.explore=1"
        )
    if total > MOST_EPOCHS * epoch:
        yield (
            f"{key}: {value}: each of the {queries} training queries is asked about {total / epoch:.0f} times, so "
            f"the policy may memorise them: set grpo.max_steps={MOST_EPOCHS * epoch} or less, or take more queries"
        )


def warmup(settings: Settings) -> Iterator[str]:
    """(transformers 5.24, `get_scheduler` and `TrainingArguments.get_warmup_steps`.)"""
    args, total = settings.args, settings.steps.total
    steps, schedule = args.get_warmup_steps(total), args.lr_scheduler_type.value
    if steps and schedule in IGNORE_WARMUP:
        yield (
            f"grpo.warmup_steps: {args.warmup_steps:g}: grpo.lr_scheduler_type={schedule} ignores it: set "
            "grpo.lr_scheduler_type=constant_with_warmup, or grpo.warmup_steps=0"
        )
    elif steps >= total:
        yield (
            f"grpo.warmup_steps: {args.warmup_steps:g}: the warmup takes all {total} steps, so training ends before "
            f"the learning rate is reached: set grpo.warmup_steps={total // 10}, or raise grpo.max_steps"
        )


RULES: tuple[Rule, ...] = (
    small_groups, truncated_sampling, penalized_sampling, temperature, scaled_small_rewards, masked_completions,
    learning_rate, warmup, epochs, repeated_passes, clipping, reference, dropout, loss_types,
)  # fmt: skip
