"""A run's folder: whether a run may start there, what it writes there, and from where it continues."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rec_r1.config import DOCUMENT_END, RUN_FILE, Recipe, UserError, dump, load
from rec_r1.runs import checkpoints, jsonl, lock, replaced, rollouts, run_config
from retrievers.core.index_folder import naming

logger = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that its readers see either the old content or the new one. An OSError names ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # Where the folder is none, the file cannot be removed either.
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def refuse_unwritable(folder: Path) -> None:
    """Raise UserError where ``folder`` or a folder above it is a file, and where nothing can be written there."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir: {path} is a file: choose another with output_dir=FOLDER")
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: nothing can be written into {there}: choose another with output_dir=FOLDER")


def is_started(folder: Path) -> bool:
    """Whether a folder holds a run, or other files that a new run would mix with.

    Raises UserError as :func:`refuse_unwritable`.
    """
    refuse_unwritable(folder)
    # Baselines may be evaluated and reported before anything is trained. A start may have been killed before it wrote
    # config.yaml, which is written last and makes the folder a run.
    pages = {"report.html", "report.md", "similarity-gap", "tuning-grid"}
    before_training = {"evaluation", "baselines", "warm_start", lock.NAME, *pages}
    if not (folder / RUN_FILE).is_file():
        before_training.add("run.json")
    return folder.is_dir() and any(
        path.name not in before_training and not _is_temporary(path) for path in folder.iterdir()
    )


def not_empty(folder: Path) -> str:
    """The message for a new run in a folder for which :func:`is_started` is true."""
    return (
        f"output_dir: {folder} is not empty: continue its run with --resume, or choose another with output_dir=FOLDER"
    )


def prepare(recipe: Recipe, resume: bool, takes_copies: bool = False) -> None:
    """Check that a run may start or continue in the recipe's output_dir. Nothing is written.

    recipe: the recipe.
    resume: whether the run is resumed.
    takes_copies: whether the folder may be empty on resume, because the files of another machine are copied to it.

    Raises UserError where the folder is not empty and ``resume`` is False. Where ``resume`` is True, raises UserError
    for a folder without a run, and for a run with other settings that may not change.
    """
    folder = Path(recipe.output_dir)
    if is_started(folder) and not resume:
        raise UserError(not_empty(folder))
    if not resume:
        return
    if not (folder / RUN_FILE).is_file():
        if takes_copies and not is_started(folder):
            return
        fix = "empty it" if takes_copies else "leave --resume out to start one"
        raise UserError(f"--resume: {folder} holds no run (no config.yaml): {fix}")
    run_config.refuse_other_processes(folder, read_info(folder).get("processes"))
    facts = read_info(folder)
    for key, before, now in run_config.changes(load(folder / RUN_FILE), recipe):
        # model.dtype may be written out, because `begin` compares the type that it stands for, where that is recorded.
        if not (run_config.may_change(key) or (key == "model.dtype" and "dtype" in facts)):
            raise UserError(
                f"--resume: {folder} was started with another {key} ({before!r}, now {now!r}): undo the change, or "
                "start a new run with output_dir=FOLDER"
            )
        if key != "output_dir":
            logger.warning("--resume: %s was %r and is now %r", key, before, now)


def _is_temporary(path: Path) -> bool:
    """Whether a path is a temporary file or folder that a killed process has left, see :func:`write_atomically`."""
    return path.name.startswith(".") and (path.name.endswith(".tmp") or ".tmp." in path.name)


def last_state(recipe: Recipe, period: int, steps: int, resume: bool) -> tuple[int, Path | None]:
    """The step from which a run continues, and the checkpoint of that step.

    recipe: the recipe, whose output_dir is the run's folder.
    period: the number of steps between two moments at which a run can be resumed, see `checkpoints.to_continue`.
    steps: the number of steps of the training.
    resume: whether the run is resumed. False = it starts from the beginning.

    Returns (0, None) for a run that starts from the beginning. A number of at least ``steps`` together with None means
    a finished run that keeps no checkpoint, such as one with grpo.save_strategy=no.

    Raises UserError where checkpoints were saved and none can be read.
    """
    if not resume:
        return 0, None
    folder = Path(recipe.output_dir)
    info, found = read_info(folder), checkpoints.found(folder)
    closed = info.get("closed")
    if not found and isinstance(closed, int) and closed >= steps and is_closed(folder, closed):
        return closed, None
    saved = bool(info.get("saved", found))  # Older versions did not record it.
    checkpoint = checkpoints.to_continue(folder, saved, period, steps)
    return (checkpoints.step_of(checkpoint) if checkpoint else 0), checkpoint


