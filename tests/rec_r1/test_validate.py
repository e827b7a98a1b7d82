"""What `check` and `train` see before any weights: rewards on made-up answers, settings nobody reads, trackers."""

import dataclasses
import importlib.util
import sys
import typing

import numpy as np
import pytest

import retrievers
from rec_r1 import config, models, tasks
from rec_r1.checks import reward_probe, validate
from rec_r1.checks.steps import plan
from rec_r1.config import UserError
from rec_r1.config.typed import mismatch
from rec_r1.environment import open_environment, rewards_of
from rec_r1.trl_options import grpo_config
from rewards import RankingReward

OWN = """
import numpy as np
from dataclasses import dataclass

def raises(outcome):
    raise KeyError("brevity")

def two_columns(outcome):
    return np.zeros((len(outcome.completions), 2))

def one_number(outcome):
    return 0.5

def never(outcome):
    return np.full(len(outcome.completions), np.nan)

def texts(outcome):
    return ["good"] * len(outcome.completions)

def fine(outcome):
    return np.array([0.0 if a is None else 1 / len(a.text) for a in outcome.actions])

def counts_words(outcome):
    return np.array([float(len(outcome.words("登山鞋"))) for _ in outcome.actions])

@dataclass(frozen=True)
class Keyed:
    api_key: str
    __name__ = "keyed"

    def __call__(self, outcome):
        return np.full(len(outcome.completions), float(self.api_key == "opens"))

@dataclass(frozen=True)
class Fails:
    def __post_init__(self):
        raise RuntimeError("no licence\\nfound")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"reward 'raises' raises KeyError on five made-up completions: 'brevity'"),
        ("two_columns", r"reward 'two_columns' returned shape \(5, 2\)"),
        ("one_number", r"reward 'one_number' returned shape \(\)"),
        ("never", r"reward 'never' is NaN for perfect, half-right, wrong and malformed completions"),
        ("texts", r"reward 'texts' must return 5 numbers"),
    ],
)
@pytest.mark.parametrize("section", ["rewards={%s: 1.0}", "evaluation.metrics=[ndcg@10, %s]"])
def test_an_own_reward_is_tried(own, name, message, section):
    recipe = config.load("quickstart", [section % f"{own}.{name}"])
    (found,) = reward_probe.problems(recipe)
    assert found.startswith(section.partition("=")[0]) and "\n" not in found
    with pytest.raises(UserError, match=message):
        validate.check_recipe(recipe)


@pytest.mark.parametrize(
    ("name", "message"),
    [("own_rewards.Fails", "no licence found"), ("broken_rewards.reward", "cannot import 'broken_rewards'")],
)
def test_what_an_own_module_raises_is_one_line(own, name, message):
    with pytest.raises(UserError, match=message) as caught:
        config.load("quickstart", [f"rewards={{{name}: 1.0}}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["{ndcg@10: 1}", "{rec_r1@1000: 1}", "{map@5: 1, length: 1, repetition: 1}"])
def test_the_rewards_that_are_there_pass(own, spec):
    assert list(reward_probe.problems(config.load("quickstart", [f"rewards={spec}"]))) == []
    assert list(reward_probe.problems(config.load("quickstart", [f"rewards={{{own}.fine: 1}}"]))) == []


def test_a_reward_s_secret_may_be_a_variable(own, monkeypatch):
    recipe = config.load("quickstart", [f"rewards={{{own}.Keyed: {{api_key: $OWN_KEY}}}}"])
    monkeypatch.delenv("OWN_KEY", raising=False)
    with pytest.raises(UserError, match=r"rewards\..*api_key: \$OWN_KEY is not set: export it"):
        validate.check_recipe(recipe)
    monkeypatch.setenv("OWN_KEY", "opens")
    assert list(reward_probe.problems(recipe)) == []
    assert open_environment(recipe).scorer.rewards(reward_probe.outcome()).tolist() == [1.0] * 5
    assert "opens" not in config.dump(recipe)


def test_a_reward_counts_the_words_that_the_retriever_indexes(own):
    total = rewards_of(config.load("quickstart", [f"rewards={{{own}.counts_words: 1}}"]))
    assert total(reward_probe.outcome()).tolist() == [2.0] * 5  # not 1, as between blanks


@pytest.mark.parametrize(
    ("spec", "warned"),
    [
        ("{ndcg@10: 1.0, length: 0.6}", True),
        ("{ndcg@10: 1.0, repetition: 0.6}", True),
        ("{length: 1.0, format: 0.1}", True),
        ("{ndcg@10: 1.0, length: 0.6, format: 1.0}", False),
        ("{rec_r1@1000: 1.0, length: 0.6}", False),
        ("{ndcg@10: 1.0}", False),
    ],
)
def test_where_writing_nothing_readable_pays(spec, warned):
    recipe = config.load("quickstart", [f"rewards={spec}"])
    args = validate.check_recipe(recipe)
    lines = validate.warnings(recipe, args, plan(recipe, 156, args))
    assert bool(lines) == warned
    if warned:
        assert "a malformed completion earns" in lines[0] and "format: 1.0" in lines[0]


def test_the_worst_answer_of_the_probe_costs_what_the_rewards_say():
    outcome = reward_probe.outcome()
    total = config.load("quickstart", ["rewards={ndcg@10: 1.0, length: 0.6}"]).rewards
    import rewards

    values = rewards.from_spec(total)(outcome)
    assert values[0] == 1 and values[3] == pytest.approx(-0.6) and values[4] == 0 and not np.isnan(values).any()


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["task.path=somewhere"], "task.path: 'somewhere'"),
        (["task.splits={train: a, validation: b, test: c}"], "task.splits: "),
        (["task.name=trec", "task.splits={train: a, validation: b, test: c}"], "task.splits: "),
        (["task.candidates=5"], "task.candidates: 5"),
        (["format.action=replace"], "format.repeat: 10"),
        (["format.max_items=3"], "format.max_items: 3"),
        (["format.action=items", "format.repeat=1", "format.keep_query=true"], "format.keep_query: True"),
        (["format.floor=0.5"], "format.floor: 0.5"),
        (["format.titles=3"], "format.titles: 3"),
        (["format.system=Be brief."], "format.system: "),
        (["grounding.kind=bm25"], "grounding.kind: 'bm25'"),
        (["grounding.params={k1: 1}"], "grounding.params: "),
        (["retriever.kind=remote", "retriever.index=here"], "retriever.index: 'here'"),
        (["retriever.cache.disk_mb=5"], "retriever.cache.disk_mb: 5"),
        (["rewards={ndcg@10: 0, format: 0.0}"], "rewards: every weight is 0"),
        (["retriever.params={k1: x}"], "retriever.params.k1 must be a number, got 'x'"),
        (["retriever.params={b: true}"], "retriever.params.b must be a number, got true"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(overrides, field):
    with pytest.raises(UserError) as caught:
        validate.check_recipe(config.load("quickstart", overrides))
    assert field in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [3, "yes", [1]])
def test_a_section_among_the_parameters_is_refused_in_the_words_of_its_backend(given):
    found = 0
    for kind in retrievers.BACKENDS:
        for name, hint in retrievers.parameters(kind).items():
            if any(map(dataclasses.is_dataclass, typing.get_args(hint))):
                needed = {"url": "postgresql://host/shop"} if kind == "postgres" else {}
                with pytest.raises(ValueError) as error:
                    retrievers.check_parameters(kind, {**needed, name: given})
                said = f"retriever.params.{name} {mismatch(hint, given, name)}"
                assert said in str(error.value) and said.endswith(": write {} for the defaults")
                found += 1
    assert found >= 7  # structured of five kinds, and tuned of dense and rerank.


def test_a_task_of_the_user_s_own_may_read_everything(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text("def load(config):\n    raise AssertionError\n")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = config.load("quickstart", ["task.name=own_task", "task.path=here", "task.splits={a: b}"])
    assert tasks.find(recipe.task).__name__ == "own_task"


@pytest.mark.parametrize("name", config.shipped())
def test_every_shipped_recipe_passes(name):
    recipe = config.load(name, ["grpo.bf16=false"])
    validate.check_recipe(recipe)


@pytest.mark.slow
def test_fsdp_that_saves_parts_is_refused(monkeypatch):
    """best/ would hold no weights."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    validate.check_recipe(config.load("quickstart"))
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(UserError, match=r"fsdp_state_dict_type .*: SHARDED_STATE_DICT: .*set it to FULL_STATE_DICT"):
        validate.check_recipe(config.load("quickstart"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    validate.check_recipe(config.load("quickstart"))
    by_recipe = ["grpo.fsdp=true", "grpo.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"]
    with pytest.raises(UserError, match=r"grpo\.fsdp_config\.state_dict_type: SHARDED_STATE_DICT"):
        validate.check_recipe(config.load("quickstart", by_recipe))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.slow
def test_zero3_that_saves_parts_is_refused(monkeypatch):
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    try:
        assert models.sharding(validate.check_recipe(config.load("quickstart"))) == "ZeRO-3"
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false")
        with pytest.raises(UserError, match=r"zero3_save_16bit_model: false in .*: set it to true"):
            validate.check_recipe(config.load("quickstart"))
    finally:
        unset_hf_deepspeed_config()  # Every model that this process loads later would be sharded.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("[nobody]", r"grpo\.report_to: unknown 'nobody': choose from .*wandb"),
        ("clearml", r"grpo\.report_to: clearml: its package is not installed: pip install clearml"),
        ("wandb", r"grpo\.report_to: wandb: this machine is not logged in"),
    ],
)
def test_trackers(setting, message, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UserError, match=message):
        validate.check_recipe(config.load("quickstart", [f"grpo.report_to={setting}"]))


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "offline"), ("WANDB_API_KEY", "0" * 40)])
def test_wandb_offline_or_with_a_key(name, value, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv(name, value)
    assert validate.check_recipe(config.load("quickstart", ["grpo.report_to=[wandb]"])).report_to == ["wandb"]


def test_messages_name_the_types_of_yaml_and_not_those_of_python():
    asked = [hint for kind in retrievers.BACKENDS for hint in retrievers.parameters(kind).values()]
    messages = {str(hint): mismatch(hint, True, "fields") for hint in asked if "Mapping[" in str(hint)}
    assert len(messages) > 2
    for hint, message in messages.items():
        first = "a list of mappings" if "Sequence[" in hint else "a mapping"
        assert message is not None and message.startswith(f"must be {first}") and message.endswith("got true")
        assert "Mapping" not in message and "Sequence" not in message


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("rewards={ndcg@10: {weight: 1, gain: exponential}}", "rewards: train query"),
        ("evaluation.metrics=[test_validate.exponential]", "evaluation.metrics: train query"),
        ("rewards={ndcg@10: 1}", None),
    ],
)
def test_grades_that_a_reward_refuses_are_found_before_the_training(given, refused):
    """Without this, the training ends at the step in which such a query is first drawn."""
    recipe = config.load("quickstart", [given])
    env = open_environment(recipe)
    grades = list(env.task.train.grades)
    grades[5] = tuple(600.0 for _ in grades[5])
    task = dataclasses.replace(env.task, train=dataclasses.replace(env.task.train, grades=grades))
    env = dataclasses.replace(env, task=task)
    if refused is None:
        validate.check_data(recipe, env, grpo_config(recipe))
        return
    with pytest.raises(UserError, match=f"{refused} .*grades of up to 600 overflow"):
        validate.check_data(recipe, env, grpo_config(recipe))


def exponential(outcome):
    return RankingReward("ndcg", 10, "exponential")(outcome)
