"""What the processes of a training decide and wait for together, on one machine or on several.

They communicate through a gloo group of their own, with a timeout of days, because a process may have to wait long
while another one builds an index or downloads a model. The trainer's own group gives up after `grpo.ddp_timeout`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from rec_r1.config import UserError
from rec_r1.console import of_file
from retrievers import RetrieverError
from retrievers.core.index_folder import naming
from retrievers.types import ToolkitError

T = TypeVar("T")
logger = logging.getLogger(__name__)
LONGEST_WAIT = timedelta(days=2)  # Longer than any download, and than building any index.
PATIENCE = 20.0  # A process that has waited for so many seconds logs what it waits for.
CHUNK = 1 << 26  # Files are copied in pieces of so many bytes.


@dataclass(frozen=True)
class Group:
    """The processes of a training, and the machines on which they run.

    everyone: the torch process group of all processes.
    firsts: the torch process group of the first process of each machine.
    rank: the number of this process, from 0. Process 0 is the main one.
    leaders: the number of the first process of each machine, ascending. Machine 0 has the main process.
    hosts: the host name of each machine.
    """

    everyone: Any
    firsts: Any
    rank: int
    leaders: list[int]
    hosts: list[str]

    @property
    def machine(self) -> int:
        """The number of this process's machine, from 0."""
        return self.machine_of(self.rank)

    def machine_of(self, rank: int) -> int:
        """The number of the machine of a process."""
        return max(number for number, leader in enumerate(self.leaders) if leader <= rank)

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.rank in self.leaders

    def name(self, machine: int) -> str:
        """A machine in a message: its number and its host name."""
        return f"machine {machine} ({self.hosts[machine]})"


def launched() -> int:
    """The number of processes that the launcher has started. It is known before they are connected."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def group() -> Group | None:
    """The processes of this training, connected. None where there is only one process.

    Raises UserError where the processes cannot connect.
    """
    if launched() == 1:
        return None
    from accelerate import PartialState
    from torch import distributed

    state = PartialState()
    if state.num_processes == 1:
        return None
    try:
        everyone = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        each: list[Any] = [None] * state.num_processes
        distributed.all_gather_object(each, (state.local_process_index, socket.gethostname()), everyone)
        leaders = [rank for rank, (local, _) in enumerate(each) if local == 0]
        firsts = distributed.new_group(leaders, backend="gloo", timeout=LONGEST_WAIT)
    except RuntimeError as error:
        raise UserError(
            f"the processes of the training cannot connect ({_first_sentence(error)}): set GLOO_SOCKET_IFNAME on every "
            "machine to the network interface that reaches the others, such as eth0"
        ) from error
    return Group(everyone, firsts, state.process_index, leaders, [each[rank][1] for rank in leaders])


def machines() -> int:
    """The number of machines."""
    together = group()
    return 1 if together is None else len(together.leaders)


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of the processes."""
    together = group()
    if together is None:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value, together.everyone)
    return values


def agree(error: Exception | None) -> None:
    """Raise the first error of any process on every process, with the machine's name where there are several machines.

    error: the error of this process. None = it has none.
    """
    together = group()
    if together is None:
        if error is not None:
            raise error
        return
    failed = [(rank, one) for rank, one in enumerate(gather(error)) if one is not None]
    if not failed:
        return
    rank, first = failed[0]
    if machines() == 1:
        raise first
    text = of_file(first) if isinstance(first, OSError) else str(first)
    kind: type[ToolkitError] = RetrieverError if isinstance(first, RetrieverError) else UserError
    raise kind(f"{together.name(together.machine_of(rank))}: {text}") from first


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of a function, and its error, if it is one about which a user can do something."""
    try:
        return function(), None
    except (ToolkitError, OSError) as error:
        return None, error


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the main process only, and return its result, or raise its error, on every process.

    A function that reads the run's folder must be called once, because another process may write to it meanwhile. The
    errors are ToolkitError and OSError.
    """
    together = group()
    result, error = _attempt(function) if together is None or together.rank == 0 else (None, None)
    agree(error)
    return gather(result)[0]  # type: ignore[return-value]  # Without an error it is a result of the function.