def fingerprint(dataset: Any, validation: Any) -> str:
    """The sha256 of the training rows (prompts, targets, grades) and of the validation queries with their targets."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True).encode())
    for row in zip(validation.ids, validation.queries, validation.rows, validation.grades, strict=True):
        digest.update(json.dumps([[float(x) for x in v] if not isinstance(v, str) else v for v in row]).encode())
    return digest.hexdigest()


def is_closed(folder: Path, step: int) -> bool:
    """Whether the closing evaluation of a run of ``step`` steps was made, and its result still exists."""
    exists = (folder / "evaluation" / "test" / "comparison.json").is_file()
    return exists and read_info(folder).get("closed") == step


def describe(recipe: Recipe, args: Any, model_source: str, retriever: str, data: str) -> dict[str, Any]:
    """The facts about a run that its recipe does not hold, for run.json.

    recipe: the recipe.
    args: the `trl.GRPOConfig`.
    model_source: the model, a result of `models.resolve`.
    retriever, data: the fingerprints of the retriever and of the data.
    """
    from rec_r1 import models

    return {
        "model_source": model_source,
        "retriever_fingerprint": retriever,
        "data_fingerprint": data,
        "processes": args.world_size,
        "sharding": models.sharding(args),
        "dtype": str(models.dtype_of(recipe.model, recipe.lora is None)).removeprefix("torch."),
        "device": models.device_name(args.device, args.world_size),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The installed versions of the packages that a result depends on most, by name."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bm25s")}


def begin(recipe: Recipe, step: int, info: dict[str, Any], resume: bool = False) -> None:
    """Write run.json and config.yaml. For a run that is resumed, first remove everything that was written after a step.

    This covers rows of the logs, checkpoints, the best policy and the record of a closing evaluation.

    recipe: the recipe, whose output_dir is the run's folder.
    step: the step from which the run continues. 0 = the beginning.
    info: the facts of the run, from :func:`describe`.
    resume: whether the run is resumed.

    Raises UserError where the folder holds a run and ``resume`` is False, and where the retriever, the data, the model,
    the number of processes, the sharding or the numeric type of a resumed run has changed.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resumed = (folder / RUN_FILE).is_file()
    if resumed and not resume:  # On a file system without locks another training may have begun since `prepare`.
        raise UserError(not_empty(folder))
    before = read_info(folder) if resumed else {}
    run_config.refuse_changed_facts(before, info)
    if resumed:
        _remove_after(folder, step)
    facts = info | {"saved": before.get("saved", step)}
    if isinstance(before.get("closed"), int) and before["closed"] <= step:
        facts["closed"] = before["closed"]
    write_atomically(folder / "run.json", json.dumps(facts, indent=1))
    write_atomically(folder / RUN_FILE, dump(run_config.absolute(recipe)) + DOCUMENT_END)


def record(folder: Path, **facts: Any) -> None:
    """Add facts to run.json.

    saved: the last step whose checkpoint is complete.
    closed: the step whose policy the closing evaluation evaluated.
    """
    write_atomically(folder / "run.json", json.dumps(read_info(folder) | facts, indent=1))


