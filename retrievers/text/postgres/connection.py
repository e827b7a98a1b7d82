"""Connections to PostgreSQL: a pool of read-only sessions, and which of its errors may pass."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Lock, Timer
from typing import Any, TypeAlias

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout

from retrievers.text.postgres.params import SECRETS
from retrievers.types import RetrieverError

Connection: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"
# TCP finds out after about half a minute that a machine is gone, instead of after two hours.
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
GRACE = 5.0  # The client waits for so many seconds longer than the server, which ends a statement itself.
# The codes of a connection that is lost: their class, and those of a server that is shut down, has crashed, starts, or
# ends idle sessions. A connection that fails has no code.
LOST = ("08", "57P01", "57P02", "57P03", "57P05")
READ_ONLY, NOT_READY, TOO_LONG = "25006", "55000", "54000"
# The codes, or their classes, of what another attempt cannot change: a missing feature, invalid data, a missing schema,
# table, column, extension or permission, a limit of PostgreSQL, a session that may not write, and a view without data.
# Source: https://www.postgresql.org/docs/18/errcodes-appendix.html
PERMANENT = ("0A", "22", "3F", "42", "54", READ_ONLY, NOT_READY)
FIXES = {
    READ_ONLY: "build the table by `rec-r1 index RECIPE` with the address of a server, and of a user, that may write",
    NOT_READY: "run REFRESH MATERIALIZED VIEW on the view in retriever.params.table",
    TOO_LONG: "name a retriever.params.tsvector_column, or a view that cuts the texts",
    "42501": "let its owner GRANT the permission to the user in retriever.params.url",
    "42P01": "build the table with `rec-r1 index RECIPE`, or correct retriever.params.table and schema",
}


class Sessions:
    """A pool of read-only sessions of one database. It connects on first use, and again in a child process.

    url: the address, without a password.
    timeout: how many seconds a connection or a statement may take.
    connections: the largest number of connections of a process.
    settings: settings of a session beside those of :func:`_settings`.
    """

    _pool: ConnectionPool[Connection] | None = None  # Of the class, because __del__ also runs if __init__ fails.

    def __init__(self, url: str, timeout: float, connections: int, settings: Mapping[str, str]) -> None:
        self._arguments = (url, timeout, connections, dict(settings))
        self.url, self._timeout = url, timeout
        self._connections, self._settings = connections, {**_settings(timeout), **settings}
        self._lock = Lock()
        self._process = 0

    def __reduce__(self) -> tuple[Callable[..., Sessions], tuple[Any, ...]]:
        return Sessions, self._arguments

    def ask(self, statement: sql.Composed, parameters: Sequence[Mapping[str, Any]]) -> list[list[tuple[Any, ...]]]:
        """The rows that a statement returns for each of several sets of parameters, in one round trip.

        A statement on a connection that was lost is sent once more, because reading twice does no harm.

        Raises RetrieverError for an error that cannot pass, and ConnectionError or TimeoutError for one that may.
        """
        pool = self._opened()
        with _named(self.url):
            for last in (False, True):
                try:
                    return self._ask(pool, statement, parameters)
                except PoolTimeout:
                    # This says why there is no connection, or why the server refuses a setting.
                    with psycopg.connect(self.url, autocommit=True, **_reach(self._timeout)) as connection:
                        self._configure(connection)
                    raise
                except psycopg.OperationalError as error:
                    if last or not (error.sqlstate is None or error.sqlstate.startswith(LOST)):
                        raise
                    pool.check()  # It replaces the other connections that are lost, too.
        raise AssertionError("unreachable")

    def _ask(
        self, pool: ConnectionPool[Connection], statement: sql.Composed, parameters: Sequence[Mapping[str, Any]]
    ) -> list[list[tuple[Any, ...]]]:
        with pool.connection() as connection:
            # A server that is alive ends a statement itself. One that is not does not even refuse.
            watch = Timer(GRACE + self._timeout * max(1, len(parameters)), _hang_up, [connection])
            watch.daemon = True
            watch.start()
            try:
                with connection.pipeline():
                    cursors = [connection.cursor(binary=True).execute(statement, each) for each in parameters]
                    return [cursor.fetchall() for cursor in cursors]
            finally:
                watch.cancel()

    def _opened(self) -> ConnectionPool[Connection]:
        with self._lock:
            if self._pool is None or self._process != os.getpid():  # A forked process must not use these connections.
                self._process = os.getpid()
                self._pool = ConnectionPool(
                    self.url,
                    kwargs={"autocommit": True, "prepare_threshold": None, **_reach(self._timeout)},
                    min_size=0,
                    max_size=self._connections,
                    num_workers=1,
                    timeout=self._timeout,
                    reconnect_timeout=self._timeout,
                    configure=self._configure,
                    open=True,
                )
            return self._pool

    def _configure(self, connection: Connection) -> None:
        names, values = list(self._settings), list(self._settings.values())
        connection.execute(
            "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS setting(name, value)",
            (names, values),
        )

    def __del__(self) -> None:
        if self._pool is not None and self._process == os.getpid():
            with suppress(Exception):  # The interpreter may be shutting down.
                self._pool.close(timeout=1)


def _settings(timeout: float) -> dict[str, str]:
    """The settings of every session. A search cannot write, whatever it contains."""
    return {
        "default_transaction_read_only": "on",
        "statement_timeout": str(math.ceil(1000 * timeout)),  # 0 would be no limit.
        "client_min_messages": "warning",  # PostgreSQL notes for each query that a stop word is none.
        "jit": "off",  # It would compile each statement, which takes longer than most of them.
    }


def _reach(timeout: float) -> dict[str, Any]:
    return {"connect_timeout": max(2, round(timeout)), "application_name": "rec-r1", **KEEPALIVES}


def _hang_up(connection: Connection) -> None:
    """End a connection whose server does not answer, so that the thread that waits for it gets an error."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as opened:
        opened.shutdown(socket.SHUT_RDWR)


