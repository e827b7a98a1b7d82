"""The command `check`, which checks a recipe without weights, and `try`, in which a person plays the policy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import retrievers
from rec_r1 import console, models, runs
from rec_r1.checks import machine
from rec_r1.checks.policy_check import check_policy, check_server_of
from rec_r1.checks.validate import check_data, check_recipe, warnings
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment
from rec_r1.evaluation.evaluate import metric_scorer, score_raw
from rec_r1.generation.vllm_engine import is_colocated
from rec_r1.prompts import sent
from rec_r1.tasks import Split, prompts
from rec_r1.trl_options import check_vllm


def check(recipe: Recipe, processes: Sequence[int] = ()) -> Iterator[str]:
    """Check a recipe without training and without weights.

    recipe: the recipe.
    processes: numbers of processes for which the report has a table of batch sizes, memory and hours.

    Yields the lines of the report, one per finding.

    Raises UserError or RetrieverError for the first problem that would stop a training.
    """
    args = check_recipe(recipe)
    folder = Path(recipe.output_dir)
    if runs.is_started(folder):
        yield f"warning    {runs.not_empty(folder)}"
    env = open_environment(recipe, trains=True)
    kept, steps = check_data(recipe, env, args)
    for line in warnings(recipe, args, steps):
        yield f"warning    {line}"
    task = env.task
    sizes = ", ".join(f"{len(split)} {name}" for name, split in task.splits.items())
    # Loading the task has checked that the catalogue has every target.
    yield f"task       {task.name}: {len(task.catalog):,} documents; {sizes} queries; the catalogue has every target"
    yield f"retriever  {recipe.retriever.kind}, fingerprint {env.retriever.fingerprint[:16]}"
    if env.format.schema is not None:
        yield f"format     {_served(env.format.schema)}"
    yield from _absent(env)
    for line in retrievers.mismatches(recipe.retriever.kind, recipe.retriever.params, task.catalog):
        yield f"warning    {line}"
    yield "metrics    the perfect ranking scores ndcg@10 = 1 on every query"
    scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
    first, below = scorer.rewards.names[0], recipe.evaluation.mismatch_below
    for name, split in task.splits.items():
        raw = score_raw(split, scorer).components
        means = ", ".join(f"{metric} {np.nanmean(values):.3f}" for metric, values in raw.items())
        yield f"raw query  {name}: {means}; {first} below {below}: {np.mean(raw[first] < below):.0%}"
    yield f"training   {len(kept)} of {len(task.train)} training queries pass the filter"
    yield f"steps      {steps}"
    source = models.resolve(recipe.model.name, weights=False)
    checked = check_policy(recipe, env, args, steps, source)
    for line in checked.warnings:
        yield f"warning    {line}"
    completions = f"completions at most {args.max_completion_length}"
    yield f"prompts    at most {checked.prompt} tokens, {completions}: they fit into the model's context"
    if is_colocated(args):
        yield f"vllm       context of {args.vllm_max_model_length} tokens (grpo.vllm_max_model_length)"
    yield f"step       {args.generation_batch_size} completions, {args.num_generations} for each prompt"
    yield machine.memory_line(recipe, args, checked)
    if processes:
        yield from machine.table(recipe, args, checked, steps, processes)
    # These checks are the last ones, because a machine without a GPU and without the server can make all others.
    check_vllm(args)
    check_server_of(recipe, args, checked, wait=False)
    yield "ok"


def _served(schema: retrievers.Schema) -> str:
    """Which structured queries the retriever answers."""
    filters = ", ".join(name for name, _ in schema.filters) or "none"
    return f"structured queries; filters: {filters}; boosts: {', '.join(schema.boosts) or 'none'}"


def _absent(env: Environment) -> Iterator[str]:
    """A warning for each split with targets that the retriever's index lacks, or one of the indexes of a fusion."""
    absent = retrievers.absent(env.retriever)
    for name, split in env.task.splits.items():
        targets = sorted(absent.intersection(row for rows in split.rows for row in rows)) if absent else []
        if targets:
            first = ", ".join(repr(env.task.catalog.ids[row]) for row in targets[:10])
            more = f" and {len(targets) - 10} more" if len(targets) > 10 else ""
            yield (
                f"warning    the index lacks {len(targets)} of the targets in {name}, which it therefore never finds: "
                f"{first}{more}: add them to the index"
            )


