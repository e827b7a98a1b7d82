"""The folders of a run on several machines: one that they share, or one on each machine.

Where each machine has a folder of its own, that of machine 0, which has the main process, is the run: it decides from
where a training continues, and holds the logs, `best/` and the evaluations. The other machines hold the rollouts of
their processes, and copies of `config.yaml`, `run.json` and of all checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.config import RUN_FILE, Recipe, UserError
from rec_r1.runs import checkpoints, lock, processes, run_config

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder on every machine, so that no other training checks it or writes to it.

    Raises UserError, the same on every process, where another training holds the lock of some machine.
    """
    together = processes.group()
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            runs.refuse_unwritable(folder)
            stack.enter_context(lock.held(folder, training))

        training = processes.on_main_process(lambda: uuid.uuid4().hex)
        processes.on_main_process(hold)  # Before the other machines, which may share the folder.
        processes.on_each_machine(lambda: hold() if together is not None and together.machine > 0 else None)
        yield


def prepare(recipe: Recipe, resume: bool) -> None:
    """Check on every machine that a run may start or continue in its output_dir, see `runs.prepare`.

    A machine whose folder is empty may take part in a run that is resumed: its files are copied to it. Machine 0 may
    not, because the run is in its folder.

    Raises UserError, the same on every process, where the run may not start or continue on some machine.
    """
    folder = Path(recipe.output_dir)
    together = processes.group()
    if together is not None and resume:
        holds = processes.on_each_machine(lambda: (folder / RUN_FILE).is_file())
        was = processes.on_each_machine(lambda: runs.read_info(folder).get("machine"))
        if (not holds[0] and any(holds)) or (was[0] != 0 and 0 in was):
            other = was.index(0) if 0 in was else holds.index(True)
            raise UserError(
                f"--resume: {together.name(0)} does not hold the run, and {together.name(other)} holds it, or a copy "
                "of its checkpoints: give each machine the --machine_rank that it had, with rdzv_backend: static; or, "
                "if the disk of machine 0 was lost, copy the other's output_dir to it, which lacks logs and best policy"
            )
    takes_copies = together is not None and together.machine > 0
    processes.on_each_machine(lambda: runs.prepare(recipe, resume, takes_copies))


def are_separate(folder: Path) -> bool:
    """Make the run's folder on every machine. Returns whether each machine has a folder of its own.

    Raises UserError where some machines share a folder and others do not.
    """
    processes.on_each_machine(lambda: folder.mkdir(parents=True, exist_ok=True))
    together = processes.group()
    if together is None or processes.machines() == 1:
        return False
    # Each machine writes a file. Machines that see each other's file share a folder. Each file has a new name, because
    # NFS may remember for a while whether a known name exists.
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    processes.on_each_machine(probe.touch)
    names = processes.on_each_machine(lambda: probe.name)
    seen = processes.on_each_machine(lambda: [(folder / name).exists() for name in names])
    processes.on_each_machine(lambda: probe.unlink(missing_ok=True))
    if all(all(row) for row in seen):
        return False
    sharing = _sharing(seen)
    if sharing is not None:
        raise UserError(
            f"output_dir: {together.name(sharing[0])} shares its folder with {together.name(sharing[1])}, and not with "
            "all others: give all machines one shared folder, or each machine a folder of its own"
        )
    return True


def _sharing(seen: Sequence[Sequence[bool]]) -> tuple[int, int] | None:
    """Two machines that share a folder, or None. ``seen``: for each machine, whether it sees each machine's file."""
    for machine, row in enumerate(seen):
        for other, sees in enumerate(row):
            if sees and other != machine:
                return machine, other
    return None


