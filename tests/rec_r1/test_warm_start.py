"""A warm start: GRPO begins with a policy that SFT trained on its own best samples, and `untrained` stays untrained."""

import dataclasses
import shutil

import pytest

from rec_r1 import cli, config, train
from rec_r1.baselines import post_training
from rec_r1.baselines.settings import write
from rec_r1.checks import validate
from rec_r1.config import UserError
from rec_r1.evaluation import budget, records
from rec_r1.training.warm_start import first_policy

pytestmark = pytest.mark.usefixtures("fewer_queries")

LORA = "lora={r: 4, target_modules: [q_proj, v_proj]}"


def settings(tiny_model, out, *more) -> list[str]:
    return [
        "quickstart", f"model.name={tiny_model}", "model.dtype=float32", f"output_dir={out}", "format.repeat=1",
        "rewards={test_budget.lottery: 1.0}", "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0",
        "evaluation.test_limit=12", "evaluation.validation_limit=4", "grpo.max_steps=1", "grpo.save_steps=1",
        "prompts_per_step=null", "grpo.per_device_train_batch_size=8", "grpo.num_generations=4",
        "grpo.max_completion_length=6",
        "grpo.disable_tqdm=true", "warm_start={samples: 2, sft: {max_steps: 2, learning_rate: 1.0e-2}}", *more,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "file"), [(LORA, "adapter_model.safetensors"), ("lora=null", "model.safetensors")])
def test_grpo_begins_with_the_warm_start(tiny_model, tmp_path, monkeypatch, capsys, lora, file):
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "run"
    given = settings(tiny_model, out, lora)
    assert train.main([*given, "grpo.learning_rate=1.0e-30"]) == 0  # This changes no weight.
    begun, after = load_file(out / "warm_start" / file), load_file(out / "best" / file)
    assert begun.keys() == after.keys()
    for name, weight in begun.items():
        assert torch.equal(weight, after[name]), name
    used = budget.of_run(out)
    warm = budget.read(out / "warm_start")
    assert warm.rollouts == 2 * 25 and used.rollouts == warm.rollouts + 8 and used.seconds > warm.seconds > 0
    found = records.load_all(out, "test")
    assert found["trained"].used["rollouts"] == used.rollouts and found["untrained"].used["rollouts"] == 0
    plain = tmp_path / "plain"
    (plain / "evaluation").mkdir(parents=True)
    assert cli.main(["baseline", *given[:1], "untrained", *given[1:-2], lora, f"output_dir={plain}"]) == 0
    untrained = records.load_all(plain, "test")["untrained"]
    assert found["untrained"].identity == untrained.identity != found["trained"].identity

    monkeypatch.setattr(post_training.Training, "train", None)  # The warm start is not trained again.
    assert train.main([*given, "grpo.learning_rate=1.0e-30", "grpo.max_steps=2", "--resume"]) == 0
    assert train.main([*given, "grpo.learning_rate=1.0e-30", "warm_start.samples=3", "--resume"]) == 2
    assert "another warm_start.samples (2, now 3)" in capsys.readouterr().err


def test_several_processes_are_refused_before_anything_is_opened():
    recipe = config.load("quickstart", ["warm_start.samples=2"])
    (problem,) = validate._launch(recipe, 2)
    assert "warm_start.samples: 2: a warm start is trained by one process, and 2 were started" in problem
    assert not [*validate._launch(recipe, 1), *validate._launch(config.load("quickstart"), 2)]


@pytest.mark.slow
def test_the_reference_of_a_kl_term_is_the_warm_start(tiny_model, tmp_path):
    given = settings(tiny_model, tmp_path / "run", LORA, "grpo.beta=0.1")
    assert train.main(given) == 0
    assert '"kl": 0.0' in (tmp_path / "run" / "metrics.jsonl").read_text()  # Of the first step, before any update.


def test_a_resumed_run_keeps_its_warm_start_where_settings_may_change(tiny_model, tmp_path):
    out = tmp_path / "run"
    recipe = config.load("quickstart", settings(tiny_model, out, "lora=null")[1:])
    shutil.copytree(tiny_model, out / "warm_start")
    write(out / "warm_start", recipe, "warm_start")
    moved = dataclasses.replace(recipe, retriever=dataclasses.replace(recipe.retriever, index=str(tmp_path)))
    with pytest.raises(UserError, match="warm_start: made with other settings"):
        first_policy(moved, None, str(tiny_model))
    (out / "config.yaml").write_text(config.dump(recipe))
    policy, lora = first_policy(moved, None, str(tiny_model))
    assert policy.name_or_path == str(out / "warm_start") and lora is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warm_start.samples=1", "must be 0 .no warm start. or at least 2"),
        ("warm_start={sft: {max_steps: 1}}", r"warm_start\.sft: .*read only with warm_start\.samples"),
        ("warm_start.sft.lerning_rate=1", r"warm_start\.sft\.lerning_rate: SFTConfig has no such option"),
        ("warm_start.sft.output_dir=x", r"warm_start\.sft\.output_dir is set by output_dir"),
    ],
)
def test_check_and_train_refuse_mistakes(tmp_path, capsys, tiny_model, setting, message):
    import re

    given = settings(tiny_model, tmp_path / "run", LORA, setting)
    for command in ("check", "train"):
        assert cli.main([command, *given]) == 2
        assert re.search(message, capsys.readouterr().err.replace("\n", " ")), command
    assert not (tmp_path / "run").exists()
