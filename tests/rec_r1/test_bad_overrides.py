"""300 generated bad overrides through `check` and `train`: exit code 2, one line that names the field, no traceback."""

import dataclasses
import random
import typing

import pytest

from rec_r1 import cli, models, train
from rec_r1.config import Recipe, passthrough, values

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fewer_queries")]  # 600 calls, a minute of CPU

NAN = [".nan", ".inf", "-.inf", "[1.0, .nan]", "{a: .inf}"]
WRONG = {  # bad for a field that takes nothing but this type, and perhaps null
    int: ["x", "1.5", "true", "[1]", "{a: 1}", "2024-02-30x", "''", *NAN],
    float: ["x", "true", "[0.1]", "{a: 1}", "1e-3x", "''", *NAN],
    bool: ["1", "0", "x", "[true]", "{}", "1.0", *NAN],
    str: ["3", "1.5", "true", "[a]", "{a: 1}", "!!timestamp 2024-01-01", *NAN],
    list: ["3", "x", "{a: 1}", "true", "[[[1]]]", "[{a: 1}]", *NAN],
    dict: ["3", "x", "[1]", "true", *NAN],
}
# Right in type and out of range, or unknown.
OUT_OF_RANGE = {
    "prompts_per_step": ["0", "-1", "1000", "1" + "0" * 400],
    "seed": ["-1", "4294967296", "1" + "0" * 400],
    "model.name": ["nobody/nothing-135m", "''"],
    "model.dtype": ["foo", "int8", "''"],
    "model.attn_implementation": ["foo", "flash"],
    "task.name": ["emojis", "''", "no.such.module"],
    "task.path": ["somewhere", "''"],
    "task.splits": ["{train: dev}"],
    "task.candidates": ["-1", "5"],
    "task.params": ["{limits: {train: 3}}", "{seed: 1}"],
    "task.train_filter.k": ["0", "-3"],
    "task.train_filter.raw_ndcg_below": ["0", "-1"],
    "format.answer": ["yaml", "''"],
    "format.prompt": ["hello", "''"],
    "format.action": ["append", "''"],
    "format.repeat": ["0", "-1", "99999999999"],
    "format.max_items": ["0", "3"],
    "format.floor": ["0.5"],
    "format.titles": ["0", "3"],
    "format.title_words": ["0", "-2"],
    "format.examples": ["-1", "400"],
    "format.system": ["be brief"],
    "grounding.kind": ["bm25", "foo"],
    "grounding.params": ["{k1: 1}"],
    "retriever.kind": ["bm26", "''"],
    "retriever.params": ["{k1: -1}", "{k1: x}", "{b: 2}", "{b: true}", "{stemmer: klingon}", "{fields: {title: x}}",
                         "{k: 1}"],
    "retriever.cache.disk_mb": ["0", "5"],
    "retriever.cache.memory_mb": ["-1"],
    "retriever.max_error_rate": ["-0.1", "1.5"],
    "retriever.error_steps": ["0"],
    "rewards": ["{}", "{ndcg: 1}", "{ndcg@0: 1}", "{ndcg@10: x}", "{ndcg@10: 0}", "{ndcg@10: {gain: foo}}",
                "{length: {max_words: 0}}", "{no.such.Reward: 1}", "{ndcg@10: {weight: true}}", "[ndcg@10]"],
    "evaluation.metrics": ["[]", "[ndgc@10]", "[ndcg@x]", "[3]", "[ndcg@10, ndcg@10x]"],
    "evaluation.every_steps": ["-1"],
    "evaluation.batch_size": ["0"],
    "evaluation.repetition_penalty": ["0", "-1.2", "x"],
    "evaluation.validation_limit": ["0", "-3"],
    "evaluation.test_limit": ["0", "1.5"],
    "evaluation.transcript_hits": ["-1"],
    "baselines.samples": ["1"],
    "baselines.few_shot": ["0"],
    "baselines.reward_temperature": ["0", "-0.1", "x"],
    "baselines.endpoint.concurrency": ["0"],
    "baselines.endpoint.dollars_per_million": ["[1]", "[-1, 1]", "[1, x]"],
    "lora.r": ["0", "-4"],
    "lora.lora_alpha": ["0", "-1"],
    "lora.lora_dropout": ["-0.1", "1.0"],
    "lora.bias": ["some"],
    "lora.target_modules": ["[nothing_like_it]", "'('", "[]", "[1]"],
    "lora.layers_to_transform": ["29-15", "40", "[0, 77]", "-1", "x"],
    "lora.modules_to_save": ["[no_such_module]"],
    "lora.exclude_modules": ["[q_proj]"],
    "lora.init_lora_weights": ["foo", "pissa_niter_x", "pissa_niter_0"],
    "lora.rank_pattern": ["{q_proj: 0}", "{q_proj: x}"],
    "lora.alpha_pattern": ["{q_proj: -1}"],
    "lora.task_type": ["CAUSAL_LM"],
    "lora.inference_mode": ["true"],
    "grpo.learning_rate": ["-1", "-1e-9", "null"],
    "grpo.temperature": ["0", "-0.5"],
    "grpo.top_p": ["0", "1.1"],
    "grpo.top_k": ["-5"],
    "grpo.min_p": ["1.5"],
    "grpo.repetition_penalty": ["0"],
    "grpo.beta": ["-0.1"],
    "grpo.epsilon": ["-1"],
    "grpo.loss_type": ["foo"],
    "grpo.scale_rewards": ["foo", "1"],
    "grpo.importance_sampling_level": ["word"],
    "grpo.multi_objective_aggregation": ["sum"],
    "grpo.max_steps": ["0", "-2"],
    "grpo.num_train_epochs": ["0", "-1"],
    "grpo.num_generations": ["1", "0", "null"],
    "grpo.num_iterations": ["0"],
    "grpo.per_device_train_batch_size": ["0", "-8"],
    "grpo.gradient_accumulation_steps": ["0"],
    "grpo.generation_batch_size": ["0", "7", "1000"],
    "grpo.steps_per_generation": ["0", "1000"],
    "grpo.max_completion_length": ["0", "100000"],
    "grpo.lr_scheduler_type": ["cosin", "reduce_lr_on_plateau", "cosine_with_min_lr"],
    "grpo.lr_scheduler_kwargs": ["{no_such_option: 1}"],
    "grpo.optim": ["adam", "adamw_bnb_8bit"],
    "grpo.warmup_steps": ["-1"],
    "grpo.weight_decay": ["-0.1"],
    "grpo.max_grad_norm": ["-1"],
    "grpo.save_steps": ["0", "2.5"],
    "grpo.logging_steps": ["0", "-1"],
    "grpo.save_strategy": ["sometimes"],
    "grpo.report_to": ["[nobody]", "tensorbord", "[clearml]", "3"],
    "grpo.deepspeed": ["no_such_file.json"],
    "grpo.fsdp_config": ["no_such_file.json"],
    "grpo.accelerator_config": ["{no_such_option: 1}", "no_such_file.json"],
    "grpo.remove_unused_columns": ["true"],
    "grpo.load_best_model_at_end": ["true"],
    "grpo.auto_find_batch_size": ["true"],
    "grpo.fp16": ["true"],
    "grpo.output_dir": ["x"],
    "grpo.seed": ["1"],
    "grpo.eval_on_start": ["true"],
    "grpo.learning_rat": ["1e-4"],
    "baselines.sft.loss_type": ["foo"],
    "baselines.sft.packing_strategy": ["foo"],
    "baselines.dpo.loss_type": ["foo", "[sigmoid, foo]"],
    "baselines.dpo.beta": ["-1"],
}  # fmt: skip


