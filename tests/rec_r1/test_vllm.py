"""A colocated vLLM really generates in trainings on a CPU: `bash tests/run.sh vllm` installs it and runs this file.

The trainings run in processes of their own, through vllm_on_cpu.py. test_vllm_engine.py has what needs no vLLM.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from test_recipes import FOLDERS

from rec_r1 import cli, config, models
from rec_r1.generation import generate, importance_ratio, render, sampling_of, sampling_of_rollouts
from rec_r1.generation.rollouts import generate_held_out
from rec_r1.generation.vllm_engine import check_server
from rec_r1.trl_options import fill_in_vllm_length, grpo_config

INSTALLED = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed: `bash tests/run.sh vllm` installs it"),
]
HELPER = Path(__file__).with_name("vllm_on_cpu.py")
TIMEOUT = 1800  # seconds; a training takes one or two minutes of two cores
# One GiB of key-value cache, and a free port in place of accelerate's, which another training may use.
FREE = {"VLLM_CPU_KVCACHE_SPACE": "1", "MASTER_PORT": "0"}
SMALL = ["model.name=smollm2-135m", "grpo.use_vllm=true", "grpo.bf16=false", "prompts_per_step=null"]


def train(out: Path, dtype: str, recipe: str, *more: str) -> tuple[list[dict], list[dict]]:
    """Train with vLLM in a new process. Returns the rows of metrics.jsonl, and what vLLM was asked and answered."""
    record = out.with_suffix(".record.jsonl")
    done = subprocess.run(
        [sys.executable, str(HELPER), str(record), dtype, recipe, f"output_dir={out}", *SMALL, *more],
        env=os.environ | FREE, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(
        [json.loads(line) for line in file.read_text().splitlines()] for file in (out / "metrics.jsonl", record)
    )


def generated(record: list[dict]) -> list[dict]:
    """The calls of vLLM for rollouts, in order."""
    return [row for row in record if row["kind"] == "generate" and row["options"].get("temperature") != 0]


class Run:
    """A quickstart of two steps with a high learning rate and everything in float32, so that nothing may differ."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.recipe_settings = [
            "model.dtype=float32", "grpo.max_steps=2", "grpo.save_steps=2", "grpo.learning_rate=1.0e-3",
            "grpo.lr_scheduler_type=constant", "grpo.per_device_train_batch_size=16", "evaluation.every_steps=2",
            "evaluation.validation_limit=6", "evaluation.test_limit=4",
        ]  # fmt: skip
        self.metrics, self.record = train(out, "float32", "quickstart", *self.recipe_settings)
        self.recipe = config.load(out / "config.yaml")
        self.source = models.resolve("smollm2-135m")
        self.tokenizer = models.load_tokenizer(self.source)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("vllm") / "run")


@pytest.fixture(scope="module")
def untrained(run):
    return models.load_policy_for_evaluation(run.source, run.recipe, None)


def test_vllm_reads_the_prompts_that_transformers_would(run):
    (held_out, *_) = [row for row in run.record if row["kind"] == "held out"]
    asked = [render(prompt, run.tokenizer, {}) for prompt in held_out["prompts"]]
    (greedy, *_) = [row for row in run.record if row["kind"] == "generate"]
    assert greedy["prompts"] == asked and greedy["options"]["temperature"] == 0
    lines = (run.out / "rollouts.jsonl").read_text().splitlines()
    written = [render(json.loads(line)["prompt"], run.tokenizer, {}) for line in lines]
    assert [ids for row in generated(run.record) for ids in row["prompts"]] == written


def test_the_context_of_vllm_is_the_longest_prompt_and_a_completion(run):
    from rec_r1.environment import open_environment
    from rec_r1.trl_options import check_lengths

    longest = check_lengths(run.recipe, open_environment(run.recipe), run.tokenizer, models.load_config(run.source))
    tokens = fill_in_vllm_length(grpo_config(run.recipe), longest)
    assert {row["context"] for row in run.record if row["kind"] == "generate"} == {tokens}


