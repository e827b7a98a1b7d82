"""Each rule about settings of GRPO: a recipe that trips it, and one that does not."""

import re
from pathlib import Path

import pytest

from rec_r1 import cli, config, train
from rec_r1.checks import grpo_rules, validate
from rec_r1.checks.steps import plan
from rec_r1.config import UserError

QUERIES = 156  # The training queries of the quickstart.
VLLM = ["grpo.use_vllm=true"]
TOKENS = "grpo.vllm_importance_sampling_mode=token_truncate"
LINES = ["grpo.mask_truncated_completions=true"]
THINKING = ["format.answer=think_json", "format.chat=true", "grpo.mask_truncated_completions=true"]
# Two steps use the completions of one generation.
TWO_STEPS = ["prompts_per_step=6", "grpo.generation_batch_size=96"]

# Rule, settings that trip it, the key that its line begins with, words of the line, and settings that do not trip it.
CASES = [
    (
        "small_groups",
        ["grpo.num_generations=2"],
        "grpo.num_generations: 2",
        "68% of the groups",
        ["grpo.num_generations=4"],
    ),
    ("small_groups", ["grpo.num_generations=3"], "grpo.num_generations: 3", "and 17% with 8", []),
    ("truncated_sampling", [*VLLM, "grpo.top_p=0.95"], "grpo.top_p: 0.95", "the product", ["grpo.top_p=0.95"]),
    ("truncated_sampling", [*VLLM, "grpo.top_k=20"], "grpo.top_k: 20", "set grpo.top_k=0", [*VLLM, "grpo.top_k=0"]),
    ("truncated_sampling", [*VLLM, "grpo.min_p=0.1"], "grpo.min_p: 0.1", "set grpo.min_p=0", [*VLLM, "grpo.min_p=0.0"]),
    ("truncated_sampling", [*VLLM, "grpo.top_p=0.9", TOKENS], "grpo.top_p: 0.9", "by this for each token", VLLM),
    (
        "truncated_sampling",
        [*VLLM, "grpo.top_p=0.9", TOKENS, "grpo.loss_type=vespo"],
        "grpo.top_p: 0.9",
        "by the product",
        [*VLLM, "grpo.top_p=0.9", "grpo.vllm_importance_sampling_correction=false"],
    ),
    (
        "truncated_sampling",
        [*VLLM, "grpo.generation_kwargs={top_k: 9}"],
        "grpo.generation_kwargs.top_k: 9",
        "set grpo.generation_kwargs.top_k=0",
        [*VLLM, "grpo.generation_kwargs={top_k: 0}"],
    ),
    (
        "penalized_sampling",
        [*VLLM, "grpo.repetition_penalty=1.1"],
        "grpo.repetition_penalty: 1.1",
        "set grpo.repetition_penalty=1",
        ["grpo.repetition_penalty=1.1"],
    ),
    (
        "scaled_small_rewards",
        ["rewards={ndcg@10: 1.0, length: 0.1, format: 1.0}"],
        "rewards.length: it differs",
        "grpo.scale_rewards=batch",
        ["rewards={ndcg@10: 1.0, length: 0.1, format: 1.0}", "grpo.scale_rewards=batch"],
    ),
    (
        "scaled_small_rewards",
        ["rewards={ndcg@10: 0.001}"],
        "rewards: they differ",
        "by at most 0.001",
        ["rewards={ndcg@10: 1.0, ndcg@1000: 0.01}"],
    ),
    (
        "masked_completions",
        [*THINKING, "grpo.max_completion_length=64"],
        "grpo.max_completion_length: 64",
        "few think_json completions",
        [*THINKING, "grpo.max_completion_length=512"],
    ),
    ("masked_completions", [*LINES, *VLLM], "grpo.mask_truncated_completions: true", "with grpo.use_vllm", LINES),
    (
        "masked_completions",
        [*LINES, "speed.end_at_answer=false"],
        "grpo.mask_truncated_completions: true",
        "speed.end_at_answer=false",
        [*LINES, "speed.end_at_answer=false", "format.chat=true"],
    ),
    ("learning_rate", ["grpo.learning_rate=1.0e-6"], "grpo.learning_rate: 1e-06", "hardly changes a LoRA", []),
    ("learning_rate", ["grpo.learning_rate=0.01"], "grpo.learning_rate: 0.01", "a LoRA adapter diverge", []),
    (
        "learning_rate",
        ["lora=null"],
        "grpo.learning_rate: 0.0003",
        "all weights",
        ["lora=null", "grpo.learning_rate=1.0e-6"],
    ),
    (
        "learning_rate",
        ["lora=null", "grpo.learning_rate=1.0e-9"],
        "grpo.learning_rate: 1e-09",
        "hardly changes all",
        ["lora=null", "grpo.optim=sgd"],  # the ranges are those of AdamW
    ),
    (
        "repeated_passes",
        ["grpo.num_iterations=2", "grpo.generation_batch_size=48"],
        "grpo.num_iterations: 2",
        "the same gradient again: set grpo.num_iterations=1, or prompts_per_step=6",
        ["grpo.num_iterations=2"],
    ),
    (
        "clipping",
        ["grpo.loss_type=cispo"],
        "grpo.epsilon: 0.2",
        "multiplied by 0.2: set grpo.epsilon_high=5.0",
        ["grpo.loss_type=cispo", "grpo.epsilon_high=5.0"],
    ),
    ("clipping", [*TWO_STEPS, "grpo.epsilon=1.5"], "grpo.epsilon: 1.5", "2 steps use", ["grpo.epsilon=1.5"]),
    ("clipping", ["grpo.num_iterations=3", "grpo.epsilon_high=2"], "grpo.epsilon_high: 2", "3 steps use", TWO_STEPS),
    (
        "clipping",
        [*TWO_STEPS, "grpo.loss_type=grpo", "grpo.importance_sampling_level=sequence"],
        "grpo.epsilon: 0.2",
        "mean ratio of a completion",
        [*TWO_STEPS, "grpo.loss_type=grpo", "grpo.importance_sampling_level=sequence", "grpo.epsilon=3.0e-4"],
    ),
    (
        "reference",
        ["grpo.beta=0.001", "lora={r: 8, init_lora_weights: pissa_niter_4}"],
        "lora.init_lora_weights: pissa_niter_4",
        "is not the untrained one",
        ["grpo.beta=0.001", "lora={r: 8, init_lora_weights: gaussian}"],
    ),
    (
        "reference",
        ["grpo.beta=0.001", "lora={r: 8, bias: all}"],
        "lora.bias: all",
        "changes with the policy",
        ["lora={r: 8, bias: all}"],
    ),
    (
        "dropout",
        [*VLLM, "lora={r: 8, lora_dropout: 0.05}"],
        "lora.lora_dropout: 0.05",
        "is noise",
        ["lora={r: 8, lora_dropout: 0.05}"],
    ),
    (
        "dropout",
        [*TWO_STEPS, "lora={r: 8, lora_dropout: 0.05}"],
        "lora.lora_dropout: 0.05",
        "is noise",
        [*TWO_STEPS, "lora={r: 8, lora_dropout: 0.05}", "grpo.disable_dropout=true"],
    ),
    (
        "loss_types",
        ["grpo.loss_type=dr_grpo"],
        "grpo.scale_rewards: group",
        "set grpo.scale_rewards=none",
        ["grpo.loss_type=dr_grpo", "grpo.scale_rewards=none"],
    ),
    (
        "loss_types",
        ["grpo.loss_type=dr_grpo", "grpo.scale_rewards=false", "grpo.max_completion_length=256"],
        "grpo.max_completion_length: 256",
        "divides the loss",
        ["grpo.max_completion_length=256"],
    ),
    (
        "loss_types",
        ["grpo.importance_sampling_level=sequence"],
        "grpo.importance_sampling_level: sequence",
        "weighs by its length",
        ["grpo.importance_sampling_level=sequence", "grpo.loss_type=grpo"],
    ),
    (
        "loss_types",
        ["grpo.loss_type=luspo"],
        "grpo.importance_sampling_level: token",
        "is defined with sequence",
        ["grpo.loss_type=luspo", "grpo.importance_sampling_level=sequence"],
    ),
    (
        "loss_types",
        ["grpo.loss_type=vespo", "grpo.importance_sampling_level=sequence"],
        "grpo.importance_sampling_level: sequence",
        "is defined with token",
        ["grpo.loss_type=vespo"],
    ),
    (
        "temperature",
        ["grpo.temperature=0.1"],
        "grpo.temperature: 0.1",
        "most groups are dead",
        ["grpo.temperature=0.6"],
    ),
    (
        "temperature",
        ["grpo.generation_kwargs={temperature: 0.7}"],
        "grpo.generation_kwargs.temperature: 0.7",
        "the loss takes grpo.temperature=1 ",
        ["grpo.generation_kwargs={temperature: 1.0}"],
    ),
    (
        "epochs",
        ["grpo.max_steps=12"],
        "grpo.max_steps: 12",
        "its first epoch, which has 13 steps",
        ["grpo.max_steps=13"],
    ),
    (
        "epochs",
        ["grpo.max_steps=-1", "grpo.num_train_epochs=0.5"],
        "grpo.num_train_epochs: 0.5",
        "its first epoch",
        ["grpo.max_steps=12", "speed.explore=1"],
    ),
    ("epochs", ["grpo.max_steps=2600"], "grpo.max_steps: 2600", "about 200 times", ["grpo.max_steps=1300"]),
    ("warmup", ["grpo.warmup_steps=39"], "grpo.warmup_steps: 39", "takes all 39 steps", ["grpo.warmup_steps=0.1"]),
    (
        "warmup",
        ["grpo.warmup_steps=4", "grpo.lr_scheduler_type=constant"],
        "grpo.warmup_steps: 4",
        "ignores it",
        ["grpo.warmup_steps=4", "grpo.lr_scheduler_type=constant_with_warmup"],
    ),
]


