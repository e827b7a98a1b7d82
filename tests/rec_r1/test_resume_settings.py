"""Which settings a resumed run may change."""

import dataclasses
import re
from pathlib import Path

import pytest
from runs_ import INFO

from rec_r1 import config, runs
from rec_r1.config import UserError
from rec_r1.runs import run_config

REFUSED = [
    "seed=7",
    "model.dtype=float32",
    "lora.r=8",
    "lora=null",
    "task.train_filter.k=5",
    "format.repeat=1",
    "retriever.params.k1=0.9",
    "rewards.ndcg@10=0.7",
    "grounding.kind=bm25",
    "evaluation.metrics=[mrr@10]",
    "evaluation.validation_limit=5",
    "speed.end_at_answer=false",
    "speed.explore=1",
    "prompts_per_step=6",
    "warm_start.samples=2",
    pytest.param("grpo.temperature=0.5", marks=pytest.mark.slow),  # imports TRL for its defaults
    "grpo.num_generations=4",
    "grpo.learning_rate=1.0",
    "grpo.save_steps=3",
]


@pytest.mark.slow
@pytest.mark.parametrize("override", REFUSED)
def test_what_shapes_rewards_prompts_or_policy_does_not_change(recipe, override):
    runs.begin(recipe, 0, INFO)
    before = (Path(recipe.output_dir) / "config.yaml").read_text()
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", override])
    with pytest.raises(UserError, match=f"started with another {re.escape(override.partition('=')[0])} "):
        runs.prepare(changed, resume=True)
    assert (Path(recipe.output_dir) / "config.yaml").read_text() == before


def test_every_section_is_refused_or_may_change():
    """A section that is added later is compared unless somebody says that it need not be."""
    names = {field.name for field in dataclasses.fields(config.Recipe)}
    refused = {o.partition("=")[0].partition(".")[0] for o in REFUSED if isinstance(o, str)}
    assert names - refused == {name for name in names if run_config.may_change(name)} == {"output_dir", "baselines"}


@pytest.mark.parametrize(
    "override",
    [
        "grpo.max_steps=60",
        "grpo.save_total_limit=5",
        pytest.param("grpo.temperature=1.0", marks=pytest.mark.slow),
        "retriever.cache.memory_mb=1",
        "evaluation.batch_size=2",
        "baselines.few_shot=2",
        "grpo.hub_strategy=end",
    ],
)
def test_what_changes_nothing_may_change(recipe, override):
    runs.begin(recipe, 0, INFO)
    runs.prepare(config.load("quickstart", [f"output_dir={recipe.output_dir}", override]), resume=True)


def test_evaluation_may_change(recipe):
    runs.begin(recipe, 0, INFO)
    changed = config.load("quickstart", [f"output_dir={recipe.output_dir}", "evaluation.every_steps=1"])
    runs.prepare(changed, resume=True)
