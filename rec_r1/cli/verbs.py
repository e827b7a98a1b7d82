"""How a verb is declared: one sub-parser of argparse, in the group of what a person wants to do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from rec_r1.config import Recipe, UserError

RECIPE = "a YAML file, or the name of a shipped recipe"
OVERRIDES = "change a setting: retriever.params.k1=0.9"
WIDTH = 16  # The column of the overview in which the texts begin.


class Verbs:
    """The verbs of the command, and the overview of them that `rec-r1 --help` prints."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        """parser: the parser of the command, which gets one sub-parser for each verb."""
        self._parsers = parser.add_subparsers(
            title="verbs", required=True, metavar="VERB", parser_class=argparse.ArgumentParser
        )
        self._groups: dict[str, dict[str, str]] = {}

    def group(self, title: str) -> None:
        """Begin a group: the verbs that are added from now on stand under ``title`` in the overview."""
        self._groups[title] = {}

    def add(
        self,
        name: str,
        verb: Callable[[argparse.Namespace], int],
        text: str,
        example: str,
        parents: Sequence[argparse.ArgumentParser] = (),
    ) -> argparse.ArgumentParser:
        """Declare one verb in the group that was begun last.

        name: what the user types.
        verb: the function that runs it and returns the exit code.
        text: what it does, in one line without a full stop.
        example: the arguments of a call that works, after `rec-r1`.
        parents: parsers whose arguments the verb takes, too; without a help option of their own.

        Returns the verb's parser, which still needs its arguments.
        """
        *_, group = self._groups.values()
        group[name] = text
        epilog = f"example: rec-r1 {example}"
        p: argparse.ArgumentParser = self._parsers.add_parser(
            name, help=text, description=f"{text}.", epilog=epilog, parents=list(parents)
        )
        p.set_defaults(verb=verb)
        return p

    def overview(self) -> str:
        """All verbs by group, one line each."""
        parts = []
        for title, group in self._groups.items():
            parts.append("\n".join([f"{title}:", *(f"  {name:<{WIDTH}}{text}" for name, text in group.items())]))
        return "\n\n".join(parts)


def takes_recipe(p: argparse.ArgumentParser) -> None:
    """Add a verb's arguments RECIPE and key=value."""
    p.add_argument("recipe", help=RECIPE)
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=OVERRIDES)


def writes_negatives(p: argparse.ArgumentParser) -> None:
    """Add the arguments of a verb that lets a model write negatives before it tunes an encoder."""
    text = "first let the policy's model, or baselines.endpoint, write the negatives that tuned.written asks for"
    p.add_argument("--write", choices=("policy", "endpoint"), help=text)
    p.add_argument("--limit", type=int, help="with --write: the most pairs of query and document (default: all)")


def write_negatives(recipe: Recipe, args: argparse.Namespace, seeds: Sequence[int] | None = None) -> None:
    """Do what the arguments of :func:`writes_negatives` say. Raises UserError.

    seeds: the seeds of the fits that will read the texts. None, the default, = that of the recipe.
    """
    from rec_r1.environment import load_task
    from rec_r1.generation import written_negatives

    if args.write is not None:
        print(*written_negatives.write(recipe, load_task(recipe), args.write, args.limit, seeds), sep="\n", flush=True)
    elif args.limit is not None:
        raise UserError("--limit: nothing reads it without --write: add that, or leave it out")


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a command and of its verbs."""
    for action in parser._actions:  # argparse has no public list of them
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from arguments(verb)
