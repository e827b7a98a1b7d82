"""What passes through to TRL and PEFT: everything that they take passes, and what they do not take is named."""

import dataclasses
import inspect
import pkgutil
import re

import pytest

from rec_r1 import config
from rec_r1.baselines.post_training import _config
from rec_r1.config import UserError
from rec_r1.config.passthrough import CHOICES, FILES, RANGES, SET_ELSEWHERE, check_sections, problems
from rec_r1.trl_options import grpo_config, lora_config


@pytest.fixture(autouse=True)
def no_deepspeed_left():
    """TrainingArguments put a DeepSpeed configuration where every later from_config of the process finds it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    yield
    unset_hf_deepspeed_config()


SECTIONS = {
    "grpo": "trl.GRPOConfig", "baselines.sft": "trl.SFTConfig", "baselines.reward_weighted_sft": "trl.SFTConfig",
    "baselines.dpo": "trl.DPOConfig", "lora": "peft.LoraConfig",
}  # fmt: skip


def class_of(section):
    """The class that takes a section's options. It is imported here, because TRL takes seconds at collection."""
    return pkgutil.resolve_name(SECTIONS[section])


@pytest.mark.parametrize("section", SECTIONS)
def test_every_default_passes(section):
    cls, defaults = class_of(section), {}
    for field in dataclasses.fields(cls):
        if field.init and field.name not in SET_ELSEWHERE.get(section.rpartition(".")[2], {}):
            made = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            defaults[field.name] = {} if dataclasses.is_dataclass(made) else made
    assert len(defaults) > 30 and list(problems(section, defaults, cls)) == []


@pytest.mark.parametrize("name", config.shipped())
def test_every_shipped_recipe_passes(name):
    assert list(check_sections(config.load(name))) == []


@pytest.mark.parametrize(
    ("section", "given"),
    [
        ("grpo", {"scale_rewards": False, "lr_scheduler_type": "cosine", "logging_steps": 0.1, "save_steps": 5.0}),
        (
            "grpo",
            {"num_train_epochs": 2, "learning_rate": 1, "report_to": "none", "tf32": None},
        ),
        ("grpo", {"debug": "underflow_overflow", "fsdp": True, "save_strategy": "no", "optim": "sgd", "top_k": 50}),
        ("grpo", {"max_steps": -1, "steps_per_generation": None, "lr_scheduler_kwargs": '{"a": 1}', "deepspeed": {}}),
        ("lora", {"target_modules": "all-linear", "layers_to_transform": 3, "init_lora_weights": "pissa_niter_4"}),
        ("lora", {"target_modules": r".*\.q_proj", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 0.5}}),
        ("lora", {"layers_to_transform": "15-29", "eva_config": {"rho": 2.0}, "layer_replication": [[0, 2], [1, 3]]}),
        ("baselines.dpo", {"loss_type": "ipo", "loss_weights": [1], "label_smoothing": 0.1}),
        ("baselines.sft", {"remove_unused_columns": True, "packing_strategy": "wrapped", "loss_type": "dft"}),
    ],
)
def test_what_the_classes_take_passes(section, given):
    assert list(problems(section, given, class_of(section))) == []


def test_the_tables_name_options_of_the_installed_release():
    names = {field.name for section in SECTIONS for field in dataclasses.fields(class_of(section))}
    assert {key.rpartition(".")[2] for key in (*CHOICES, *RANGES, *FILES)} <= names


@pytest.mark.parametrize(("kind", "trainer"), [("grpo", "GRPOTrainer"), ("dpo", "DPOTrainer")])
def test_the_losses_are_those_that_the_trainer_computes(kind, trainer):
    source = inspect.getsource(inspect.getmodule(pkgutil.resolve_name(f"trl.{trainer}")))
    compared = re.findall(r'loss_type == "(\w+)"|loss_type in \[([^\]]*)\]', source)
    names = {name for one, several in compared for name in re.findall(r"\w+", one or several)}
    assert names == set(CHOICES[f"{kind}.loss_type"])


@pytest.mark.parametrize("section", ["baselines.sft", "baselines.reward_weighted_sft", "baselines.dpo"])
@pytest.mark.parametrize("key", ["output_dir", "seed", "trust_remote_code", "resume_from_checkpoint"])
def test_what_the_toolkit_sets_itself_is_refused(section, key):
    (line,) = problems(section, {key: 1}, class_of(section))
    assert line.startswith(f"{section}.{key} is set by ") and line.endswith(f": remove it from {section}")


def test_no_is_a_strategy_and_no_boolean():
    recipe = config.load("quickstart", ["grpo.save_strategy=no", "grpo.logging_strategy=no"])
    assert grpo_config(recipe).save_strategy == "no"
    (line,) = check_sections(config.load("quickstart", ["grpo.use_vllm=yes"]))
    assert line == "grpo.use_vllm must be true or false, got 'yes': write true"


def test_all_mistakes_of_the_sections_are_named_at_once():
    overrides = ["grpo.learning_rate=abc", "grpo.beta=-1", "lora.r=0", "baselines.dpo.loss_type=foo"]
    found = list(check_sections(config.load("quickstart", overrides)))
    assert [line.split()[0] for line in found] == [
        "grpo.learning_rate", "grpo.beta", "lora.r", "baselines.dpo.loss_type",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "make", "message"),
    [
        ("grpo.auto_find_batch_size=true", grpo_config, r"grpo\.auto_find_batch_size: "),
        ("grpo.accelerator_config={nonsense: 1}", grpo_config, r"grpo\.accelerator_config: .*nonsense"),
        ("grpo.deepspeed={zero_optimization: {stage: 3}}", grpo_config, r"grpo.*[Dd]eep[Ss]peed"),
        ("lora={target_modules: all-linear, layers_to_transform: [1]}", lora_config, r"lora\.\w+: .*target_modules"),
        ("baselines.dpo={loss_weights: [1, 2]}", lambda r: _config(r, "dpo"), r"baselines\.dpo\.loss_weights: "),
    ],
)
def test_what_the_classes_find_themselves_is_one_line(override, make, message):
    with pytest.raises(UserError, match=message) as caught:
        make(config.load("quickstart", [override]))
    assert "\n" not in str(caught.value)
