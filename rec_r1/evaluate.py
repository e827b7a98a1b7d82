"""Held-out evaluation: greedy answers through the same Scorer as training, beside the raw query."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rewards
from rec_r1.environment import Environment, open_environment
from rec_r1.prompts import Action, Prompt
from rec_r1.scoring import Scored, Scorer
from rec_r1.tasks import Split, prompts

logger = logging.getLogger(__name__)
RESAMPLES = 10_000
SLICES = ("all", "mismatch")


def render(prompt: Prompt, tokenizer: Any, chat_options: Mapping[str, Any]) -> list[int]:
    """Token ids of a prompt as TRL makes them: chat messages through the template, a string as it is."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **chat_options
    )
    return list(encoded["input_ids"])


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    chat_options: Mapping[str, Any] | None = None,
    progress: str | None = None,
) -> list[str]:
    """Greedy completions of a causal LM (transformers, or PEFT around one), in the order of ``prompts``.

    Batches are cut from the prompts sorted by length, so that little is padded.

    progress: what the bar is called; None = no bar. Draws no random numbers, so training before and after
    an evaluation goes on as it would have without.
    """
    import torch
    from tqdm import tqdm

    ids = [render(prompt, tokenizer, chat_options or {}) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    completions = [""] * len(ids)
    bar = tqdm(total=len(ids), desc=progress, unit=" queries", disable=progress is None)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            completions[i] = text
        bar.update(len(chosen))
    bar.close()
    return completions


def _send_raw(completion: str, query: str) -> Action:
    return Action(query, "")


def score_raw(split: Split, scorer: Scorer) -> Scored:
    """The raw queries themselves, through the scorer's retriever and rewards. Raises RetrieverError where the
    retriever fails for any."""
    raw = Scorer(_send_raw, scorer.retriever, scorer.rewards, scorer.metrics)
    return raw.score(split.queries, split.queries, split.rows, split.grades).whole()


def metric_scorer(scorer: Scorer, metrics: Sequence[str]) -> Scorer:
    """``scorer`` with the evaluation's metrics in place of the training rewards."""
    return Scorer(scorer.parse, scorer.retriever, rewards.from_spec(dict.fromkeys(metrics, 1.0)), floor=scorer.floor)


def bootstrap(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean of (Q,) ``values`` with its 95% percentile bootstrap interval over queries (Efron 1979), 10,000
    resamples. Of paired differences it is the paired interval. NaN queries are left out; empty -> NaN."""
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    rng = np.random.default_rng(seed)
    # In blocks: 10,000 x Q indices at once would be gigabytes for a large test set.
    means = np.concatenate(
        [known[rng.integers(0, len(known), (100, len(known)))].mean(axis=1) for _ in range(RESAMPLES // 100)]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "n": len(known)}


def slices(raw: np.ndarray, below: float) -> dict[str, np.ndarray]:
    """name -> (Q,) bool: all queries, and the vocabulary mismatch (raw score under ``below``)."""
    return {"all": np.ones(len(raw), bool), "mismatch": raw < below}


def compare(scores: Mapping[str, np.ndarray], raw: np.ndarray, below: float) -> dict[str, Any]:
    """Per slice: each policy's mean with interval, and the paired differences of `trained` to every other.

    scores: policy -> (Q,) scores of one metric, `trained` among them. raw: (Q,) scores that define the slices.
    """
    out: dict[str, Any] = {}
    for name, chosen in slices(raw, below).items():
        rows = {policy: bootstrap(values[chosen]) for policy, values in scores.items()}
        if "trained" in scores:
            for policy in scores:
                if policy != "trained":
                    rows[f"trained - {policy}"] = bootstrap((scores["trained"] - scores[policy])[chosen])
        out[name] = rows
    return out


def table(metric: str, part: str, result: Mapping[str, Any]) -> str:
    """The closing table as text: a row a policy and a difference, a column a slice."""
    columns = list(result)
    header = [f"{metric} on {part}"] + [f"{c} (n={next(iter(result[c].values()))['n']})" for c in columns]
    lines = [header]
    for row in result[columns[0]]:
        sign = "+" if " - " in row else ""
        cells = [result[c][row] for c in columns]
        lines.append([row] + [f"{c['mean']:{sign}.3f} [{c['low']:{sign}.3f}, {c['high']:{sign}.3f}]" for c in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def evaluate_run(
    folder: Path, part: str = "test", metrics: Sequence[str] | None = None, env: Environment | None = None
) -> dict[str, Any]:
    """Raw query, untrained policy and the run's best checkpoint on one part, greedily; writes
    `evaluation.PART.json` (means, intervals) and `evaluation.PART.jsonl` (a row a query) into the run's folder.

    env: the run's environment where it is open already. Raises UserError where the folder holds no trained policy.
    """
    from rec_r1 import config, models, runs

    recipe = config.load(folder / "config.yaml")
    best = runs.best_policy(folder)
    env = env or open_environment(recipe)
    split = env.task.splits[part]
    names = list(metrics or recipe.evaluation.metrics)
    scorer = metric_scorer(env.scorer, names)
    source = runs.read_info(folder).get("model_source") or models.resolve(recipe.model.name)
    tokenizer = models.load_tokenizer(source)
    options = recipe.grpo.get("chat_template_kwargs") or {}
    length = int(recipe.grpo.get("max_completion_length") or 256)
    asked = prompts(split, env.task.catalog, env.format)
    scored = {"raw query": score_raw(split, scorer)}
    for policy, weights in (("untrained", None), ("trained", best)):
        model = models.load_policy_for_evaluation(source, recipe, weights)
        answers = generate(
            model, tokenizer, asked, length, recipe.evaluation.batch_size, options, f"{policy} policy, {part}"
        )
        scored[policy] = scorer.score_split(answers, split).whole()
        del model
        gc.collect()
    raw = scored["raw query"].components[names[0]]
    below = recipe.evaluation.mismatch_below
    result = {
        "part": part,
        "policy": str(best.relative_to(folder)),
        "metrics": {m: compare({p: s.components[m] for p, s in scored.items()}, raw, below) for m in names},
    }
    _write(folder, part, split, scored, result)
    return result


def _write(folder: Path, part: str, split: Split, scored: Mapping[str, Scored], result: Mapping[str, Any]) -> None:
    from rec_r1.runs import write_atomically

    rows = []
    for q, identifier in enumerate(split.ids):
        row: dict[str, Any] = {"query_id": identifier, "query": split.queries[q]}
        for policy, s in scored.items():
            action = s.actions[q]
            row[policy] = {
                "completion": s.outcome.completions[q],
                "action": None if action is None else action.text,
                **{m: None if np.isnan(v[q]) else round(float(v[q]), 6) for m, v in s.components.items()},
            }
        rows.append(json.dumps(row, ensure_ascii=False))
    write_atomically(folder / f"evaluation.{part}.jsonl", "\n".join(rows) + "\n")
    write_atomically(folder / f"evaluation.{part}.json", json.dumps(result, indent=1))
