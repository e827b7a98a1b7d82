"""The end of a training: the evaluation on test, its table and the policy's card."""

from __future__ import annotations

import logging
from pathlib import Path

from rec_r1 import runs
from rec_r1.environment import Environment
from retrievers.core.index_folder import naming

logger = logging.getLogger("rec_r1.train")


def close(folder: Path, env: Environment, step: int) -> int:
    """Compare raw query, untrained and trained policy on test, once for a run of ``step`` steps. Returns 0."""
    from rec_r1.evaluation.evaluate import below_untrained, evaluate_run
    from rec_r1.evaluation.tables import closing
    from rec_r1.pages import cards

    if runs.is_closed(folder, step):
        logger.info("the closing evaluation already exists; rec-r1 eval %s repeats it", folder)
        return 0
    with naming(folder):
        result = evaluate_run(folder, env=env)
        cards.write_evaluated(folder)
    runs.record(folder, closed=step)
    paragraphs = filter(None, [closing(result, "test"), below_untrained(folder)])
    print("", *paragraphs, f"policy, curves and transcripts: {folder}", sep="\n\n")  # noqa: T201
    return 0
