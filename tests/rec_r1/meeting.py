"""One of three processes on two machines that meet without a training: machine 0 has two of them, machine 1 has one.

Each machine has a folder of its own in the folder that is given. The process prints what it found as one line of JSON.
"""

import json
import logging
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from rec_r1 import config, console
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.runs import machines, processes

TIMEOUT = 3  # seconds that the trainer's own group waits

BUILDER = f"""
import time
import retrievers

def build(catalog, folder=None):
    if not folder.is_dir():
        time.sleep({2 * TIMEOUT})
        folder.mkdir(parents=True)
    return retrievers.open("bm25", catalog)
"""


def message(function) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "no error"


def fails(rank: int):
    if PartialState().process_index == rank:
        raise UserError("not here")


def main(root: Path) -> None:
    console.setup()
    state = PartialState(cpu=True, timeout=timedelta(seconds=TIMEOUT))
    machine = int(os.environ["MACHINE"])
    own, found = root / f"machine-{machine}", {"rank": state.process_index}
    found["errors"] = [message(lambda: processes.on_each_machine(lambda: fails(2)))]
    found["errors"].append(message(lambda: processes.on_main_process(lambda: fails(0))))
    found["from_main"] = processes.on_main_process(lambda: machine)
    found["separate"] = [machines.are_separate(own / "run"), machines.are_separate(root / "shared")]

    # Each process writes its part of a checkpoint; machine 1 also has one that machine 0 has removed.
    checkpoint = own / "run" / "checkpoint-4"
    (checkpoint / "shards").mkdir(parents=True, exist_ok=True)
    (checkpoint / "shards" / f"shard_{state.process_index}.pth").write_bytes(bytes([state.process_index]) * 1000)
    if state.process_index == 0:
        (checkpoint / "weights").write_bytes(os.urandom(3_000_000))
        (checkpoint / "trainer_state.json").write_text("{}")
        (checkpoint / "empty").touch()
    if state.process_index == 2:
        (checkpoint / "weights").write_bytes(b"a part")
        (own / "run" / "checkpoint-2").mkdir()
    processes.CHUNK = 1 << 20  # The weights are sent in three pieces.
    machines.copy_checkpoint(own / "run", 4)

    # A file cannot be written on machine 1: every process says so.
    if state.process_index == 0:
        (own / "run" / "checkpoint-6").mkdir()
        (own / "run" / "checkpoint-6" / "a").write_bytes(b"a")
    if state.process_index == 2:
        (own / "run" / "checkpoint-6" / "a").mkdir(parents=True)
    found["unwritable"] = message(lambda: machines.copy_checkpoint(own / "run", 6))

    # An index that takes longer than the trainer's group waits, once on each machine: they have caches of their own.
    processes.PATIENCE = 0.5
    os.environ["REC_R1_CACHE"] = str(own / "cache")
    if state.process_index != 0 and not processes.group().is_first:
        logging.getLogger("rec_r1").setLevel(logging.ERROR)
    started = time.monotonic()
    env = open_environment(config.load("quickstart", ["retriever.kind=slow_build"]))
    processes.wait("build")
    found["waited"] = time.monotonic() - started > 2 * TIMEOUT and len(env.task.catalog) > 0
    state.wait_for_everyone()  # The trainer's group has not timed out.
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
