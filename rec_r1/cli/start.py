"""The verbs that come before a training: init, recipes, options, completion, check, try, preflight and prepare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rec_r1.cli.verbs import Verbs, arguments, takes_recipe

TITLE = "start"


def add(verbs: Verbs) -> None:
    text = "read your own files, and write a recipe that trains on them"
    p = verbs.add("init", _init, text, "init my_shop --out my_shop.yaml")
    p.add_argument("folder", type=Path, help="the folder with your files")
    p.add_argument("--out", type=Path, help="the recipe (default: FOLDER's name with .yaml, here)")
    p.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="a recipe for a GPU (default: if there is one)")
    p.add_argument("--dry-run", action="store_true", help="print the recipe, write nothing")

    text = "list the recipes that come with the toolkit, or copy one"
    p = verbs.add("recipes", _recipes, text, "recipes --copy quickstart mine.yaml")
    p.add_argument("--copy", metavar="NAME", help="write the recipe of this name into a file of yours")
    p.add_argument("file", nargs="?", type=Path, help="with --copy: the file (default: NAME.yaml, here)")

    p = verbs.add("options", _options, "list the keys of a recipe with type, default and meaning", "options format")
    p.add_argument("section", nargs="?", help="such as format, task.sequential, retriever.bm25, rewards.ndcg, grpo")
    p.add_argument("--markdown", action="store_true", help="print tables in Markdown")

    p = verbs.add("completion", _completion, "print a script that lets a shell complete commands", "completion bash")
    p.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")

    text = "test a recipe without training: data, judgments, lengths, memory"
    p = verbs.add("check", _check, text, "check recipes/quickstart.yaml")
    takes_recipe(p)
    p.add_argument("--processes", metavar="N,N", help="batch sizes, memory and hours on so many GPUs, such as 1,4,8,16")

    text = "type completions yourself, and see their hits and rewards"
    p = verbs.add("try", _try, text, "try quickstart --query lecturer")
    takes_recipe(p)
    p.add_argument("--query", help="a query of the task (default: one after the other of the validation split)")
    p.add_argument("--hits", type=int, default=10, help="hits to show (10)")

    text = "ask the untrained policy training queries, and say whether it could learn"
    p = verbs.add("preflight", _preflight, text, "preflight quickstart")
    takes_recipe(p)
    p.add_argument("--queries", type=int, default=36, help="training queries to ask (36)")
    p.add_argument("--samples", type=int, help="completions of each (default: grpo.num_generations)")

    text = "read a task's raw files into the cache, once"
    takes_recipe(verbs.add("prepare", _prepare, text, "prepare esci_bm25 task.path=FOLDER"))


def _init(args: argparse.Namespace) -> int:
    from rec_r1.checks.new_recipe import ask_on_terminal, has_gpu, new_recipe

    output = args.out or Path(f"{args.folder.resolve().name or 'mine'}.yaml")
    ask = ask_on_terminal if sys.stdin.isatty() and sys.stdout.isatty() else None
    on_gpu = has_gpu() if args.gpu is None else args.gpu
    for line in new_recipe(args.folder, output, on_gpu, ask, args.dry_run):
        print(line, flush=True)
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from rec_r1.config import UserError, copy_shipped, find, shipped

    if args.copy:
        print(copy_shipped(args.copy, args.file))
        return 0
    if args.file:
        raise UserError(f"recipes: {args.file}: name the recipe to write there, such as --copy quickstart {args.file}")
    for name in shipped():
        purpose = find(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<26} {purpose}")
    return 0


def _options(args: argparse.Namespace) -> int:
    from rec_r1.cli import options

    print(*options.lines(options.sections(args.section), args.markdown), sep="\n")
    return 0


def _completion(args: argparse.Namespace) -> int:
    import shtab

    from rec_r1.cli import options
    from rec_r1.config import shipped

    words = {
        "recipe": [*shipped(), "*.yaml", "recipes/*.yaml", "runs/*/config.yaml"],
        "copy": shipped(),
        "section": options.names(),
        "overrides": [f"{key}=" for key in options.key_names()],
    }
    for action in arguments(args.parser):
        if action.dest in words:
            action.complete = shtab.cmd(f"printf '%s\\n' {' '.join(words[action.dest])}")  # type: ignore[attr-defined]
        elif action.dest in ("run", "runs", "folder", "against", "include"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.dest in ("file", "output", "rollouts"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(args.parser, args.shell))
    return 0


def _check(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    recipe = config.load(args.recipe, args.overrides)
    for line in check.check(recipe, _numbers(args.processes)):
        print(line, flush=True)
    return 0


def _numbers(given: str | None) -> list[int]:
    """The numbers of processes in a list such as 1,4,8. Raises UserError for anything else."""
    from rec_r1.config import UserError

    words = given.split(",") if given is not None else []
    if not all(word.isdecimal() and 0 < int(word) <= 100_000 for word in words):
        raise UserError(f"--processes {given}: give numbers of processes, such as --processes 1,4,8,16")
    return list(map(int, words))


def _try(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    return check.play(config.load(args.recipe, args.overrides), args.query, args.hits)


def _preflight(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks.preflight import preflight

    for line in preflight(config.load(args.recipe, args.overrides), args.queries, args.samples):
        print(line, flush=True)
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from rec_r1 import config, tasks
    from rec_r1.tasks.task_cache import description

    print(*description(tasks.load(config.load(args.recipe, args.overrides).task)), sep="\n")
    return 0