def test_completions_end_at_the_end_of_sequence_or_at_the_limit(run):
    ends = models.token_ids(run.source)["eos_token_id"]
    ends = {run.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    completions = [ids for row in generated(run.record) for ids in row["completions"]]
    assert len(completions) == 2 * 16
    for ids in completions:
        assert not ends & set(ids[:-1])
        assert ids[-1] in ends or len(ids) == run.recipe.grpo["max_completion_length"]


def logprobs(model, prompt: list[int], completion: list[int], temperature: float):
    """transformers' log-probabilities of the tokens of a completion."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)[range(len(completion)), completion]


def differences(model, rollout: dict) -> list[float]:
    return [
        abs(float(one) - other)
        for prompt, ids, given in zip(rollout["prompts"], rollout["completions"], rollout["logprobs"], strict=True)
        for one, other in zip(logprobs(model, prompt, ids, rollout["options"]["temperature"]), given, strict=True)
    ]


def test_log_probabilities_are_those_of_transformers(run, untrained):
    found = differences(untrained, generated(run.record)[0])
    assert len(found) > 100 and max(found) < 1e-2


def test_the_ratio_is_one_before_and_after_the_weights_change(run):
    ratios = [row[importance_ratio.MEAN] for row in run.metrics if importance_ratio.MEAN in row]
    assert len(ratios) == 2 and ratios == pytest.approx([1.0, 1.0], abs=0.01)
    assert sum(row["kind"] == "sync" for row in run.record) >= 3


def test_held_out_completions_are_those_of_transformers(run, untrained):
    """Before and after training: with the weights of that moment, and with the options of the closing evaluation."""
    before, after = [row for row in run.record if row["kind"] == "held out"]
    assert (before["step"], after["step"]) == (0, 2)
    trained = models.load_policy_for_evaluation(run.source, run.recipe, run.out / "best")
    sampling = sampling_of(run.recipe)
    assert sampling.options["repetition_penalty"] == 1.2  # the quickstart's evaluation.repetition_penalty
    for row, model in ((before, untrained), (after, trained)):
        prompts = row["prompts"]
        assert len(prompts) == 6
        assert row["texts"] == generate(model, run.tokenizer, prompts, sampling, 6)
    assert before["texts"] != after["texts"]  # else old weights would pass, too


def refusals_of(capsys, *settings: str) -> list[str]:
    """The last line of `check` and of `train`, both of which must refuse the settings."""
    told = []
    for verb in ("check", "train"):
        assert cli.main([verb, "quickstart", *SMALL, *settings]) == 2
        told.append(capsys.readouterr().err.strip().splitlines()[-1])
    return told


def test_a_context_that_is_too_small_is_refused(capsys, tmp_path):
    checked, trained = refusals_of(capsys, f"output_dir={tmp_path / 'run'}", "grpo.vllm_max_model_length=20")
    assert "grpo.vllm_max_model_length: 20: the longest prompt has" in checked and checked == trained


def test_a_server_that_does_not_run_is_told_before_the_weights_are_loaded(capsys, tmp_path):
    server = ["grpo.vllm_mode=server", "grpo.vllm_server_base_url=http://127.0.0.1:9", "grpo.vllm_server_timeout=1"]
    for told in refusals_of(capsys, f"output_dir={tmp_path / 'run'}", *server):
        assert told.startswith("rec-r1: grpo.vllm_mode: server: ") and "needs a CUDA device" in told


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a vLLM server on this CPU with the flags of `serve_command`, as far as a CPU has them.

    vllm-cpu's command `vllm serve` fails, because it looks for a package named vllm; the server's module does not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log.txt").open("w+")
    module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = ["--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs"]
    process = subprocess.Popen(
        [*module, "--model", models.resolve("smollm2-135m"), "--max-model-len", "512", *flags, "--enforce-eager",
         "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | FREE | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + TIMEOUT
    try:
        while True:
            log.seek(0)
            assert process.poll() is None and time.monotonic() < until, log.read()[-4000:]
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=10).status_code == 200:
                    break
            time.sleep(2)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def served(url: str, **more):
    args = grpo_config(config.load("quickstart", [*SMALL, "grpo.vllm_mode=server", f"grpo.vllm_server_base_url={url}"]))
    return SimpleNamespace(**vars(args) | {"device": SimpleNamespace(type="cuda")} | more)


def test_a_server_that_fits_is_accepted_and_one_that_does_not_is_refused(server):
    check_server(served(server), "org/SmolLM2", 512)
    with pytest.raises(config.UserError, match=r"takes 512 tokens, and .* has 513: restart it: .*--max-model-len 513 "):
        check_server(served(server), "org/SmolLM2", 513)


def test_a_training_on_a_cpu_ends_where_the_weights_would_be_sent(server, capsys, tmp_path):
    settings = ["grpo.vllm_mode=server", f"grpo.vllm_server_base_url={server}", f"output_dir={tmp_path / 'run'}"]
    for told in refusals_of(capsys, *settings):
        assert told.startswith("rec-r1: grpo.vllm_mode: server: TRL sends the weights to the server by NCCL")
        assert "grpo.vllm_mode=colocate" in told


def test_a_server_writes_the_greedy_completions_of_transformers(server, monkeypatch):
    """TRL's connection as in a training, without the group of processes that the weights are sent through."""
    from accelerate import Accelerator
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: None)  # The server has the same weights.
    recipe = config.load("quickstart", [*SMALL, "model.dtype=float32"])
    source = models.resolve("smollm2-135m")
    model, tokenizer = models.load_policy_for_evaluation(source, recipe, None), models.load_tokenizer(source)
    engine = VLLMGeneration(model, Accelerator(cpu=True), tokenizer, mode="server", server_base_url=server)
    trainer = SimpleNamespace(use_vllm=True, vllm_generation=engine, processing_class=tokenizer, model=model)
    sampling = sampling_of(recipe)
    prompts = ["a red heart", "words for a party: confetti,", "the weather today is"]
    written = generate_held_out(trainer, prompts, sampling, 3)
    assert written == generate(model, tokenizer, prompts, sampling, 3) and engine.generation_kwargs == {}
    assert len({*written}) == 3


