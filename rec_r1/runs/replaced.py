"""The best policies of a run that others have replaced, kept for a resume from a checkpoint before the replacement."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rec_r1.runs import checkpoints

_NAME = re.compile(r"[_.]best-(\d+)(?:\.json|\.old)?")


def folder_of(folder: Path, step: int) -> Path:
    """Where a run's folder keeps the best policy of ``step`` after another one has replaced it."""
    before = folder / f".best-{step}.old"  # An older version that was killed has left it.
    # With grpo.push_to_hub the trainer uploads nothing whose name begins with an underscore.
    return before if before.is_dir() else folder / f"_best-{step}"


def record_of(folder: Path, step: int) -> Path:
    """Where a run's folder keeps the best.json of that policy."""
    return folder / f"_best-{step}.json"


def steps(folder: Path) -> set[int]:
    """The steps of all replaced policies of which a folder holds something."""
    return {int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}


def remove_unneeded(folder: Path, newest: int) -> None:
    """Remove each replaced policy that was the best one at no checkpoint of the run.

    folder: the run's folder.
    newest: the step of the best policy. 0 = there is none.
    """
    saved, newer = [checkpoints.step_of(path) for path in checkpoints.found(folder)], newest
    for step in sorted(steps(folder), reverse=True):
        policy, record = folder_of(folder, step), record_of(folder, step)
        if policy.is_dir() and record.is_file() and any(step <= one < newer for one in saved):
            newer = step
        else:
            shutil.rmtree(policy, ignore_errors=True)
            record.unlink(missing_ok=True)