def connect(url: str, timeout: float) -> Connection:
    """A connection that may write, for what is done once when a retriever is opened.

    Raises RetrieverError where the address has a password, and where there is no connection to this database.
    """
    try:
        secret = [name for name in SECRETS if name in conninfo_to_dict(url)]
    except psycopg.Error as error:
        raise RetrieverError(f"retriever.params.url cannot be read ({_line(error)}): correct it") from error
    if secret:
        raise RetrieverError(f"retriever.params.url has a {secret[0]}: remove it, and set $PGPASSWORD")
    try:
        return psycopg.connect(url, autocommit=True, **_reach(timeout))
    except psycopg.Error as error:
        raise RetrieverError(
            f"no connection to PostgreSQL at {url} ({_line(error)}): start it, or check retriever.params.url, and "
            "$PGPASSWORD or ~/.pgpass"
        ) from error


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Turn the errors of psycopg in this block into RetrieverError, TimeoutError and ConnectionError."""
    try:
        yield
    except psycopg.Error as error:
        code, where = error.sqlstate or "", f"PostgreSQL at {url}"
        if code.startswith(PERMANENT):
            fix = FIXES.get(code, "check the database with `rec-r1 check RECIPE`")
            raise RetrieverError(f"{where}: {_line(error)}: {fix}") from error
        kind = TimeoutError if code == "57014" or isinstance(error, PoolTimeout) else ConnectionError
        raise kind(f"{where}: {_line(error)}") from error


@contextmanager
def errors(url: str) -> Iterator[None]:
    """Turn the errors of psycopg in this block, which opens a retriever, into RetrieverErrors with a fix."""
    try:
        with _named(url):
            yield
    except (TimeoutError, ConnectionError) as error:
        raise RetrieverError(f"{error}: try again, or raise retriever.params.timeout") from error


def _line(error: Exception) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