def plain(hint: object) -> type | None:
    """The one type that an annotation takes, null aside; None where it takes several."""
    options = [option for option in (typing.get_args(hint) or (hint,)) if option is not type(None)]
    if typing.get_origin(hint) in (list, dict):
        options = [hint]
    kind = typing.get_origin(options[0]) or options[0] if len(options) == 1 else None
    return kind if kind in WRONG else None


def wrongly_typed(cls: type, prefix: str = "") -> dict[str, list[str]]:
    """field -> values of other types than its annotation's, for every field of ``cls`` and its sections."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= wrongly_typed(hint, f"{prefix}{name}.")
        elif (kind := plain(hint)) is not None and name not in passthrough.ANNOTATIONS:
            found[f"{prefix}{name}"] = WRONG[kind]
    return found


def generated() -> list[tuple[str, str]]:
    """300 pairs of field and bad value: all that are out of range, and a draw of those of another type."""
    from peft import LoraConfig
    from trl import DPOConfig, GRPOConfig, SFTConfig

    own = wrongly_typed(Recipe)
    sections = {"grpo": GRPOConfig, "lora": LoraConfig, "baselines.sft": SFTConfig, "baselines.dpo": DPOConfig}
    sections |= {"baselines.reward_weighted_sft": SFTConfig}
    for section, cls in sections.items():
        hidden = {"grpo": values.SET_ELSEWHERE, "lora": passthrough.SET_ELSEWHERE["lora"]}.get(section, {})
        names = {field.name for field in dataclasses.fields(cls) if field.init} - set(hidden)
        given = wrongly_typed(cls, f"{section}.")
        own |= {name: values for name, values in given.items() if name.rpartition(".")[2] in names}
    # A mapping takes any mapping, and a section whatever its class takes: NaN inside is what is wrong there.
    typed = [(name, value) for name, values in own.items() for value in values]
    ranged = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
    return ranged + random.Random(0).sample(typed, 300 - len(ranged))


@pytest.mark.parametrize("part", range(10))
def test_a_bad_override_is_one_line_that_names_the_field(part, capsys, tmp_path, tiny_model, monkeypatch):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_policy", weights)
    model = [f"model.name={tiny_model}", "lora={r: 4, target_modules: [q_proj]}", "prompts_per_step=3"]
    base = ["quickstart", f"output_dir={tmp_path / 'run'}", *model]
    cases = generated()[part::10]
    assert len(cases) == 30
    failures = []
    for field, value in cases:
        said = []
        for run in (train.main, lambda arguments: cli.main(["check", *arguments])):
            try:
                code: object = run([*base, f"{field}={value}"])
            except BaseException as error:
                code = f"{type(error).__name__}: {error}"
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rec-r1: ")]
            said.append((code, lines))
        (code, lines), checked = said
        named = len(lines) == 1 and all(part in lines[0] for part in field.split("."))
        good = code == 2 and named and "Traceback" not in lines[0]
        if not good or checked != said[0]:
            failures.append((f"{field}={value}", said))
    assert not failures, "\n".join(map(str, failures))
    assert not (tmp_path / "run").exists()