def equal_on_all(info: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a run, from `runs.describe`, if all machines have the same data, model and retriever.

    Raises UserError, the same on every process, where they differ.
    """
    together = processes.group()
    facts = processes.on_each_machine(lambda: run_config.facts_that_stay(info))
    for machine, other in enumerate(facts):
        for key, value in facts[0].items():
            if other[key] != value and together is not None:
                raise UserError(
                    f"{key}: {together.name(machine)} has {other[key]!r}, and {together.name(0)} has {value!r}: give "
                    "all machines the same data, model and settings"
                )
    return info


def begin(recipe: Recipe, step: int, info: dict[str, Any], resume: bool) -> None:
    """Write run.json and config.yaml, see `runs.begin`, in the folder of each machine.

    For a run that is resumed, copy the checkpoint of ``step`` to the machines that lack it or a part of it.

    recipe: the recipe.
    step: the step from which the run continues. 0 = the beginning.
    info: the facts of the run, from `runs.describe`.
    resume: whether the run is resumed.

    Raises UserError, the same on every process, where a machine's folder holds another run, and where a machine cannot
    read its copy of the checkpoint.
    """
    folder, together = Path(recipe.output_dir), processes.group()
    if together is None or not are_separate(folder):
        processes.on_main_process(lambda: runs.begin(recipe, step, info, resume))
        return
    info = info | {"machine": together.machine}
    processes.on_each_machine(lambda: run_config.refuse_changed_facts(runs.read_info(folder), info))
    # The other machines begin after machine 0, so that none of them ever holds a run that machine 0 lacks.
    processes.on_main_process(lambda: runs.begin(recipe, step, info, resume))
    processes.on_each_machine(lambda: runs.begin(recipe, step, info, resume) if together.machine > 0 else None)
    logger.info(
        "each machine has an output_dir of its own: %s holds the run, and the others hold copies", together.name(0)
    )
    checkpoint = folder / f"checkpoint-{step}"
    has = processes.on_each_machine(checkpoint.is_dir)
    if any(has):
        for machine in (number for number, own in enumerate(has) if not own):
            logger.warning("--resume: %s lacks %s, which is copied to it", together.name(machine), checkpoint.name)
        copy_checkpoint(folder, step)
        processes.on_each_machine(lambda: _check_copy(checkpoint))


def _check_copy(checkpoint: Path) -> None:
    """Raise UserError where training cannot continue from this machine's copy of a checkpoint."""
    reason = checkpoints.problem(checkpoint)
    if reason is not None:
        raise UserError(f"--resume: {checkpoint}: {reason}: delete this folder, and it is copied from machine 0 again")


def copy_checkpoint(folder: Path, step: int) -> None:
    """Copy the files of a checkpoint to the machines that lack them, and remove checkpoints that machine 0 has removed.

    Each process writes only a part of a checkpoint: the main process the weights, every process its random numbers,
    and with sharding every process its shard. After this, the folder of each machine is complete.

    folder: the run's folder.
    step: the step of the checkpoint.
    """
    together = processes.group()
    assert together is not None
    place = folder / f"checkpoint-{step}"
    processes.wait("save their parts of the checkpoint")
    sizes = processes.on_each_machine(lambda: _sizes(place))
    # The trainer writes trainer_state.json last, and a checkpoint without it counts as incomplete.
    for name in sorted(set().union(*sizes), key=lambda name: (name == "trainer_state.json", name)):
        owner = next(machine for machine, own in enumerate(sizes) if name in own)
        size = sizes[owner][name]
        if any(own.get(name) != size for own in sizes):
            processes.copy_to_machines(place / name, size, owner, sizes[together.machine].get(name) != size)
    kept = set(processes.on_main_process(lambda: [path.name for path in checkpoints.found(folder)]))
    processes.on_each_machine(lambda: _remove_others(folder, kept))


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The size in bytes of each file of a checkpoint, by its path inside the folder."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def _remove_others(folder: Path, kept: set[str]) -> None:
    for path in checkpoints.found(folder):
        if path.name not in kept:
            shutil.rmtree(path)


def to_resume(folder: Path) -> str:
    """What a user can do after a process has been lost: a sentence that names the newest complete checkpoint."""
    found = (path.name for path in checkpoints.found(folder) if checkpoints.problem(path) is None)
    newest = next(found, None)
    last = f"the newest complete checkpoint here is {newest}" if newest else "no checkpoint was complete"
    return f"start all machines again with --resume ({last})"
