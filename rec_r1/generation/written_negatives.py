"""Let a language model write negatives for `dense` with `tuned.written`: texts that look like a relevant document
and are not relevant.

The model is the recipe's own before it is trained, or the endpoint of `baselines.endpoint`. It is asked once for each
pair of a query and a relevant document that the encoder is tuned on, so its prompts have training data only. Its texts
are kept in the file `tuned.written_file` (`retrievers/text/tuning/written.py` explains the format). It is never asked
again for a pair of that file, even if the completion held no text, because how often a model fails is part of the
result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import retrievers
from rec_r1 import models
from rec_r1.config import Recipe, UserError, cache_folder
from rec_r1.config.redaction import from_environment
from rec_r1.generation import Sampling, endpoint, generate, sampling_of_rollouts
from rec_r1.prompts import Prompt, parse_lines, up_to_end
from rec_r1.runs import write_atomically
from rec_r1.tasks import Task
from retrievers.text import dense
from retrievers.text.analysis import first_words, words
from retrievers.text.tuning import job, written
from retrievers.text.tuning.settings import Tuned
from retrievers.text.tuning.written import Key

WRITERS = ("policy", "endpoint")
SHOWN_WORDS = 60  # The prompt shows at most this many words of the query and of the document.
TOKENS = 64  # A text has at most this many tokens, or as many as the encoder reads.
MOST_SLABS = 100  # The file is written after every slab of the local model, at most this many times.
# Two prompts, by what the encoder is tuned on. {what} and {answer} depend on the number of texts.
PROMPTS = {
    "judgments": (
        "Search query: {query}\nA relevant document: {positive}\n\nWrite {what} that looks similar to this document, "
        "with similar words, but does not answer the query. {answer}"
    ),
    "interactions": (
        "A customer chose: {query}\nThe same customer then chose: {positive}\n\nWrite {what} that looks similar to the "
        "second choice, with similar words, but that this customer would not choose. {answer}"
    ),
}
WHAT = {"judgments": ("another document", "other documents"), "interactions": ("another item", "other items")}
Row = dict[str, Any]
Write = Callable[[Sequence[Prompt], Callable[[list[str]], None]], None]


def write(
    recipe: Recipe, task: Task, by: str, limit: int | None = None, seeds: Sequence[int] | None = None
) -> list[str]:
    """Write the negatives that the recipe's retriever asks for and that its file does not have yet.

    recipe: the recipe. Its retriever is `dense` with `tuned.written`, or opens one.
    task: the recipe's task.
    by: one of WRITERS, see the head of this file.
    limit: for how many pairs there are texts at the end, at most. They are chosen at random. None, the default, = all.
    seeds: the seeds of the fits that will read the file, because every seed draws other pairs. None, the default, = the
        seed of the recipe alone.

    Returns lines that say what was written. An interrupted call continues where it stopped. Raises UserError where no
    encoder asks for written texts, where the encoder has nothing to be tuned on, for a file that is something else or
    that another process is writing, and where the model does not load or the endpoint fails.
    """
    if by not in WRITERS:
        raise UserError(f"--write {by}: choose from {', '.join(WRITERS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    lines = []
    for tuned in _asking(recipe):
        path = Path(tuned.written_file or "")
        if not path.parent.is_dir():
            raise UserError(f"{written.PARAMETER}: the folder {path.parent} does not exist: make it first")
        with _alone(path):
            fits = [tuned] if seeds is None else [dataclasses.replace(tuned, seed=seed) for seed in seeds]
            lines.append(_complete(recipe, task, fits, path, by, limit))
    return lines


def _asking(recipe: Recipe) -> list[Tuned]:
    """How the encoders of the recipe's retriever are tuned that read written texts."""
    params = from_environment(recipe.retriever.params, UserError, "retriever.params")
    try:
        backends = retrievers.index_backends(recipe.retriever.kind, params)
        every = [dense.Params(**given).tuned for kind, given in backends if kind == "dense"]
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    found = [tuned for tuned in every if tuned is not None and tuned.written]
    if not found:
        raise UserError(
            "--write: no encoder of this recipe reads written negatives: set retriever.kind=dense "
            "retriever.params.tuned='{written: 1, written_file: negatives.jsonl}'"
        )
    return found


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Raise UserError where another process is writing ``path``: one of the two would lose its texts."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{written.PARAMETER}: another process is writing {path}: wait until it ends") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _complete(recipe: Recipe, task: Task, fits: Sequence[Tuned], path: Path, by: str, limit: int | None) -> str:
    """Write what one file lacks. fits: how the encoders that read it are tuned. Returns the line about the file."""
    tuned, found = fits[0], list[Key]()
    try:
        data = job.data_of(tuned, task.catalog, task.interactions, task.judgments)
        for fit in fits:
            found += written.keys_of(job.pairs_of(fit, data, task.catalog), task.catalog.ids)
        kept = written.read(path) if path.exists() else {}
    except ValueError as error:
        raise UserError(str(error)) from error
    every = list(dict.fromkeys(found))
    most = len(every) if limit is None else min(limit, len(every))
    missing = [place for place in np.random.default_rng(tuned.seed).permutation(len(every)) if every[place] not in kept]
    there = len(every) - len(missing)
    asked = [every[place] for place in sorted(missing[: max(0, most - there)])]
    kind = job.name_of(data)
    texts = dict(zip(task.catalog.ids, task.catalog.texts, strict=True))
    prompts = [prompt(kind, query, texts[positive], tuned.written, recipe.format.chat) for query, positive in asked]
    batch = recipe.evaluation.batch_size
    # The slabs do not depend on how many pairs an interrupted call has left.
    slab = batch * math.ceil(most / batch / MOST_SLABS)
    name, ask = _writer(recipe, tuned, by, [asked[start : start + slab] for start in range(0, len(asked), slab)])
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    if content and not content.endswith("\n"):  # A file that was written by hand.
        content += "\n"
    rows: list[Row] = []

    def keep(completions: list[str]) -> None:
        for completion in completions:
            (query, positive), shown = asked[len(rows)], _text_of(prompts[len(rows)])
            rows.append({"query": query, "positive": positive, **parsed(completion, shown, tuned.written), "by": name})
        write_atomically(path, content + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    if asked:
        ask(prompts, keep)
    return _said(path, rows, there, len(every), name)


def prompt(kind: str, query: str, positive: str, count: int, chat: bool) -> Prompt:
    """What the model is asked for one pair.

    kind: "judgments" or "interactions".
    query: the query, or the raw query of a history.
    positive: the text of the relevant document.
    count: how many texts it writes.
    chat: whether the prompt is a chat message. False = it is one string.
    """
    single, several = WHAT[kind]
    lines = "one line and nothing else" if count == 1 else f"{count} lines, one text a line, and nothing else"
    parts = {
        "query": first_words(query, SHOWN_WORDS),
        "positive": first_words(positive, SHOWN_WORDS),
        "what": single if count == 1 else f"{count} {several}, each",
        "answer": f"Answer with {lines}.",
    }
    text = PROMPTS[kind].format(**parts)
    return [{"role": "user", "content": text}] if chat else f"{text}\n"


def _text_of(asked: Prompt) -> str:
    return asked if isinstance(asked, str) else asked[-1]["content"]


def parsed(completion: str, shown: str, count: int) -> Row:
    """The texts of one completion, as a row of the file has them.

    completion: what the model wrote.
    shown: the text of the prompt.
    count: how many texts were asked for.

    Every line with a word is a text, without a list mark and quotation marks, unless it repeats a line of the prompt.
    Returns `negatives`, up to ``count`` texts, `completion`, and `problem`, which is None, "empty" or "malformed".
    """
    completion = completion.encode("utf-8", "replace").decode()  # Half a surrogate pair can be written to no file.
    repeated = [words(line) for line in shown.splitlines()]
    lines = [line.strip("\"'“”„«» ") for line in parse_lines(completion)]
    texts = [line for line in lines if words(line) not in repeated][:count]
    problem = None if texts else "malformed" if completion.strip() else "empty"
    return {"negatives": texts, "completion": completion, "problem": problem}


def _writer(recipe: Recipe, tuned: Tuned, by: str, slabs: Sequence[Sequence[Key]]) -> tuple[str, Write]:
    """The name of the model, and the function that lets it answer prompts and passes its completions on in parts.

    slabs: the pairs of all prompts, in the parts in which the local model answers.
    """
    tokens = tuned.written * (tuned.max_tokens or TOKENS)
    end = "line" if tuned.written == 1 else None
    if by == "endpoint":
        server = endpoint.of_recipe(recipe, tokens)

        def ask(prompts: Sequence[Prompt], keep: Callable[[list[str]], None]) -> None:
            found, _ = endpoint.answers(prompts, server, cache_folder() / "endpoint", "writing negatives")
            keep([up_to_end(text, end) for text in found])

        return server.model, ask
    base = sampling_of_rollouts(recipe)
    sampling = dataclasses.replace(base, options={**base.options, "max_new_tokens": tokens}, end=end)
    return recipe.model.name, _local(recipe, sampling, tuned.seed, slabs)


def _local(recipe: Recipe, sampling: Sampling, seed: int, slabs: Sequence[Sequence[Key]]) -> Write:
    """The model of the recipe before it is trained. It answers in slabs, each with a seed of its own, so that an
    interrupted call, when it continues, writes the same texts as an uninterrupted one."""

    def ask(prompts: Sequence[Prompt], keep: Callable[[list[str]], None]) -> None:
        from tqdm import tqdm

        source = models.resolve(recipe.model.name)
        tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
        model = models.load_policy_for_evaluation(source, recipe, None)
        batch, start = recipe.evaluation.batch_size, 0
        with tqdm(total=len(prompts), desc="writing negatives", unit=" pairs") as bar:
            for slab in slabs:
                drawn = dataclasses.replace(sampling, seed=_seed(seed, slab))
                keep(generate(model, tokenizer, prompts[start : start + len(slab)], drawn, batch))
                start += len(slab)
                bar.update(len(slab))

    return ask


def _seed(seed: int, keys: Sequence[Key]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()[:4], "little")


def _said(path: Path, rows: Sequence[Mapping[str, Any]], before: int, pairs: int, name: str) -> str:
    """The line about one file. before: for how many pairs of the fit it had rows already."""
    failed = {problem: sum(row["problem"] == problem for row in rows) for problem in ("empty", "malformed")}
    failures = ", ".join(f"{count} {problem}" for problem, count in failed.items())
    asked = f"{len(rows):,} completions by {name} ({failures})" if rows else "nothing was missing"
    return f"{path}: {before + len(rows):,} of {pairs:,} pairs of query and document; {asked}"