def play(recipe: Recipe, chosen: str | None, hits: int) -> int:
    """Show prompts, read completions from the terminal, and print their actions, hits and rewards until input ends.

    recipe: the recipe.
    chosen: a query or its id, whose prompt is shown. None = the validation queries, one after the other.
    hits: the largest number of hits that are printed for a completion.

    Returns 0. Raises UserError for an unknown query, and for ``hits`` below 1.
    """
    env = open_environment(recipe)
    write = sys.stdout.write
    if hits < 1:
        raise UserError(f"--hits must be at least 1, got {hits}")
    queries = [_find(env, chosen)] if chosen is not None else None
    turn, lines = 0, console.lines_of(sys.stdin)
    while True:
        split, i = queries[0] if queries else (env.task.validation, turn % len(env.task.validation))
        query = split.queries[i]
        prompt = prompts(split.take([i]), env.task.catalog, env.format)[0]
        text = prompt if isinstance(prompt, str) else "\n".join(f"[{m['role']}] {m['content']}" for m in prompt)
        write(f"\n--- query: {query}\n{text}\nyour completion (\\n for a new line; Ctrl-D ends)> ")
        sys.stdout.flush()
        completion = next(lines, "")
        if not completion:
            write("\n")
            return 0
        write(_report(env, split, i, completion.rstrip("\n").replace("\\n", "\n"), hits))
        turn += 1


def _find(env: Environment, chosen: str) -> tuple[Split, int]:
    for split in env.task.splits.values():
        for i, (identifier, query) in enumerate(zip(split.ids, split.queries, strict=True)):
            if chosen in (identifier, query):
                return split, i
    examples = ", ".join(repr(query) for query in env.task.validation.queries[:5])
    raise UserError(f"--query {chosen!r}: not a query of task {env.task.name}: try one such as {examples}")


def _report(env: Environment, split: Split, i: int, completion: str, k: int) -> str:
    """The action of a completion for query ``i`` of a split, its first ``k`` hits, and its rewards, as text."""
    scored = env.scorer.score_split([completion], split.take([i]))
    action = scored.actions[0]
    relevant: dict[int, float] = dict(zip(split.rows[i], split.grades[i], strict=True))
    titles = env.task.catalog.titles
    cause = scored.causes[0] if scored.causes else None
    lines = [f"malformed: {cause}" if cause else "malformed: no action could be parsed"]
    if action is not None:
        listed = scored.lists[0]
        query = scored.asked[0]
        lines = (
            ["your list:"] if query is None else [f"query sent: {sent(action)}"] if action.text else ["edited history:"]
        )
        if query is not None and not action.text:
            lines += [f"  {w:+g}  {titles[row]}" for row, w in zip(query.history, query.weights, strict=True)]
        found: Sequence[int] = env.retriever.search([query], k).rows[0].tolist() if query else (listed or [])[:k]
        for rank, row in enumerate((r for r in found if r >= 0), 1):
            mark = f"  <- relevant, grade {relevant[row]:g}" if row in relevant else ""
            lines.append(f"{rank:4d}. {titles[row]}{mark}")
        if all(r < 0 for r in found):
            lines.append("   nothing found")
    raw = score_raw(split.take([i]), env.scorer)
    for name, values in scored.components.items():
        lines.append(f"  {name:<16} {values[0]:.4f}   (raw query {raw.components[name][0]:.4f})")
    lines.append(f"  {'reward':<16} {scored.rewards[0]:.4f}")
    return "\n".join(lines) + "\n"
