"""`rec-r1 init`: read a folder of files, report the problems in them, and write a recipe that trains on them."""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from rec_r1 import config, tasks
from rec_r1.checks.new_recipe import layouts, writing
from rec_r1.checks.new_recipe.columns import own_tables
from rec_r1.checks.new_recipe.findings import findings, guess_language, guessed_encoding, refuse_too_few, settings_for
from rec_r1.checks.new_recipe.layouts import Choice, Layout
from rec_r1.checks.new_recipe.tables import ENDINGS, GUESSED_ENCODING
from rec_r1.config import UserError
from rec_r1.console import number_of
from rec_r1.environment import Environment, open_environment
from rec_r1.evaluation.records import check_writable
from rec_r1.runs import write_atomically
from retrievers.text import languages
from rewards import RankingReward

READABLE = f"{', '.join(ENDINGS)} (.gz as well), or BEIR, TREC, RecBole or MovieLens files"
Ask = Callable[[Choice], str]
_HARD = 0.2  # A query is hard if its raw nDCG@10 is below this, so that other words may improve the ranking.
_ENOUGH_HARD = 24  # With fewer hard training queries than this, all training queries are used.
_EPOCHS = 3
_MOST_EXAMPLES = 5000  # Interactions make an example each, and more of them only make check and train start later.
_FEW_STEPS = 20  # The smallest number of steps. In fewer steps a policy learns nothing.


@dataclass(frozen=True)
class Facts:
    """The numbers from which the settings of a recipe are computed.

    train, validation, test: numbers of queries.
    hard: the training queries whose raw nDCG@10 is below 0.2.
    raw: the mean raw nDCG@10 of the validation queries.
    prompt: the prompt of the first validation query.
    """

    train: int
    validation: int
    test: int
    hard: int
    raw: float
    prompt: str

    @property
    def filtered(self) -> bool:
        """Whether training uses only the hard queries."""
        return self.hard >= _ENOUGH_HARD

    @property
    def used(self) -> int:
        """The number of training queries that are used."""
        return self.hard if self.filtered else self.train


def new_recipe(folder: Path, output: Path, on_gpu: bool, ask: Ask | None, dry_run: bool = False) -> Iterator[str]:
    """Read a folder's files and write a recipe for them. Yields the lines to print.

    folder: the folder with the files.
    output: the recipe that is written; it must not exist yet.
    on_gpu: whether the recipe is for a GPU.
    ask: lets a person choose an option. None = the first option is taken, and a comment of the recipe lists the others.
    dry_run: True yields the recipe's text and writes nothing.

    Raises UserError where the output exists already, is a folder or lies in none, where no task reads the folder, and
    where the task that reads it refuses its files.
    """
    if output.is_dir():
        raise UserError(f"--out {output}: a folder: name a file in it, such as {output / 'mine.yaml'}")
    if not output.parent.is_dir():
        raise UserError(f"--out {output}: {output.parent} is no folder: make it first, or name another place")
    if output.exists() and not dry_run:
        raise UserError(f"--out {output}: it exists already: name another file, or delete it")
    if not dry_run:
        check_writable(output.parent, "--out")
    layout = recognise(folder)
    language = "en" if layout.is_data_set else guess_language(layout.items)
    yield from _told(folder, layout, language)
    layout, left_open = _decide(layout, ask)
    if not layout.is_data_set:
        refuse_too_few(folder, layout)
        layout = replace(layout, params=layout.params | settings_for(layout))
    draft = _text(layout, folder, output, on_gpu, language, left_open, None)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / output.name
        file.write_text(draft, encoding="utf-8")
        facts = _facts(open_environment(config.load(file)))
        text = _text(layout, folder, output, on_gpu, language, left_open, facts)
        file.write_text(text, encoding="utf-8")
        config.load(file)
    hard = f"{facts.hard} of {facts.train} training queries are hard (raw ndcg@10 below {_HARD})"
    yield f"{facts.train} training, {facts.validation} validation and {facts.test} test queries; {hard}"
    yield f"raw queries on validation: ndcg@10 {facts.raw:.3f}"
    if dry_run:
        yield from ("", text.rstrip("\n"))
        return
    write_atomically(output, text)
    file_word = shlex.quote(str(output))
    yield f"recipe in {output}; next: rec-r1 check {file_word} && rec-r1 train {file_word}"


