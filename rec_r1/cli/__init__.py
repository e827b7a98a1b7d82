"""The command `rec-r1`. Each verb imports what it needs: `rec-r1 recipes` starts without torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from rec_r1 import console
from rec_r1.cli import evaluate, share, start, training, use
from rec_r1.cli.verbs import Verbs
from rec_r1.train import main as train

GROUPS = (start, training, use, evaluate, share)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0; 2 for a user's mistake (one line on stderr); 130 when interrupted; 141 when the
    reader of stdout has ended, as in `rec-r1 recipes | head -1`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:  # the same program that `accelerate launch -m rec_r1.train` runs
        return train(argv[1:])
    command = parser()
    args, extra = command.parse_known_args(argv or ["--help"])
    if extra and "queries" in args and not any(word.startswith("--") for word in extra):
        args.queries += extra  # argparse does not take the positional arguments that follow an option
    elif extra:
        if "overrides" not in args or any(word.startswith("-") or "=" not in word for word in extra):
            command.error(f"unrecognized arguments: {' '.join(extra)}")
        args.overrides += extra
    console.setup()
    verb: Callable[[argparse.Namespace], int] = args.verb

    def run() -> int:
        code = verb(args)
        sys.stdout.flush()
        return code

    try:
        return console.guard(run)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return 141


def _version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("rec-r1")
    except importlib.metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


class _Command(argparse.ArgumentParser):
    """The parser of `rec-r1`, whose help lists the verbs by group: argparse itself has no groups of sub-parsers."""

    overview: str

    def format_help(self) -> str:
        return f"{self.format_usage()}\n{self.description}\n\n{self.overview}\n\n{self.epilog}\n"


def parser() -> argparse.ArgumentParser:
    """The parser of the command with all verbs. A verb's parser sets `verb`, the function that runs it."""
    command = _Command(
        prog="rec-r1",
        description="Fine-tune a language model by GRPO on the metric of a retriever's ranking.",
        epilog="example: rec-r1 check quickstart && rec-r1 train quickstart\n"
        "Each verb has its own help, such as rec-r1 train --help.",
    )
    command.add_argument("--version", action="version", version=f"rec-r1 {_version()}")
    command.set_defaults(parser=command)
    verbs = Verbs(command)
    for group in GROUPS:
        verbs.group(group.TITLE)
        group.add(verbs)
    command.overview = verbs.overview()
    return command