def _remove_after(folder: Path, step: int) -> None:
    """Remove what a run wrote after ``step`` (0 = everything), and the temporary files of a killed process."""
    for path in [*folder.iterdir(), *folder.glob("evaluation/**/.*")]:
        if _is_temporary(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # A rollout is logged with the number of finished steps, so rows with the checkpoint's number belong to the next
    # step. Without a checkpoint, all rows are written again.
    for log in folder.glob("metrics.jsonl"):
        _trim(log, step or -1)
    rollouts.remove_after(folder, step - 1)
    for path in checkpoints.found(folder):
        if checkpoints.step_of(path) > step:
            shutil.rmtree(path)
    restore_best(folder)
    path = folder / "best.json"
    if path.is_file() and best_record(folder)["step"] > step:
        kept = max((one for one in replaced.steps(folder) if one <= step), default=None)
        if kept is None:
            path.unlink()
        else:
            write_atomically(path, replaced.record_of(folder, kept).read_text(encoding="utf-8"))
        restore_best(folder)


def _trim(log: Path, last: int) -> None:
    """Drop the rows of steps after ``last``, and an incomplete last line. The training writes them again."""
    kept = [row for row in read_rows(log) if isinstance(step := row.get("step"), int) and step <= last]
    write_atomically(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file of this toolkit. Raises UserError, with the file and ``fix``, where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # The JSON or its encoding is wrong.
        raise UserError(f"{path}: damaged ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (no JSON object): {fix}")
    return content


def read_rows(path: Path, fix: str = "delete that line", may_be_cut: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSONL file. It is split at line feeds only, because a completion may hold other separators.

    path: the file.
    fix: what the user can do about a damaged line.
    may_be_cut: whether an incomplete last line is ignored, as a killed process leaves it.

    Raises UserError, with the line and ``fix``, for any other damaged line.
    """
    with path.open("rb") as lines:
        return [row for row, _ in jsonl.rows(lines, path, fix, may_be_cut)]


def read_info(folder: Path) -> dict[str, Any]:
    """The facts in run.json about a run. Empty where there is no such file."""
    path = folder / "run.json"
    return read_json(path, "delete it, and the run is compared by its recipe alone") if path.is_file() else {}


def model_source(folder: Path, recipe: Recipe) -> str:
    """The place of the model before training: as recorded by the run, or as found now if that folder has moved."""
    from rec_r1 import models

    source = read_info(folder).get("model_source")
    return source if isinstance(source, str) and Path(source).is_dir() else models.resolve(recipe.model.name)


def best_policy(folder: Path) -> Path:
    """The folder of the run's best policy by validation, or of its last checkpoint where there is no best policy.

    Raises UserError where there is neither, and for a best policy that is damaged.
    """
    found = find_policy(folder)
    if found is None:
        raise UserError(f"{folder}: no run with a trained policy (no best/ and no checkpoint): train one first")
    return found


def find_policy(folder: Path) -> Path | None:
    """As :func:`best_policy`, but None where there is neither."""
    if (folder / "best.json").is_file():
        best = replaced.folder_of(folder, best_record(folder)["step"])
        best = best if best.is_dir() else folder / "best"
        if best.is_dir():
            reason = checkpoints.weights_problem(best)
            if reason is not None:
                raise UserError(
                    f"{best}: {reason}: restore it from a copy, or delete best.json to use the last checkpoint instead"
                )
            return best
    return checkpoints.last(folder)


def step_of(folder: Path, policy: Path) -> int:
    """The training step at which a policy was saved. ``policy``: a result of :func:`best_policy`."""
    return checkpoints.step_of(policy) or int(best_record(folder)["step"])


def best_record(folder: Path) -> dict[str, Any]:
    """The step, metric and value of the policy in best/, from best.json. Raises UserError where it is damaged."""
    path, fix = folder / "best.json", "delete it to use the last checkpoint as the best policy"
    record = read_json(path, fix)
    for key, kind in (("step", int), ("metric", str), ("value", (int, float))):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path}: damaged ({key}: {record.get(key)!r}): {fix}")
    return record


def replace_best(folder: Path, policy: Path, record: dict[str, Any]) -> None:
    """Replace the run's best/ and best.json.

    best.json is written after best/ is in place. Until then the old policy is kept beside it, so that a process that is
    killed at any moment leaves a policy with its record. It is kept longer where the run may be resumed from a
    checkpoint at which it was the best one, see :func:`restore_best`.

    folder: the run's folder.
    policy: a folder with the new policy. It is moved.
    record: the new policy's step, metric and value.
    """
    best, path = folder / "best", folder / "best.json"
    restore_best(folder)
    if path.is_file() and best.is_dir():
        step = best_record(folder)["step"]
        write_atomically(replaced.record_of(folder, step), path.read_text(encoding="utf-8"))
        best.replace(replaced.folder_of(folder, step))
    policy.replace(best)
    write_atomically(path, json.dumps(record))
    restore_best(folder)


def restore_best(folder: Path) -> None:
    """Make best/ the policy that best.json names, after a replacement that stopped before best.json was written.

    Each replaced policy is removed, unless it is the best one of some checkpoint.
    """
    best, newest = folder / "best", 0
    if (folder / "best.json").is_file():
        newest = best_record(folder)["step"]
        old = replaced.folder_of(folder, newest)
        if old.is_dir():
            shutil.rmtree(best, ignore_errors=True)
            old.replace(best)
    else:
        shutil.rmtree(best, ignore_errors=True)
    replaced.remove_unneeded(folder, newest)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without an incomplete last line.

    Raises UserError where there is no such file, and for a damaged row.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the folder of a run")
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path}: row {number} is damaged (no step): delete that line")
    return rows


def check_run(folder: Path) -> Path:
    """Return ``folder`` if it holds a run. Raises UserError otherwise."""
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{folder}: not a run (no {RUN_FILE}): give the output_dir of a training")
    return folder


def names(folders: Sequence[Path]) -> list[str]:
    """The names of runs: the names of their folders, or their paths where two folders have the same name."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
