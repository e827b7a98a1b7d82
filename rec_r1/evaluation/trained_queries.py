"""Whether a run was trained on held-out queries.

No task has a query in two splits. Where its data are edited after a training, for example divided anew, queries that
the run was trained on may become test queries, and what the policy gains on them is no gain on new queries.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rec_r1.environment import Environment
from rec_r1.runs import rollouts
from rec_r1.tasks import Split, prompts
from rec_r1.tasks.integrity import normal

logger = logging.getLogger(__name__)


def trained_queries(folder: Path, split: Split, asked: Iterable[Any]) -> list[str]:
    """The ids of the queries of a split that a run's recorded rollouts were made for, in the order of the split.

    A query of text is the same query where its text is the same but for case and the like (`integrity.normal`): its
    id, and the examples in its prompt, may have changed. A query with a history is the same where its id and its prompt
    are.

    folder: the run's folder.
    split: the held-out queries.
    asked: their Q prompts.

    Raises UserError where a file of rollouts is damaged.
    """
    by_prompt = bool(split.histories)
    keys: list[Any]
    if by_prompt:
        keys = [(one, json.dumps(prompt)) for one, prompt in zip(split.ids, asked, strict=True)]
    else:
        keys = [normal(query) for query in split.queries]
    left = set(keys)
    for file in rollouts.files(folder):
        for row, _ in rollouts.rows(file):
            left.discard((row.get("query_id"), json.dumps(row["prompt"])) if by_prompt else normal(row["query"]))
    return [one for one, key in zip(split.ids, keys, strict=True) if key not in left]


def warn(folder: Path, split_name: str, env: Environment) -> None:
    """Log a warning where a run was trained on queries of its validation or test split.

    folder: the run's folder.
    split_name: the split that is to be evaluated.
    env: the environment of the run, with its data as they are now.

    Raises UserError where a file of rollouts is damaged.
    """
    if split_name == "train":
        return
    split = env.task.splits[split_name]
    found = trained_queries(folder, split, prompts(split, env.task.catalog, env.format))
    if found:
        logger.warning(
            "%s was trained on %d of the %d %s queries, such as %r, because its data were edited since then. Its gain "
            "on these queries says nothing about new ones: restore the data of the training, or train again",
            folder,
            len(found),
            len(split),
            split_name,
            found[0],
        )
