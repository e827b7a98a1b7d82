"""The verbs that a person starts with: what is there, whether it works, what a policy would see."""

from __future__ import annotations

import argparse

from rec_r1.cli.verbs import Verbs, takes_recipe

TITLE = "start"


def add(verbs: Verbs) -> None:
    verbs.add("recipes", _recipes, "list the recipes that come with the toolkit", "recipes")

    text = "test a recipe without training: data, judgments, lengths, memory"
    takes_recipe(verbs.add("check", _check, text, "check recipes/quickstart.yaml"))

    text = "play the policy: type completions, see what they earn"
    p = verbs.add("try", _try, text, "try quickstart --query lecturer")
    takes_recipe(p)
    p.add_argument("--query", help="a query of the task (default: one after the other of the validation split)")
    p.add_argument("--hits", type=int, default=10, help="hits to show (10)")

    text = "read a task's raw files into the cache, once"
    takes_recipe(verbs.add("prepare", _prepare, text, "prepare esci_bm25 task.path=FOLDER"))


def _recipes(args: argparse.Namespace) -> int:
    from rec_r1.config import find, shipped

    for name in shipped():
        purpose = find(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:<26} {purpose}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    recipe = config.load(args.recipe, args.overrides)
    for line in check.check(recipe):
        print(line, flush=True)
    return 0


def _try(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.checks import check

    return check.play(config.load(args.recipe, args.overrides), args.query, args.hits)


def _prepare(args: argparse.Namespace) -> int:
    from rec_r1 import config, tasks
    from rec_r1.tasks.task_cache import description

    print(*description(tasks.load(config.load(args.recipe, args.overrides).task)), sep="\n")
    return 0
