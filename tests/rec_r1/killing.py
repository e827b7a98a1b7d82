"""Trains a run to its end in processes that are killed at random moments. The libraries are loaded once: each attempt
is a fork, made before anything was computed."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import transformers  # noqa: F401  loaded before the fork
import trl  # noqa: F401

from rec_r1 import train
from rec_r1.runs import rollouts
from rec_r1.training import callbacks  # noqa: F401

KILLS = 3  # of one run, at most: then it may end
rollouts.PART_BYTES = 6_000  # so that such short runs have closed parts, too


def attempt(arguments: list[str], log: Path, seconds: float | None) -> int | None:
    """Train in a process of its own. Its exit code, None where it was killed after ``seconds``."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            os._exit(train.main(arguments))
        finally:
            sys.stderr.flush()
            os._exit(70)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def main(folder: Path, kills: int, arguments: list[str]) -> None:
    """One run to the end, then ``kills`` others, each killed at one to KILLS moments and resumed in between."""
    started = time.monotonic()
    assert attempt([*arguments, f"output_dir={folder / 'whole'}"], folder / "whole.log", None) == 0
    length = time.monotonic() - started
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
        print(json.dumps({"run": run, "code": code, "killed_after": killed, "of": round(length, 2)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
