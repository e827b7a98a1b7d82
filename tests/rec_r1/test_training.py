"""Real trainings of a tiny random model: through accelerate, with a broken retriever, logged to wandb, with grades."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rec_r1 import cli, train

pytestmark = [pytest.mark.slow, pytest.mark.curves]
ROOT = Path(__file__).parents[2]


def overrides(tiny_model: Path, out: Path, *more: str) -> list[str]:
    return [
        f"model.name={tiny_model}",
        "model.dtype=float32",
        "lora.layers_to_transform=0-1",
        f"output_dir={out}",
        "evaluation.every_steps=2",
        "evaluation.validation_limit=8",
        "evaluation.test_limit=20",
        "task.train_filter.raw_ndcg_below=0.9",
        "prompts_per_step=2",
        "grpo.num_generations=4",
        "grpo.max_completion_length=6",
        "grpo.save_steps=2",
        "grpo.max_steps=2",
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output[-6000:]
    return output


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_read_the_text_that_evaluation_reads(tiny_model, tmp_path):
    """A tokenizer may say how TRL parses chat messages. gpt-oss's template finds no content in a random text."""
    from transformers import AutoTokenizer
    from trl import chat_template_utils

    parsing = tmp_path / "model"
    shutil.copytree(tiny_model, parsing)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.response_template = chat_template_utils.gptoss_template
    tokenizer.save_pretrained(parsing)
    scored = []
    for name, model in (("plain", tiny_model), ("parsed", parsing)):
        more = ["format.chat=true", "evaluation.every_steps=0", "grpo.max_steps=1"]
        train.main(["quickstart", *overrides(model, tmp_path / name, *more)])
        found = rows(tmp_path / name / "rollouts.jsonl")
        scored.append([(row["completion"], row["action"], row["rewards"]) for row in found])
    assert scored[0] == scored[1] and all(text for text, *_ in scored[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "parsed" / "checkpoint-1").response_template is not None


def test_two_processes_through_accelerate(tiny_model, tmp_path):
    out = tmp_path / "run"
    # --multi_gpu is how accelerate spells "through torchrun"; with --cpu it starts one process, whatever is asked for
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    # Both trainings in one launch, since each process imports for longer than it trains.
    whole = tmp_path / "whole"
    four = "prompts_per_step=4"
    trainings = [
        ["quickstart", *overrides(tiny_model, out), four],
        ["quickstart", *overrides(tiny_model, whole), four, "speed.live_rows=false", "grpo.max_steps=1"],
    ]
    output = finish(start([*launch, str(Path(__file__).parent / "training_one_by_one.py"), json.dumps(trainings)]))
    assert "trained - raw query" in output and output.count("policy, curves and transcripts") == 2
    first, second = rows(out / "rollouts.jsonl"), rows(out / "rollouts.rank1.jsonl")
    assert len(first) == len(second) == 2 * 8
    assert {row["step"] for row in first} == {row["step"] for row in second} == {0, 1}
    assert {tuple(row["rewards"]) for row in first} == {tuple(row["rewards"]) for row in second}
    assert [row["query"] for row in first] != [row["query"] for row in second]
    steps = [row for row in rows(out / "metrics.jsonl") if "reward/ndcg@100" in row]
    assert [row["step"] for row in steps] == [1, 2]
    for step in (0, 1):  # what is logged is the mean over both ranks
        both = [row["rewards"]["ndcg@100"] for row in first + second if row["step"] == step]
        assert steps[step]["reward/ndcg@100"] == pytest.approx(sum(both) / 16, abs=1e-5)
    # With the rows of advantage 0 the gradient is the same; without them both processes keep equally many.
    (all_rows,) = [row for row in rows(whole / "metrics.jsonl") if "reward/ndcg@100" in row]
    assert all_rows["grad_norm"] == pytest.approx(steps[0]["grad_norm"], abs=1e-6) and all_rows["grad_norm"] > 0
    assert "speed/live_rows" not in all_rows and 0 < steps[0]["speed/live_rows"] < 1


@pytest.mark.parametrize("error", ["RetrieverError", "ValueError"])
def test_a_retriever_that_breaks_for_good_leaves_a_checkpoint(tiny_model, tmp_path, capsys, monkeypatch, error):
    monkeypatch.setenv("HF_TOKEN", "before")
    (tmp_path / f"breaking_{error}.py").write_text(
        "import retrievers\nfrom retrievers import RetrieverError\n\n"
        "class Breaking:\n    fingerprint, calls = 'b', 0\n"
        "    def __init__(self, inner):\n        self.inner = inner\n"
        "    def search(self, queries, k):\n        return self.inner.search(queries, k)\n"
        "    def ranks(self, queries, targets):\n        Breaking.calls += 1\n"
        f"        if Breaking.calls > 5:\n            raise {error}('equal ranks')\n"
        "        return self.inner.ranks(queries, targets)\n\n"
        "def build(catalog, folder=None):\n    return Breaking(retrievers.open('bm25', catalog))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    settings = [
        "grpo.max_steps=9",
        "grpo.hub_token=cAnary-0123",
        f"retriever.kind=breaking_{error}",
        "retriever.cache.memory_mb=0",
    ]
    assert train.main(["quickstart", *overrides(tiny_model, out, *settings)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "equal ranks" in message and "stopped with a checkpoint" in message and "--resume" in message
    last = max(out.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    assert (last / "trainer_state.json").is_file() and not (out / "best" / "training_args.bin").exists()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in files if b"cAnary" in path.read_bytes()]  # the checkpoints' pickled options, too


def test_wandb_offline_gets_the_components(tiny_model, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train.main(["quickstart", *overrides(tiny_model, tmp_path / "run", "grpo.report_to=[wandb]")]) == 0
    wandb.finish()  # what wandb does by itself when a process ends
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = log.read_bytes()
    for key in (b"reward/ndcg@100", b"reward/recall@100/std", b"scorer/echo", b"eval/ndcg@10"):
        assert key in logged


def test_beir_folder_with_grades_trains_evaluates_and_plots(tiny_model, beir_folder, tmp_path, capsys):
    out = tmp_path / "run"
    settings = ["task.name=beir", f"task.path={beir_folder}", "task.train_filter.raw_ndcg_below=1.01"]
    settings += ["rewards={ndcg@10: {gain: exponential}, length: {weight: 0.1, max_words: 4}}", "format.repeat=1"]
    assert train.main(["quickstart", *overrides(tiny_model, out, *settings)]) == 0
    assert "trained - untrained" in capsys.readouterr().out
    rollouts = rows(out / "rollouts.jsonl")
    assert set(rollouts[0]["rewards"]) == {"ndcg_exp@10", "length", "ndcg@10", "recall@100"}
    assert any(row["rewards"]["ndcg_exp@10"] != row["rewards"]["ndcg@10"] for row in rollouts)  # the grades matter
    for row in rollouts:
        assert row["reward"] == pytest.approx(row["rewards"]["ndcg_exp@10"] + 0.1 * row["rewards"]["length"], abs=1e-5)
    assert cli.main(["eval", str(out), "--split", "validation", "--metrics", "mrr@10"]) == 0
    assert "mrr@10 on validation" in capsys.readouterr().out
    assert cli.main(["plot", str(out), str(out), "-o", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "reward_curve.png").stat().st_size > 10_000
