"""One of three processes on two machines that meet without a training: machine 0 has two of them, machine 1 has one.

Each machine has a folder of its own in the folder that is given. The process prints what it found as one line of JSON.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from runs_ import INFO, checkpoint

from rec_r1 import config, console
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.runs import machines, processes

TIMEOUT = 3  # seconds that the trainer's own group waits: less than test_machines.BUILD_S


def message(function: Callable[[], object]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "no error"


def only_on(rank: int, function: Callable[[], object]) -> None:
    """Call a function on one process, while the others wait."""
    if PartialState().process_index == rank:
        function()
    processes.wait("do it")


def refuse(where: int) -> None:
    if PartialState().process_index == where:
        raise UserError("not here")


def decide(root: Path, own: Path) -> dict:
    return {
        "errors": [
            message(lambda: processes.on_each_machine(lambda: refuse(2))),
            message(lambda: processes.on_main_process(lambda: refuse(0))),
        ],
        "decided": processes.on_main_process(lambda: PartialState().process_index),
        "separate": [machines.are_separate(own / "probed"), machines.are_separate(root / "shared")],
    }


def lock_a_folder(folder: Path) -> str:
    """The error of a second training, while this one holds the lock of a folder, which its machines may share."""
    with machines.alone_in(folder):
        return message(lambda: machines.alone_in(folder).__enter__())


def write_parts(run: Path) -> None:
    """What the trainer leaves: the main process saves the policy, and every process its random numbers."""
    rank = PartialState().process_index
    if rank == 0:
        (checkpoint(run, 4) / "rng_state.pth").unlink()
        (run / "checkpoint-4" / "large").write_bytes(os.urandom(3_000_000))
    processes.wait("save")
    (run / "checkpoint-4" / "shards").mkdir(parents=True, exist_ok=True)
    (run / "checkpoint-4" / "shards" / f"empty_{rank}").touch()
    torch.save({"rank": rank}, run / "checkpoint-4" / f"rng_state_{rank}.pth")
    if rank == 2:  # A copy that was killed, and a checkpoint that machine 0 has removed since.
        (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"a part")
        (run / "checkpoint-2").mkdir()


def start_and_resume(own: Path) -> dict:
    """Fresh runs, resumed runs, and folders in which neither is possible."""
    run, found = own / "run", {}
    recipe = dataclasses.replace(config.load("quickstart"), output_dir=str(run))
    info = INFO | {"processes": 3}
    only_on(2, lambda: (run / "mine").mkdir(parents=True))
    found["not empty"] = message(lambda: machines.prepare(recipe, False))
    only_on(2, lambda: (run / "mine").rmdir())
    machines.prepare(recipe, False)
    other = info | {"data_fingerprint": "e"} if PartialState().process_index == 2 else info
    found["other data"] = message(lambda: machines.equal_on_all(other))
    machines.begin(recipe, 0, info, False)
    write_parts(run)
    processes.CHUNK = 1 << 20  # The large file is sent in three pieces.
    machines.copy_checkpoint(run, 4)
    only_on(2, lambda: (run / "checkpoint-4" / "scheduler.pt").write_bytes(bytes(len(scheduler(run)))))
    machines.prepare(recipe, True)
    found["damaged"] = message(lambda: machines.begin(recipe, 4, info, True))
    only_on(2, lambda: shutil.rmtree(run))  # This machine was replaced.
    machines.prepare(recipe, True)
    machines.begin(recipe, 4, info, True)
    only_on(0, lambda: run.rename(own / "moved"))
    found["lost"] = message(lambda: machines.prepare(recipe, True))
    only_on(0, lambda: shutil.copytree(own / "moved", run))
    for rank, machine in ((0, 1), (2, 0)):
        facts = json.dumps(info | {"machine": machine})
        only_on(rank, lambda facts=facts: (run / "run.json").write_text(facts))
    found["swapped"] = message(lambda: machines.prepare(recipe, True))
    only_on(2, lambda: (run / "checkpoint-6" / "a").mkdir(parents=True))
    only_on(0, lambda: (run / "checkpoint-6").mkdir())
    only_on(0, lambda: (run / "checkpoint-6" / "a").write_bytes(b"a"))
    found["cannot be written"] = message(lambda: machines.copy_checkpoint(run, 6))
    return found


def scheduler(run: Path) -> bytes:
    return (run / "checkpoint-4" / "scheduler.pt").read_bytes()


def wait_for_a_slow_index(own: Path) -> float:
    """The seconds for which this process waited for an index that takes longer than the trainer's group waits."""
    os.environ["REC_R1_CACHE"] = str(own / "cache")
    processes.PATIENCE = 0.5
    if not processes.group().is_first:
        logging.getLogger("rec_r1").setLevel(logging.ERROR)
    started = time.monotonic()
    open_environment(config.load("quickstart", ["retriever.kind=slow_build"]))
    processes.wait("build")
    seconds = time.monotonic() - started
    PartialState().wait_for_everyone()  # The trainer's group still works.
    return seconds


def main(root: Path) -> None:
    console.setup()
    rank = PartialState(cpu=True, timeout=timedelta(seconds=TIMEOUT)).process_index
    own = root / f"machine-{rank // 2}"
    locks = {"locks": [lock_a_folder(root / "shared"), lock_a_folder(own / "locked")]}
    found = decide(root, own) | locks | start_and_resume(own) | {"waited": wait_for_a_slow_index(own)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
