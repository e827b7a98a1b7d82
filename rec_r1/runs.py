"""The folder of one run: what may start there, what is written there, where training goes on from."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec_r1.config import Recipe, UserError, comparable, dump, load
from retrievers import RetrieverError

logger = logging.getLogger(__name__)

# Sections whose change would make the continued run another experiment. `grpo` may change: more steps, say.
_FIXED = ("seed", "model", "lora", "task", "format", "retriever", "rewards")


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads ``path`` sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call ``function`` on the main process only and hand every process its result, or its UserError.

    What looks at the run's folder must look once: another process may already have written to it.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [function()]
        except (UserError, RetrieverError) as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def prepare(recipe: Recipe, resume: bool) -> Path | None:
    """Check that a run may start in `output_dir`; the checkpoint to continue from, None = from the beginning.

    Raises UserError, before anything is written, where the folder holds a run and ``resume`` is off, where it
    is on and there is none, or where the recipe is not the one that run was started with.
    """
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file: choose another with output_dir=FOLDER")
    # Baselines may have been evaluated, and reported, before anything is trained.
    before_training = {"evaluation", "baselines", "report.html", "report.md", "similarity-gap"}
    started = folder.is_dir() and any(path.name not in before_training for path in folder.iterdir())
    if started and not resume:
        raise UserError(
            f"output_dir: {folder} is not empty: continue its run with --resume, or choose another with "
            "output_dir=FOLDER"
        )
    if not resume:
        return None
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: {folder} holds no run (no config.yaml): leave --resume out to start one")
    before, now = comparable(load(folder / "config.yaml")), comparable(recipe)
    changed = [section for section in _FIXED if before[section] != now[section]]
    if changed:
        raise UserError(
            f"--resume: {folder} was started with another {changed[0]} ({before[changed[0]]!r}, now "
            f"{now[changed[0]]!r}): undo the change, or start anew with output_dir=FOLDER"
        )
    for key in sorted(before["grpo"].keys() | now["grpo"].keys()):
        if before["grpo"].get(key) != now["grpo"].get(key):
            was, is_now = before["grpo"].get(key), now["grpo"].get(key)
            logger.warning("--resume: grpo.%s was %r and is now %r", key, was, is_now)
    return last_checkpoint(folder)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. The trainer writes trainer_state.json last: without it the save was cut off."""
    found = [(_step(path), path) for path in folder.glob("checkpoint-*") if _complete(path)]
    return max(found)[1] if found else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text())) and _step(checkpoint) > 0
    except (OSError, ValueError):
        return False


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bm25s")}


def begin(recipe: Recipe, checkpoint: Path | None, info: dict[str, Any]) -> None:
    """Write config.yaml and run.json; on resume cut from the logs what lies behind the checkpoint.

    Raises UserError where the retriever or the model is not the one the run began with.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_info(folder)
    for key in ("retriever_fingerprint", "model_source"):
        if before and before.get(key) != info[key]:
            raise UserError(
                f"--resume: {key} was {before.get(key)!r} and is now {info[key]!r}: restore it, or start anew "
                "with output_dir=FOLDER"
            )
    step = _step(checkpoint) if checkpoint else 0
    if before:
        # A rollout is logged under the number of finished steps, so the checkpoint's own number is in its future;
        # without a checkpoint everything is written again.
        for log in folder.glob("metrics.jsonl"):
            _trim(log, step if checkpoint else -1)
        for log in folder.glob("rollouts*.jsonl"):
            _trim(log, step - 1)
        best = folder / "best.json"
        if best.is_file() and json.loads(best.read_text())["step"] > step:
            best.unlink()
            shutil.rmtree(folder / "best", ignore_errors=True)
    write_atomically(folder / "config.yaml", dump(recipe))
    write_atomically(folder / "run.json", json.dumps(info, indent=1))


def _trim(log: Path, last: int) -> None:
    """Drop rows of steps after ``last``, and a last line that a kill cut short: they are written again."""
    kept = [row for row in _rows(log) if row.get("step", 0) <= last]
    write_atomically(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without a last line that was cut short, be it inside a character. Split at line feeds
    only: a completion may hold other separators."""
    rows = []
    for line in log.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def read_info(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def best_policy(folder: Path) -> Path:
    """The folder of the run's best policy by validation, else of its last checkpoint. Raises UserError for none."""
    if (folder / "best.json").is_file() and (folder / "best").is_dir():
        return folder / "best"
    last = last_checkpoint(folder)
    if last is None:
        raise UserError(f"{folder}: no run with a trained policy (no best/ and no checkpoint): train one first")
    return last


def step_of(folder: Path, policy: Path) -> int:
    """The training step at which ``policy``, a result of :func:`best_policy`, was saved."""
    if policy.name == "best":
        return int(json.loads((folder / "best.json").read_text())["step"])
    return _step(policy)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, a half-written last line left out. Raises UserError where there is no such file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the folder of a run")
    return _rows(path)
