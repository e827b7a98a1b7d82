"""The recorded rollouts of a run: `rollouts.jsonl`, and `rollouts.rankN.jsonl` of its other processes."""

from __future__ import annotations

from pathlib import Path


def file_of(run: Path, process: int) -> Path:
    """The file into which a process of a training writes its rollouts.

    run: the run's folder.
    process: the number of the process, from 0.
    """
    return run / ("rollouts.jsonl" if process == 0 else f"rollouts.rank{process}.jsonl")


def files(run: Path) -> list[Path]:
    """The files of all processes that exist in a run's folder."""
    return sorted(run.glob("rollouts*.jsonl"))
