"""Trains runs to their end in processes that are interrupted, and killed at known and at random moments.

Each attempt is a fork of this process, which is a fork itself (forks.py), and computes nothing.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rec_r1 import train
from rec_r1.runs import rollouts
from rec_r1.training import callbacks

KILLS = 3  # of one run, at most: then it may end
rollouts.PART_BYTES = 6_000  # so that such short runs have closed parts, too


def attempt(
    arguments: list[str], log: Path, seconds: float | None = None, signals: Callable[[], None] | None = None
) -> int | None:
    """Train in a process of its own, and return its exit code, or None where it was killed.

    seconds: when it is killed. None = it is not.
    signals: is called in that process before it trains, and arranges the signals that it gets.
    """
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            if signals is not None:
                signals()
            os._exit(train.main(arguments))
        finally:
            sys.stderr.flush()
            os._exit(70)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def signalled_after(step: int, how: signal.Signals) -> None:
    """Arrange that this process sends itself a signal when the step is logged."""
    log, sent = callbacks.Log.on_log, []

    def on_log(self, args, state, control, logs=None, **named):
        log(self, args, state, control, logs=logs, **named)
        if state.global_step == step and "reward" in logs and not sent:
            sent.append(step)
            os.kill(os.getpid(), how)

    callbacks.Log.on_log = on_log


def report(**row) -> None:
    print(json.dumps(row), flush=True)


def at_a_step(folder: Path, run: str, how: signal.Signals, step: int, arguments: list[str]) -> None:
    """A run that gets a signal after a step, is refused without --resume, and goes on with it."""
    out, log = folder / run, folder / f"{run}.log"
    command = [*arguments, f"output_dir={out}"]
    stopped = attempt(command, log, signals=lambda: signalled_after(step, how))
    said = log.read_text()
    last = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    refused = attempt(command, folder / f"{run}.refused.log")
    report(run=run, stopped=stopped, last=last, said=said, refused=refused, code=attempt([*command, "--resume"], log))


def at_random(folder: Path, kills: int, length: float, arguments: list[str]) -> None:
    """``kills`` runs, each killed at one to KILLS moments and resumed in between."""
    chance = random.Random(int(os.environ.get("REC_R1_KILL_SEED", "0")))
    for run in range(kills):
        out, log = folder / f"cut{run}", folder / f"cut{run}.log"
        killed: list[float] = []
        while not killed:  # a run that ended before its moment proves nothing: it is made again, with an earlier one
            shutil.rmtree(out, ignore_errors=True)
            planned = [chance.uniform(0, length) for _ in range(chance.randint(1, KILLS))]
            code = None
            while code is None:
                seconds, began = planned.pop() if planned else None, time.monotonic()
                resume = ["--resume"] if (out / "config.yaml").is_file() else []
                code = attempt([*arguments, f"output_dir={out}", *resume], log, seconds)
                if code is None:
                    killed.append(round(seconds or 0, 2))
            if not killed:
                length = time.monotonic() - began
        report(run=f"cut{run}", code=code, killed_after=killed, of=round(length, 2))


def main(folder: Path, kills: int, arguments: list[str]) -> None:
    started = time.monotonic()
    assert attempt([*arguments, f"output_dir={folder / 'whole'}"], folder / "whole.log") == 0
    length = time.monotonic() - started
    at_a_step(folder, "killed", signal.SIGKILL, 5, arguments)
    at_a_step(folder, "interrupted", signal.SIGINT, 4, arguments)
    at_random(folder, kills, length, arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
