"""The verbs that put a retriever or a policy to work."""

from __future__ import annotations

import argparse

from rec_r1.cli.verbs import Verbs, takes_recipe

TITLE = "use"


def add(verbs: Verbs) -> None:
    text = "serve a recipe's retriever to many trainers"
    p = verbs.add("serve", _serve, text, "serve recipes/quickstart.yaml --port 8077")
    takes_recipe(p)
    p.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1; others need $REC_R1_TOKEN)")
    p.add_argument("--port", type=int, default=8077, help="port (8077)")
    p.add_argument("--wait-ms", type=float, default=2.0, help="how long requests are collected for one call (2)")


def _serve(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import serve

    def load() -> config.Recipe:
        return config.load(args.recipe, args.overrides)

    serve(load, args.host, args.port, args.wait_ms)
    return 0