def on_each_machine(function: Callable[[], T]) -> list[T]:
    """Call a function on the first process of each machine.

    Returns the results of all machines, or raises the first error, on every process.
    """
    together = group()
    result, error = _attempt(function) if together is None or together.is_first else (None, None)
    agree(error)
    results: list[Any] = gather(result)
    return results if together is None else [results[leader] for leader in together.leaders]


def first_on_each_machine(function: Callable[[], T], what: str) -> T:
    """Call a function on the first process of each machine, and then on the others, which find its files there.

    function: what all processes call. An error of a first process is raised on every process.
    what: what the function does, for the messages of processes that wait: "read the data".
    """
    together = group()
    if together is None:
        return function()
    if not together.is_first:
        agree(None)
        return function()
    with _said_later(f"the other processes of this machine wait for this one to {what}"):
        result, error = _attempt(function)
    with _said_later(f"waiting for the other machines to {what}"):
        agree(error)
    return result  # type: ignore[return-value]  # Without an error it is a result of the function.


def wait(what: str) -> None:
    """Wait until all processes call this. ``what``: what they do before, for the message after a long wait."""
    with _said_later(f"waiting for the other processes to {what}"):
        gather(None)


@contextlib.contextmanager
def _said_later(message: str) -> Iterator[None]:
    """Log a message if the block takes longer than PATIENCE."""
    timer = threading.Timer(PATIENCE, logger.info, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def copy_to_machines(path: Path, size: int, owner: int, wanted: bool) -> None:
    """Copy a file from one machine to others. All processes call it, and the first process of each machine copies.

    path: where the file is, and where it is written. It appears there when it is complete.
    size: its size in bytes.
    owner: the machine that has it.
    wanted: whether it is written on this machine.

    Raises UserError on every process where the file cannot be read or written on some machine.
    """
    together = group()
    assert together is not None
    agree(_copy(path, size, together, owner, wanted) if together.is_first else None)


def _copy(path: Path, size: int, together: Group, owner: int, wanted: bool) -> OSError | None:
    """Send or receive a file, see :func:`copy_to_machines`. Returns the error of this machine, if there is one.

    After an error it goes on sending or receiving, so that the other machines do not wait for it.
    """
    import torch
    from torch import distributed

    error: OSError | None = None
    sends, temporary = together.machine == owner, path.with_name(f".{path.name}.tmp")

    def attempt(action: Callable[[], T]) -> T | None:
        nonlocal error
        try:
            with naming(path):
                return action() if error is None else None
        except OSError as failed:
            error = failed
            return None

    if wanted:
        attempt(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    file: Any = attempt(lambda: path.open("rb") if sends else temporary.open("wb")) if sends or wanted else None
    piece = torch.empty(min(CHUNK, size), dtype=torch.uint8)
    for start in range(0, size, CHUNK):
        part = piece[: min(CHUNK, size - start)]
        if sends:
            attempt(lambda part=part: file.readinto(part.numpy()))  # type: ignore[misc]
        distributed.broadcast(part, together.leaders[owner], together.firsts)
        if wanted:
            attempt(lambda part=part: file.write(part.numpy()))  # type: ignore[misc]
    if file is not None:
        try:
            file.close()
        except OSError as failed:
            error = error or failed
    if wanted:
        attempt(lambda: temporary.replace(path))
    if error is not None:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return error


@contextlib.contextmanager
def naming_lost_connection(fix: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a lost connection to another process into a ToolkitError of one line.

    fix: returns what the user can do, for the message. It is called after such an error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ToolkitError(
            f"the connection to another process of this training was lost ({_first_sentence(error)}): a process or a "
            f"machine has ended, and its own output says why: {fix()}"
        ) from error


def is_lost(error: Exception) -> bool:
    """Whether an error says that the connection to another process is lost. gloo raises plain RuntimeErrors."""
    if launched() == 1 or isinstance(error, ToolkitError) or not isinstance(error, RuntimeError):
        return False
    from torch import distributed

    if "EADDRINUSE" in str(error):  # A port is in use, so no connection was made.
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _first_sentence(error: Exception) -> str:
    """The first sentence of an error of torch, without the place in its source and without advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).partition(". ")[0][:200]