def found(overrides, recipe="quickstart", queries=QUERIES):
    loaded = config.load(recipe, ["grpo.bf16=false", *overrides])
    args = validate.check_recipe(loaded)
    return validate.warnings(loaded, args, plan(loaded, queries, args))


@pytest.mark.parametrize(("rule", "trips", "begins", "says", "clean"), CASES, ids=[f"{c[0]} {c[2]}" for c in CASES])
def test_a_rule_names_what_it_is_about_and_nothing_else_does(rule, trips, begins, says, clean, monkeypatch):
    (line,) = [line for line in found(trips) if line.startswith(begins)]
    assert says in line and "\n" not in line and (": set " in line or ": give " in line)
    assert not [line for line in found(clean) if line.startswith(begins.partition(": ")[0])]
    monkeypatch.setattr(grpo_rules, "RULES", tuple(r for r in grpo_rules.RULES if r.__name__ != rule))
    assert line not in found(trips)  # no other rule says it


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == {rule.__name__ for rule in grpo_rules.RULES}


def test_the_page_lists_every_key_that_a_rule_warns_of():
    page = Path(validate.__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    table = page.partition("## Settings that weaken the gradient\n")[2].partition("\n## ")[0]
    keys = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = {key for cell in keys for key in re.findall(r"`([\w.]+)`", cell)}
    warned = {begins.partition(": ")[0] for _, _, begins, _, _ in CASES} - {"rewards.length"} | {"rewards.NAME"}
    assert warned - {"grpo.generation_kwargs.top_k"} == listed


@pytest.mark.parametrize("name", config.shipped())
def test_the_shipped_recipes_are_clean(name):
    small = {"quickstart": QUERIES, "cpu/search": QUERIES, "cpu/sequential": 320}
    assert found([], name, small.get(name, 20_000)) == []


def test_the_top_p_of_the_paper_is_warned_of():
    (line,) = found(["grpo.top_p=0.95"], "esci_bm25", 20_000)
    assert line.startswith("grpo.top_p: 0.95")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grpo.sync_ref_model=true"], "grpo.beta is 0"),
        (["grpo.sync_ref_model=true", "grpo.beta=0.1"], "set grpo.sync_ref_model=false, or lora=null"),
        ([*VLLM, "grpo.loss_type=vespo"], "grpo.vllm_importance_sampling_mode: sequence_mask"),
    ],
)
def test_what_the_trainer_refuses_late_is_refused_first(overrides, message):
    with pytest.raises(UserError) as caught:
        validate.check_recipe(config.load("quickstart", overrides))
    assert message in str(caught.value)


def test_what_the_trainer_accepts_is_not_refused():
    for overrides in (
        ["grpo.sync_ref_model=true", "grpo.beta=0.1", "lora=null"],
        [*VLLM, "grpo.loss_type=vespo", TOKENS],
        ["grpo.loss_type=vespo"],
        [*VLLM, "grpo.loss_type=vespo", "grpo.vllm_importance_sampling_correction=false"],
    ):
        validate.check_recipe(config.load("quickstart", overrides))


@pytest.mark.slow
def test_check_and_train_say_the_same(tiny_model, tmp_path, capsys):
    settings = [
        "quickstart", f"model.name={tiny_model}", f"output_dir={tmp_path / 'run'}", "lora=null", "model.dtype=float32",
        "grpo.learning_rate=1.0e-6", "grpo.max_steps=1", "grpo.temperature=0.2", "evaluation.every_steps=0",
        "evaluation.test_limit=2", "evaluation.validation_limit=2", "prompts_per_step=1",
    ]  # fmt: skip
    assert cli.main(["check", *settings]) == 0
    warned = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert [line.partition(":")[0] for line in warned] == ["grpo.temperature", "grpo.max_steps"]
    assert train.main(settings) == 0
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if line in warned] == warned
