"""The verbs that make a policy, an index or a fitted recommender from a recipe: train, index and fit."""

from __future__ import annotations

import argparse

from rec_r1.cli.verbs import Verbs, takes_recipe, write_negatives, writes_negatives
from rec_r1.train import parser

TITLE = "train"


def add(verbs: Verbs) -> None:
    given = parser(add_help=False)
    verbs.add("train", _train, "train a policy", "train recipes/quickstart.yaml output_dir=runs/try", parents=[given])
    takes_recipe(verbs.add("index", _index, "build the index that a recipe needs", "index recipes/quickstart.yaml"))
    text = "fit a retriever on a task's interactions or judgments"
    p = verbs.add("fit", _fit, text, "fit propagate task.path=FOLDER")
    takes_recipe(p)
    writes_negatives(p)


def _train(args: argparse.Namespace) -> int:
    """Never called: `rec_r1.cli.main` passes this verb on before it parses, because `train` takes options between
    overrides."""
    raise AssertionError("rec_r1.cli.main gives this verb to rec_r1.train before it parses")


def _index(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import build_index

    print(*build_index(config.load(args.recipe, args.overrides)), sep="\n")
    return 0


def _fit(args: argparse.Namespace) -> int:
    from rec_r1 import config
    from rec_r1.environment import fit

    recipe = config.load(args.recipe, args.overrides)
    write_negatives(recipe, args)
    print(*fit(recipe), sep="\n")
    return 0
