"""A process of its own that writes completions. It may hang or die: requests then fail at once, and it is restarted."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rec_r1 import console
from rec_r1.config import UserError
from rec_r1.policy.completions import Write
from rec_r1.prompts import Prompt
from retrievers import ToolkitError

logger = logging.getLogger(__name__)
STUCK_S = 60.0  # Seconds after which a process that writes one batch is taken for stuck, and killed.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # The pause before a restart. It doubles each time.
SETTLED_S = 60.0  # After a process that ran for so many seconds, the pause is FIRST_PAUSE_S again.
LOADING, READY, DOWN = "loading", "ready", "down"


class DownError(Exception):
    """The policy cannot write now."""


class RefusedPromptError(ValueError):
    """The policy refuses a prompt, for example because it is too long. The message says why."""


class Worker:
    """The process that writes completions, and the thread that starts it again when it ends.

    load: loads what writes the completions, in the process. It can be pickled.
    stuck_s: seconds after which a process that writes one batch is killed.
    first_pause_s: the pause before the first restart, in seconds.
    """

    def __init__(
        self, load: Callable[[], Write], stuck_s: float = STUCK_S, first_pause_s: float = FIRST_PAUSE_S
    ) -> None:
        self.load = load
        self.stuck_s = stuck_s
        self.first_pause_s = first_pause_s
        self.state, self.reason, self.restarts = LOADING, "the policy is being loaded", 0
        self._loaded, self._stopping = threading.Event(), threading.Event()
        self._exchange = threading.Lock()  # Held while a batch is written, so that the connection is not closed then.
        self._connection: Connection | None = None
        self._process: Any = None
        self._thread = threading.Thread(target=self._supervise, daemon=True)

    @property
    def pid(self) -> int | None:
        """The process's id. None where there is no process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process. It loads the policy while this one goes on, see :meth:`wait`."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the policy is loaded for the first time. Raises UserError where it cannot be."""
        self._loaded.wait()
        if self.state != READY:
            raise UserError(self.reason)

    def stop(self) -> None:
        """End the process, and restart it no more."""
        self._stopping.set()
        self._kill()
        if self._thread.is_alive():
            self._thread.join()

    def write(self, asked: Sequence[Prompt], names: Sequence[str], progress: str | None = None) -> list[str]:
        """The completions of a batch, as `completions.Write`. It is called by one thread at a time.

        Raises DownError where the process is loading, down, dies meanwhile, or takes longer than ``stuck_s``, and
        RefusedPromptError for a prompt that the policy refuses.
        """
        with self._exchange:
            if self._connection is None:
                raise DownError(self.reason)
            try:
                self._connection.send((list(asked), list(names)))
                if not self._connection.poll(self.stuck_s):
                    self._kill()
                    raise DownError(f"the policy's process wrote nothing for {self.stuck_s:g} s and was killed")
                kind, content = self._connection.recv()
            except (EOFError, OSError) as error:
                raise DownError("the policy's process ended while it wrote") from error
        if kind == "refused":
            raise RefusedPromptError(content)
        return list(content)

    def _supervise(self) -> None:
        pause = self.first_pause_s
        while True:
            self.state, born = LOADING, time.monotonic()  # The reason stays: it says why there is a restart.
            reason = self._live()
            self.state, self.reason = DOWN, reason
            self._loaded.set()
            if time.monotonic() - born > SETTLED_S:
                pause = self.first_pause_s
            if self._stopping.is_set():
                return
            logger.warning("%s: requests get the raw query; it is restarted in %.0f s", reason, pause)
            if self._stopping.wait(pause):
                return
            self.restarts += 1
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _live(self) -> str:
        """Start one process and wait for its end. Returns why it ended."""
        spawn = multiprocessing.get_context("spawn")  # A forked process could not use a GPU that its parent uses.
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs, self.load), daemon=True, name="rec-r1 policy")
        try:
            process.start()
            self._process = process
            theirs.close()  # The process's own end is then the only one, and its death is seen here.
            if self._stopping.is_set():
                self._kill()
            with contextlib.suppress(EOFError, OSError):
                kind, content = ours.recv()
                if kind == "failed":
                    return str(content)
                with self._exchange:
                    self._connection = ours
                self.state, self.reason = READY, ""
                self._loaded.set()
                logger.info("the policy is ready (process %d)", process.pid)
            process.join()
            return f"the policy's process has ended (exit code {process.exitcode})"
        finally:
            with self._exchange:
                self._connection = None
                ours.close()

    def _kill(self) -> None:
        with contextlib.suppress(AttributeError, ValueError):  # There is no process yet, or it has been closed.
            self._process.kill()


def _work(connection: Connection, load: Callable[[], Write]) -> None:
    """The process: load the policy, then write a batch for each message, until the other side is gone."""
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the service ends this process.
    tqdm.set_lock(threading.RLock())  # Its own lock is a semaphore of the system, which a killed process leaves behind.
    console.setup()
    try:
        write = load()
    except (ToolkitError, OSError) as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", ""))
    while True:
        try:
            asked, names = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(("written", write(asked, names, None)))
        except UserError as error:
            connection.send(("refused", str(error)))