def sampling_settings(name: str) -> tuple:
    """What decides about the importance ratio of a recipe: how it draws, and how TRL corrects."""
    recipe = config.load(name, ["grpo.use_vllm=true"])
    drawn = {k: v for k, v in sampling_of_rollouts(recipe).options.items() if k != "max_new_tokens"}
    correction = {k: v for k, v in recipe.grpo.items() if k.startswith("vllm_importance_sampling")}
    return tuple(sorted((drawn | correction).items(), key=str))


GROUPS: dict[tuple, list[str]] = {}
for _name in FOLDERS if INSTALLED else ():  # Reading the settings imports TRL.
    GROUPS.setdefault(sampling_settings(_name), []).append(_name)


def test_every_shipped_recipe_is_measured():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(config.shipped())


@pytest.mark.parametrize("names", GROUPS.values(), ids=lambda names: names[0])
def test_the_ratio_of_every_recipe_s_sampling(names, tmp_path, beir_folder, capsys):
    """One step at learning rate 0 of the first recipe with these settings.

    vLLM computes in bfloat16, as on a GPU, if the CPU has instructions for it, and the trainer in float32.
    """
    name, make = names[0], FOLDERS[names[0]]
    path = [] if make is None else [f"task.path={make(tmp_path, beir_folder)}"]
    dtype = str(models.fast_dtype()).removeprefix("torch.")
    metrics, record = train(
        tmp_path / "run", dtype, name, *path, "lora=null", "grpo.max_steps=1", "grpo.learning_rate=0.0",
        "grpo.num_generations=8", "grpo.per_device_train_batch_size=16", "grpo.beta=0.0",
        f"grpo.max_completion_length={min(32, config.load(name).grpo['max_completion_length'])}",
        "evaluation.every_steps=0", "evaluation.validation_limit=1", "evaluation.test_limit=2",
    )  # fmt: skip
    (row,) = [row for row in metrics if importance_ratio.MEAN in row]
    ratio, (rollout,) = row[importance_ratio.MEAN], generated(record)
    drawn, tokens = rollout["options"], row["completions/mean_length"]
    how = f"temperature {drawn['temperature']:g}, top_p {drawn['top_p']:g}; {dtype}"
    measured = f"{len(rollout['completions'])} completions of {tokens:.0f} tokens of {name}"
    with capsys.disabled():
        print(*(f"\n{recipe}: importance ratio {ratio:.3f} ({how}; {measured})" for recipe in names), sep="", end="")
    assert importance_ratio.LOW <= ratio <= importance_ratio.HIGH
    model = models.load_policy(models.resolve("smollm2-135m"), config.ModelConfig(dtype="float32")).eval()
    found = differences(model, rollout)
    assert sum(found) / len(found) < (0.05 if dtype == "bfloat16" else 1e-3)  # bfloat16 has 8 significant bits.
