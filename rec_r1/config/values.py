"""Check the values of a recipe whose types are right, as far as that needs neither data nor a model."""

from __future__ import annotations

from collections.abc import Iterator

from rec_r1.config import typed
from rec_r1.config.sections import Recipe

MAX_INTEGER = 2**31 - 1  # The largest whole number in a recipe's own sections. No sensible count comes near it.

# Options of the trainer that the toolkit sets itself, and the setting of the recipe that each of them comes from.
SET_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "model_init_kwargs": "model.dtype and model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "eval_strategy": "evaluation.every_steps",
    "eval_steps": "evaluation.every_steps",
    "reward_weights": "rewards",
    "resume_from_checkpoint": "the option --resume",
    "eval_on_start": "evaluation.every_steps",
}

# Options of the trainer that count the batches of one process. They follow from prompts_per_step, where it is set.
FOLLOW_FROM_PROMPTS = ("gradient_accumulation_steps", "steps_per_generation")


def problems(recipe: Recipe) -> Iterator[str]:
    """One line for each wrong value that shows without data and without a model."""
    import rewards

    for section, options in (("grpo", recipe.grpo), ("baselines.rloo", recipe.baselines.rloo)):
        for key in options:
            if key in SET_ELSEWHERE:
                yield f"{section}.{key} is set by {SET_ELSEWHERE[key]}: remove it from {section}"
            if key in FOLLOW_FROM_PROMPTS and options[key] is not None and recipe.prompts_per_step is not None:
                yield (
                    f"{section}.{key}: {options[key]}: it follows from prompts_per_step: {recipe.prompts_per_step} and "
                    "the number of processes: remove it, or set prompts_per_step=null to give the batch sizes of a "
                    "process"
                )
    metrics = dict.fromkeys(recipe.evaluation.metrics, 1.0)
    if not metrics:
        yield "evaluation.metrics: []: name at least one metric, such as [ndcg@10]"
    for name, spec in (("rewards", recipe.rewards), *([("evaluation.metrics", metrics)] if metrics else [])):
        try:
            total = rewards.from_spec(spec)
        except ValueError as error:
            yield f"{name}: {error}"
            continue
        if name == "evaluation.metrics" and total.reads_raw:
            yield "evaluation.metrics: lift and harm are rewards; tables compare with the raw query anyway: remove them"
    for name, given, choices in (
        ("format.action", recipe.format.action, ("replace", "expand", "items", "ranking", "edit", "structured")),
        ("model.dtype", recipe.model.dtype, ("auto", "bfloat16", "float16", "float32")),
    ):
        if given not in choices:
            yield f"{name}: {given!r}: choose from {', '.join(choices)}"
    if recipe.format.action == "ranking" and recipe.task.candidates < 2:
        yield f"task.candidates: {recipe.task.candidates}: a ranking needs at least 2, such as task.candidates=16"
    if not recipe.output_dir.strip():
        yield "output_dir: empty: name a folder, such as runs/try"
    prices = recipe.baselines.endpoint.dollars_per_million
    if prices is not None and (len(prices) != 2 or min(prices) < 0):
        yield (
            f"baselines.endpoint.dollars_per_million: {prices}: two prices of at least 0, of prompt and of completion "
            "tokens, such as [0.15, 0.6]"
        )
    if recipe.warm_start.samples == 1:
        yield "warm_start.samples must be 0 (no warm start) or at least 2, got 1: the best of several is trained on"
    penalty = recipe.evaluation.repetition_penalty
    if penalty is not None and penalty <= 0:
        yield f"evaluation.repetition_penalty must be above 0, got {penalty}: 1 is no penalty, and 1.2 a usual one"
    temperature = recipe.baselines.reward_temperature
    if temperature <= 0:
        yield f"baselines.reward_temperature must be above 0, got {temperature}: 0.1 suits rewards from 0 to 1"
    if not 0 < recipe.speed.explore <= 1:
        yield f"speed.explore must lie in (0, 1], got {recipe.speed.explore}: 1 asks all prompts equally often"
    if not 0 <= recipe.retriever.max_error_rate <= 1:
        yield f"retriever.max_error_rate must lie in [0, 1], got {recipe.retriever.max_error_rate}: 0.1 is usual"
    yield from _out_of_range(recipe)


def _out_of_range(recipe: Recipe) -> Iterator[str]:
    of_validation, of_test = recipe.evaluation.validation_limit, recipe.evaluation.test_limit
    words, prompts = recipe.format.title_words, recipe.prompts_per_step
    samples, searched = recipe.baselines.samples, recipe.baselines.search_rollouts
    for name, value, least in (
        ("seed", recipe.seed, 0),
        ("prompts_per_step", 1 if prompts is None else prompts, 1),
        ("format.repeat", recipe.format.repeat, 1),
        ("format.max_items", recipe.format.max_items, 1),
        ("format.examples", recipe.format.examples, 0),
        ("format.example_words", recipe.format.example_words, 0),
        ("format.titles", recipe.format.titles, 1),
        ("format.title_words", 1 if words is None else words, 1),
        ("task.candidates", recipe.task.candidates, 0),
        ("task.train_filter.k", recipe.task.train_filter.k, 1),
        ("baselines.few_shot", recipe.baselines.few_shot, 1),
        ("baselines.samples", 2 if samples is None else samples, 2),
        ("baselines.search_rollouts", 1 if searched is None else searched, 1),
        ("warm_start.samples", recipe.warm_start.samples, 0),
        ("evaluation.every_steps", recipe.evaluation.every_steps, 0),
        ("evaluation.batch_size", recipe.evaluation.batch_size, 1),
        ("evaluation.validation_limit", 1 if of_validation is None else of_validation, 1),
        ("evaluation.test_limit", 1 if of_test is None else of_test, 1),
        ("evaluation.transcript_hits", recipe.evaluation.transcript_hits, 0),
        ("retriever.error_steps", recipe.retriever.error_steps, 1),
        ("retriever.cache.memory_mb", recipe.retriever.cache.memory_mb, 0),
        ("retriever.cache.disk_mb", recipe.retriever.cache.disk_mb, 1),
        ("baselines.endpoint.concurrency", recipe.baselines.endpoint.concurrency, 1),
    ):
        if not least <= value <= MAX_INTEGER:
            at_most = f" and at most {MAX_INTEGER}" if value > MAX_INTEGER else ""
            yield f"{name} must be at least {least}{at_most}, got {typed.shown(value)}"
