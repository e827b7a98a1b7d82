"""The verbs that use a policy or a retriever: ask, serve and export."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rec_r1.cli.verbs import Verbs, takes_recipe

TITLE = "use"


def add(verbs: Verbs) -> None:
    text = "ask a run's policy, and see its completions and hits"
    p = verbs.add("ask", _ask, text, "ask runs/quickstart lecturer --k 5")
    p.add_argument("run", type=Path, help="the folder of a run")
    p.add_argument("queries", nargs="*", default=[], metavar="QUERY", help="queries; by default, or for -, from stdin")
    p.add_argument("--history", action="append", default=[], metavar="ID,ID", help="ids of a query's history; repeat")
    p.add_argument("--file", type=Path, help="queries: one a line, or JSONL or CSV with query and history")
    p.add_argument("--k", type=int, default=10, help="hits to show (10)")
    p.add_argument("--json", action="store_true", help="print JSONL")
    p.add_argument("-o", "--output", type=Path, help="write JSONL into this file")
    p.add_argument("--untrained", action="store_true", help="ask the policy as it was before training")
    _takes_endpoint(p)

    text = "serve a recipe's retriever to many trainers, or a run's policy to users"
    p = verbs.add("serve", _serve, text, "serve recipes/quickstart.yaml --port 8077")
    takes_recipe(p)
    p.add_argument("--host", default="127.0.0.1", help="address to bind (127.0.0.1; others need $REC_R1_TOKEN)")
    p.add_argument("--port", type=int, default=8077, help="port (8077)")
    p.add_argument("--wait-ms", type=float, default=2.0, help="how long requests are collected for one call (2)")
    p.add_argument("--policy", action="store_true", help="serve the policy of a run, whose folder is given as recipe")
    p.add_argument("--timeout", type=float, default=5.0, help="--policy: seconds until the raw query is sent (5)")
    _takes_endpoint(p)

    text = "merge a policy into one model for transformers, vLLM and Ollama"
    p = verbs.add("export", _export, text, "export runs/quickstart --gguf")
    p.add_argument("run", type=Path, help="the folder of an evaluated run")
    p.add_argument("--folder", type=Path, help="write the files here (default: RUN/merged)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    p.add_argument("--gguf", action="store_true", help="also a GGUF file, for the Modelfile of Ollama")
    p.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py (default: the one on PATH)")


def _takes_endpoint(p: argparse.ArgumentParser) -> None:
    p.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible server that holds the weights, up to /v1")
    p.add_argument("--model", metavar="NAME", help="with --endpoint: the name of the weights there")


def _ask(args: argparse.Namespace) -> int:
    from rec_r1.policy import ask
    from rec_r1.runs import write_atomically

    ask.check(args.k, args.output)
    asked = ask.questions(args.queries, args.history, args.file, sys.stdin)
    answers = ask.ask(ask.open_policy(args.run, not args.untrained, args.endpoint, args.model), asked, args.k)
    if args.output:
        write_atomically(args.output, ask.jsonl(answers))
        print(f"{len(answers)} answers in {args.output}")
    else:
        print(ask.jsonl(answers) if args.json else ask.table(answers), end="" if args.json else "\n")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment.serving import serve

    def load() -> config.Recipe:
        return config.load(args.recipe, args.overrides)

    if args.policy:
        from rec_r1.policy import service

        address = args.host, args.port
        service.serve(
            Path(args.recipe), args.overrides, *address, args.wait_ms, args.timeout, args.endpoint, args.model
        )
    else:
        serve(load, args.host, args.port, args.wait_ms)
    return 0


def _export(args: argparse.Namespace) -> int:
    from rec_r1.policy import export

    folder = args.folder or args.run / "merged"
    print(*export.export(args.run, folder, args.dtype, args.gguf, args.converter), sep="\n")
    return 0
