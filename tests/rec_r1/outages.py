"""What the tests share in which the server of a run's retriever is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Settings with which the quickstart takes seconds a step.
TINY = [
    "lora.layers_to_transform=0-1", "evaluation.validation_limit=4", "evaluation.test_limit=20",
    "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0", "prompts_per_step=2",
    "grpo.max_completion_length=4", "grpo.num_generations=4", "grpo.logging_steps=1",
]  # fmt: skip
# Settings of a run that stops at the third batch without an answer. Nothing is answered from a cache.
STOPS_SOON = ["retriever.error_steps=3", "grpo.save_steps=100", "retriever.cache.memory_mb=0"]
KILLED_WITHIN_S = 300
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(*arguments: str, **env: str) -> subprocess.Popen:
    """Start a command of `rec-r1`. env: variables of its environment, beside those of the tests."""
    return subprocess.Popen(
        [sys.executable, "-m", "rec_r1.cli", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def serve(port: int, *settings: str) -> subprocess.Popen:
    """Serve the quickstart's retriever, and wait until it answers."""
    process = start("serve", "quickstart", "--port", str(port), *settings)
    assert process.stdout is not None
    for line in process.stdout:
        if "over 1,854 documents" in line:
            return process
    raise AssertionError(f"the server ended with {process.wait()}")


def end(server: subprocess.Popen) -> None:
    """Kill a process that a test has started."""
    server.send_signal(signal.SIGKILL)
    server.communicate(timeout=30)


def rows(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a file of a run."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def error_rates(out: Path) -> dict[int, float]:
    """Step -> the share of completions for which the retriever failed."""
    return {row["step"]: row["retrieval/error_rate"] for row in rows(out) if "retrieval/error_rate" in row}


@contextmanager
def killed_after_step(kill: Callable[[], None], out: Path, step: int) -> Iterator[None]:
    """Call ``kill`` while the block runs, once the run in ``out`` has logged a step."""

    ended = threading.Event()

    def wait() -> None:
        log, deadline = out / "metrics.jsonl", time.monotonic() + KILLED_WITHIN_S
        while time.monotonic() < deadline and not (log.exists() and f'"step": {step},' in log.read_text()):
            if ended.wait(0.02):
                return
        kill()

    killer = threading.Thread(target=wait)
    killer.start()
    try:
        yield
    finally:
        ended.set()
        killer.join()


def assert_stopped_by_the_outage(out: Path, output: str, where: str) -> int:
    """A run whose retriever was killed ended with a checkpoint and the reason, and gave no reward without an answer.

    output: all that was printed.
    where: a part of the server's address.

    Returns its last step.
    """
    message = output.strip().splitlines()[-1]
    assert message.startswith("rec-r1: the retriever failed for 100% of the completions in the last 3 batches")
    assert "--resume" in message and where in message and "Traceback" not in output
    rates = error_rates(out)
    last = max(rates)
    assert [rates[step] for step in range(last - 2, last + 1)] == [1.0] * 3 and rates[1] == 0.0
    rollouts = rows(out, "rollouts.jsonl")
    assert any(row["failed"] for row in rollouts)
    assert all((row["reward"] is None) == row["failed"] for row in rollouts)
    assert (out / f"checkpoint-{last}").is_dir()
    return last


def assert_continued(out: Path, last: int) -> None:
    """A run that had stopped after step ``last`` was resumed for two steps, in which the retriever answered."""
    rates = error_rates(out)
    assert max(rates) == last + 2 and rates[last + 1] == rates[last + 2] == 0.0
