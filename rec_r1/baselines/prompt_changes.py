"""Prompts of a search, and the changes by which one prompt becomes another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rec_r1.config import UserError
from rec_r1.environment import Environment
from rec_r1.prompts import PLACES, PROMPTS, Format, Prompt
from rec_r1.tasks import Split, prompts

MOST_EXAMPLES = 8  # The search gives a prompt at most so many examples.
SHOWN_FAILURES = 3  # So many bad completions are shown where the policy is asked for a better instruction.
Ask = Callable[[Prompt, int], str]


class Candidate(NamedTuple):
    """A prompt of a search.

    template: a text like `format.prompt`, without a place for {answer}.
    examples: pairs of a training query's id and its completion, with which the prompt begins after the recipe's own.
    """

    template: str
    examples: tuple[tuple[str, str], ...] = ()


class Shown(NamedTuple):
    """A scored completion: the query's id and text, the completion, and its reward."""

    query_id: str
    query: str
    completion: str
    reward: float


def format_of(candidate: Candidate, env: Environment) -> Format:
    """The format with the prompt of a candidate.

    env: the environment of the recipe, whose training queries are the examples.

    Raises UserError for a template without a place for the query.
    """
    config = dataclasses.replace(env.format.config, prompt=candidate.template)
    bare = dataclasses.replace(env.format, config=config).of_examples()
    train = env.task.train
    place_of = {identifier: place for place, identifier in enumerate(train.ids)}
    chosen = train.take([place_of[identifier] for identifier, _ in candidate.examples])
    asked = prompts(chosen, env.task.catalog, bare)
    own = tuple((prompt, answer) for prompt, (_, answer) in zip(asked, candidate.examples, strict=True))
    return dataclasses.replace(env.format, config=config, examples=(*env.format.examples, *own))


def first_candidates(format_: Format) -> list[Candidate]:
    """The recipe's own prompt, and those of `prompts.PROMPTS` that show the same parts of a query."""
    own = format_.template
    found = [Candidate(own)]
    for name in (name for name in PROMPTS if name != "structured"):  # Its text fits only a query in parts.
        template = Format(dataclasses.replace(format_.config, prompt=name, action="replace")).template
        if _places(template) == _places(own) and format_.config.action in ("replace", "expand"):
            found.append(Candidate(template))
    return list(dict.fromkeys(found))


def change(
    candidate: Candidate, good: Sequence[Shown], bad: Sequence[Shown], env: Environment, ask: Ask,
    rng: np.random.Generator,
) -> Candidate | None:  # fmt: skip
    """A prompt that differs from ``candidate`` in one respect, chosen at random. None = there is no valid one.

    An example is added or removed, a line of the template is removed, the examples or the lines are put into another
    order, or the policy writes another instruction.

    good: completions that may be examples.
    bad: completions for ``candidate``. The worst of them are shown to the policy that writes another instruction.
    env: the environment of the recipe.
    ask: takes a prompt and a number of tokens, and returns a completion of the policy.
    rng: draws the change.
    """
    *lines, last = candidate.template.splitlines()
    free = [one for one in good if one.query_id not in dict(candidate.examples)]
    possible = ["rewrite"]
    if free and len(candidate.examples) < MOST_EXAMPLES and env.format.config.action != "ranking":
        possible += ["add", "add"]  # It is drawn twice as often as each other change.
    possible += ["remove example"] * bool(candidate.examples) + ["reorder examples"] * (len(candidate.examples) > 1)
    possible += ["remove line"] * bool(lines) + ["reorder lines"] * (len(lines) > 1)
    name = possible[int(rng.integers(len(possible)))]
    examples = list(candidate.examples)
    if name == "rewrite":
        return _rewritten(candidate, bad, env.format, ask)
    if name == "add":
        one = free[int(rng.integers(len(free)))]
        examples.insert(int(rng.integers(len(examples) + 1)), (one.query_id, one.completion))
    elif name == "remove example":
        examples.pop(int(rng.integers(len(examples))))
    elif name == "reorder examples":
        examples = [examples[i] for i in rng.permutation(len(examples))]
    elif name == "remove line":
        lines.pop(int(rng.integers(len(lines))))
    else:
        lines = [lines[i] for i in rng.permutation(len(lines))]
    template = "\n".join([*lines, last])
    return Candidate(template, tuple(examples)) if _places(template) == _places(candidate.template) else None


def _rewritten(candidate: Candidate, bad: Sequence[Shown], format_: Format, ask: Ask) -> Candidate | None:
    """``candidate`` with an instruction that the policy writes. None = it lacks a place, such as {query}."""
    worst = sorted(bad, key=lambda one: one.reward)[:SHOWN_FAILURES]
    text = "\n".join(
        [
            "This is the instruction of a language model:",
            "",
            candidate.template,
            "",
            "For these inputs its answers were bad:",
            *(f"- input: {one.query}; answer: {' '.join(one.completion.split())}" for one in worst),
            "",
            f"Write a better instruction. It must contain {' and '.join(sorted(_places(candidate.template)))}. Write "
            "the instruction alone.",
        ]
    )
    asked: Prompt = [{"role": "user", "content": text}] if format_.config.chat else text + "\n\n"
    written = ask(asked, 32 + len(candidate.template) // 2).strip().strip("`\"'").strip()
    if _places(written) != _places(candidate.template):
        return None
    try:
        template = dataclasses.replace(format_, config=dataclasses.replace(format_.config, prompt=written)).template
    except UserError:
        return None
    return Candidate(template, candidate.examples)


def _places(template: str) -> set[str]:
    return {place for place in PLACES if place in template}


def shows(candidate: Candidate, split: Split, places: Sequence[int]) -> np.ndarray:
    """Which queries of a split are examples in a prompt, as (len(places),) bool."""
    own = dict(candidate.examples)
    return np.array([split.ids[place] in own for place in places], bool)
