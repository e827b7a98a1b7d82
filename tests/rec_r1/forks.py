"""Processes that are forks of one process, which has imported TRL for all of them.

A fork is a process like any other: it has an id, variables, a working folder and an output of its own, and it can be
killed. A process that starts anew spends seconds on its imports alone.
"""

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

import psutil

CONTEXT = multiprocessing.get_context("forkserver")
# accelerate passes these to torchrun: the processes of a launch are forks of the launcher and run a file, no module.
FORKS_OF_A_LAUNCHER = {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}


class Fork:
    """A process that runs a program, as `python PROGRAM ARGUMENTS` would.

    program: the file of a program, or a module, which is run as `python -m` runs it.
    log: the file that gets what the process prints.
    folder: its working folder.
    environment: variables beside those of the tests.
    """

    def __init__(
        self, program: Path | str, arguments: Sequence[str], log: Path, folder: Path, **environment: str
    ) -> None:
        start_server()
        self.log = log
        variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | environment
        self.process = CONTEXT.Process(target=_run, args=(program, list(arguments), log, folder, variables))
        self.process.start()

    @property
    def code(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process and all that it has started. A launcher starts its workers in sessions of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            for one in [*started.children(recursive=True), started]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.join()


def finish(started: Sequence[Fork], seconds: float) -> list[str]:
    """What processes have printed, which must end within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        for one in started:
            one.process.join(max(1, deadline - time.monotonic()))
            assert one.code is not None, one.log.read_text()[-6000:]
    finally:
        for one in started:
            one.kill()
    return [one.log.read_text() for one in started]


def start_server() -> None:
    """Start the process of which all are forks, unless it runs. It imports `preloaded`, which it finds by its path."""
    CONTEXT.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(program: Path | str, arguments: list[str], log: Path, folder: Path, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import preloaded  # noqa: F401  # It is there already. Had its import failed, the reason would be in the log.

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
