"""The completions of a policy for the queries of a split: those of an earlier evaluation, or new ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rec_r1 import generation
from rec_r1.config import Recipe
from rec_r1.evaluation import records
from rec_r1.generation import Sampling, sampling_of
from rec_r1.prompts import Prompt

logger = logging.getLogger(__name__)


class Answers(NamedTuple):
    """The completions of a policy.

    texts: Q x samples completions. Those of a query follow each other.
    identity: the identity under which they are stored, see `generation.identity`.
    query_seconds: how many seconds the completions of one query took, on average. None = not known.
    """

    texts: list[str]
    identity: str
    query_seconds: float | None


def answered(
    recipe: Recipe,
    source: str,
    weights: Path | None,
    asked: Sequence[Prompt],
    progress: str,
    sampling: Sampling | None = None,
) -> Answers:
    """The completions of a policy: stored ones, if the same policy answered the same prompts in the same way, or new.

    recipe: the run's recipe, with `output_dir` set to the run's folder.
    source, weights, asked, progress: as in `generation.answer`.
    sampling: how completions are generated. None = greedily, with the recipe's options.

    Raises UserError for generation options that are wrong, and where the model does not load.
    """
    sampling = sampling or sampling_of(recipe)
    identity = generation.identity(recipe, source, weights, asked, sampling)
    kept = records.stored(Path(recipe.output_dir), identity)
    if kept is not None:
        logger.info("%s: reusing stored answers; no model is loaded", progress)
        return Answers(records.answers_in(kept), identity, (kept.used or {}).get("query_seconds"))
    texts, seconds = generation.answer(recipe, source, weights, asked, progress, sampling)
    return Answers(texts, identity, seconds / len(asked))
