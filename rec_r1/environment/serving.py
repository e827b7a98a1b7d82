"""Serve the retriever of a recipe, or any other application, over HTTP."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rec_r1.config import Recipe, UserError
from rec_r1.environment import load_task, open_retriever


def serve(load: Callable[[], Recipe], host: str, port: int, wait_ms: float) -> None:
    """Serve a recipe's retriever over HTTP until Ctrl-C.

    load: returns the recipe. It is called after the address is checked.
    host, port: the address to bind. Any host but the loopback interface needs $REC_R1_TOKEN.
    wait_ms: for so many milliseconds requests are collected into one call of the retriever.

    Raises UserError for an address that cannot be bound, and for a recipe whose retriever is the client, `remote`.
    """

    def make(token: str | None) -> tuple[Any, str, str]:
        from retrievers.serving import server

        recipe = load()
        if recipe.retriever.kind == "remote":
            raise UserError("retriever.kind: remote is the client: name the retriever to serve, such as bm25")
        task = load_task(recipe)
        # The client leaves the history out, because requests do not have the items that a user has seen.
        recipe.retriever.exclude_history = False
        retriever = open_retriever(recipe, task)
        kind, documents = recipe.retriever.kind, len(task.catalog)
        application = server.app(retriever, kind, task.catalog.fingerprint, documents, token, wait_ms=wait_ms)
        what = f"{kind} over {documents:,} documents of {task.name}"
        return application, what, f", fingerprint {retriever.fingerprint[:16]}"

    serve_http(make, host, port)


def serve_http(make: Callable[[str | None], tuple[Any, str, str]], host: str, port: int) -> None:
    """Serve an application over HTTP until Ctrl-C.

    make: from the token that clients must show, or None, to the Starlette application, what it serves, and a note for
        the line that is printed once the port is bound. It is called after the address is checked.
    host, port: the address to bind. Any host but the loopback interface needs $REC_R1_TOKEN.

    Raises UserError for an address that cannot be bound, and RetrieverError where the extra is missing.
    """
    from retrievers.serving import http_server
    from retrievers.serving.client import TOKEN_VARIABLE

    token = os.environ.get(TOKEN_VARIABLE)
    http_server.check_installed()
    try:
        http_server.check_address(host, token)
        application, what, note = make(token)
        shown = f"[{host}]" if ":" in host else host
        line = f"{what} at http://{shown}:{port}{note}; Ctrl-C ends it"
        http_server.serve(application, host, port, token, lambda: print(line, flush=True))  # noqa: T201
    except ValueError as error:
        raise UserError(str(error)) from error
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {str(error).rstrip('.')}: choose another") from error