def _told(folder: Path, layout: Layout, language: str | None) -> Iterator[str]:
    """The lines about what was recognised, and about its problems."""
    counts = f"{len(layout.items):,} items, {len(layout.events):,} {_events(layout)}"
    yield f"{folder}: {'a known data set' if layout.is_data_set else counts}; task.name={layout.task}"
    yield from (f"  {line}" for line in layout.files)
    if layout.unused:
        yield f"  not used: {', '.join(layout.unused)}"
    if layout.is_data_set:
        return
    found = findings(layout, language)
    yield f"{number_of(len(found), 'finding', 'findings') if found else 'no findings'}" + (":" if found else "")
    yield from (f"  - {finding}".replace(f"{folder}/", "") for finding in found)
    if language != "en":
        yield _guessed(language)
    if encoding := guessed_encoding(layout):
        yield encoding


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def ask_on_terminal(choice: Choice) -> str:
    """Let a person choose by number. The end of the input and an empty line take the first option."""
    options = "".join(f"\n  {number}  {option}" for number, option in enumerate(choice.options, 1))
    sys.stdout.write(f"{choice.question}{options}\n")
    while True:
        try:
            given = input(f"number [1 = {choice.options[0]}]> ").strip() or "1"
        except EOFError:
            given = "1"
        if given.isdecimal() and 1 <= int(given) <= len(choice.options):
            return choice.options[int(given) - 1]
        sys.stdout.write(f"{given!r}: give a number from 1 to {len(choice.options)}\n")


def recognise(folder: Path) -> Layout:
    """The layout of a folder. Raises UserError where no task can read its files."""
    if not folder.is_dir():
        why = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {why}: give the one with your files")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: the folder is empty: put your files there: {READABLE}")
    for reading in (layouts.data_set, layouts.beir, layouts.trec, layouts.published, own_tables):
        layout = reading(folder)
        if layout is not None:
            return layout
    raise UserError(
        f"{folder}: {', '.join(names[:8])}: found no items that queries or users refer to: give a table of items (id, "
        f"title) and one of judgments or clicks (query, item) or of interactions (user, item, timestamp), as {READABLE}"
    )


def _guessed(language: str | None) -> str:
    name = "no language that bm25 knows" if language is None else f"{languages.LANGUAGES[language].name}, a guess"
    return f"language of the texts: {name}; if it is another, change retriever.params.language in the recipe"


def _events(layout: Layout) -> str:
    if layout.is_sequential:
        return "interactions"
    return "judgments" if any(event.grade is not None for event in layout.events) else "clicks or other events"


def _decide(layout: Layout, ask: Ask | None) -> tuple[Layout, dict[str, Sequence[str]]]:
    """The layout with the chosen options, and the choices that are left open: key -> the other options."""
    params, left_open = dict(layout.params), {}
    for choice in layout.choices:
        role = choice.key.removeprefix("task.params.columns.")
        if ask is None:
            left_open[role] = choice.options[1:]
        else:
            params["columns"] = params["columns"] | {role: ask(choice)}
    if "text" in params and "columns" in params:  # The chosen title is indexed once. The column it replaces is a text.
        title = params["columns"]["title"]
        other = [column for column in (layout.params["columns"]["title"],) if column != title]
        params["text"] = [*other, *(column for column in params["text"] if column != title)]
    return replace(layout, params=params), left_open


def _facts(env: Environment) -> Facts:
    metric = RankingReward("ndcg", 10)
    train = tasks.raw_scores(env.task.train, env.retriever, metric)
    validation = tasks.raw_scores(env.task.validation, env.retriever, metric)
    prompt = tasks.prompts(env.task.validation.take([0]), env.task.catalog, env.format)[0]
    shown = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
    train_size, validation_size, test_size = (len(split) for split in env.task.splits.values())
    hard, mean = int((train < _HARD).sum()), float(np.mean(validation))
    return Facts(train_size, validation_size, test_size, hard, mean, shown)


def _text(
    layout: Layout,
    folder: Path,
    output: Path,
    on_gpu: bool,
    language: str | None,
    left_open: dict[str, Sequence[str]],
    facts: Facts | None,
) -> str:
    """The recipe's text. facts: None for the draft, which only reads the data."""
    shipped = writing.TEMPLATES[on_gpu, layout.is_sequential]
    parts = writing.template(shipped)
    name = output.stem
    parts["output_dir"] = f"output_dir: {writing.flow(f'runs/{name}')}"
    parts["task"] = _task(layout, folder, left_open, facts)
    if language != "en":
        told = "no language that bm25 knows" if language is None else "guessed from the texts"
        parts["retriever"] = f"retriever:\n  params:\n    language: {writing.flow(language)}  # {told}"
    if facts is not None:
        _steps(facts, parts, config.load(shipped), on_gpu)
        shown = facts.prompt.splitlines()
        parts["format"] += "\n  # The prompt of the first validation query:\n" + "\n".join(
            f"  #   {writing.comment(x)}" for x in shown
        )
    header = [
        f"A policy for {folder}, written by `rec-r1 init {shlex.quote(str(folder))}`. Change what you like.",
        "",
        f"  rec-r1 check {shlex.quote(str(output))}",
        f"  rec-r1 train {shlex.quote(str(output))}",
        f"  rec-r1 ask {shlex.quote(f'runs/{name}')} "
        + (f"--history {shlex.quote(layout.items[0].id)}" if layout.is_sequential else '"a query"'),
    ]
    return writing.assemble(header, parts)


def _task(layout: Layout, folder: Path, left_open: dict[str, Sequence[str]], facts: Facts | None) -> str:
    lines = ["task:", f"  name: {layout.task}", f"  path: {writing.flow(str(folder))}"]
    if layout.splits:
        lines.append(f"  splits: {writing.flow(layout.splits)}")
    params = dict(layout.params)
    columns = params.pop("columns", None)
    if layout.is_sequential:
        params["limits"] = {"train": _MOST_EXAMPLES, "validation": 200}
    notes = {key: f"or {', '.join(options)}" for key, options in left_open.items()}
    if params or columns:
        lines.append("  params:")
        described = {**PARAMETER_NOTES, **layout.notes}
        if params.get("encoding") == GUESSED_ENCODING:
            described["encoding"] = "a guess: if titles are misread, name the files' own, such as cp1250 or cp1251"
        lines += writing.mapping(params, 4, described)
    if columns:
        lines.append("    columns:")
        lines += writing.mapping(columns, 6, notes)
    if not layout.is_sequential and facts is not None:
        if facts.filtered:
            why = f"{facts.hard} of {facts.train} training queries; added words can only hurt the others"
            lines.append(f"  train_filter: {{raw_ndcg_below: {_HARD}, k: 10}}  # {why}")
        else:
            few = f"only {facts.hard} of {facts.train} training queries have a raw ndcg@10 below {_HARD}: all are used"
            lines.append(f"  # {few}\n  # train_filter: {{raw_ndcg_below: {_HARD}, k: 10}}")
    return "\n".join(lines)


PARAMETER_NOTES = {
    "limits": "the largest numbers of queries; a training on a laptop asks a few hundred of them",
    "unknown": "judgments of items that the catalogue lacks are left out",
    "drop_unknown": "interactions with items that the catalogue lacks are left out",
    "blank": "rows without a query or an item are left out",
    "duplicates": "where different rows have one id, the first is kept",
    "event": "each row is a click",
    "grades": "the grade of each event; all other events are ignored",
    "validation_share": "of the queries outside test; above the default 0.1, because there are few queries",
    "text": "indexed after the title",
}


def _steps(facts: Facts, parts: dict[str, str], shipped: config.Recipe, on_gpu: bool) -> None:
    """Fit the prompts of a step, the steps and the evaluations to the number of training queries, in ``parts``.

    shipped: the recipe that the new one is based on.
    """
    usual = shipped.prompts_per_step or facts.used
    prompts = min(usual, facts.used)
    if prompts < usual:
        parts["prompts_per_step"] = f"prompts_per_step: {prompts}  # all training queries"
    if on_gpu:
        return
    grpo = yaml.safe_load(parts["grpo"])["grpo"]
    evaluations = grpo["max_steps"] // grpo["save_steps"]
    total = min(grpo["max_steps"], max(_FEW_STEPS, math.ceil(_EPOCHS * facts.used / prompts)))
    every = math.ceil(total / evaluations)
    why = f"{total * prompts / facts.used:.2g} epochs of {facts.used:,} queries, {prompts} a step"
    changes = {"max_steps": (total, why), "save_steps": (every, "")}
    parts["grpo"] = writing.change(parts["grpo"], changes)
    parts["evaluation"] = writing.change(parts["evaluation"], {"every_steps": (every, "")})
