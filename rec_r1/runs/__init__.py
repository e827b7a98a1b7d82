"""The folder of one run: what may start there, what is written there, where training goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rec_r1.runs import checkpoints, run_config
from rec_r1.config import DOCUMENT_END, RUN_FILE, Recipe, UserError, dump, load
from retrievers import RetrieverError
from retrievers.core.index_folder import naming

logger = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Readers of ``path`` see the old content or the new, never a part. An OSError names ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call ``function`` on the main process only and hand every process its result, or its UserError,
    RetrieverError or OSError.

    What looks at the run's folder must look once: another process may already have written to it.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    answer: list[Any] = [None]
    if state.is_main_process:
        try:
            answer = [function()]
        except (UserError, RetrieverError, OSError) as error:
            answer = [error]
    if state.num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def is_started(folder: Path) -> bool:
    """Whether ``folder`` holds more than what may lie there before a training starts. Raises UserError where it, or a
    folder above it, is a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"output_dir: {path} is a file: choose another with output_dir=FOLDER")
    # Baselines may have been evaluated, and reported, before anything is trained; and a start may have been killed
    # before config.yaml, which is written last and makes the folder a run.
    before_training = {"evaluation", "baselines", "report.html", "report.md", "similarity-gap"}
    if not (folder / RUN_FILE).is_file():
        before_training.add("run.json")
    return folder.is_dir() and any(
        path.name not in before_training and not _is_temporary(path) for path in folder.iterdir()
    )


def not_empty(folder: Path) -> str:
    """What is wrong where a run would start in a folder that is started already."""
    return (
        f"output_dir: {folder} is not empty: continue its run with --resume, or choose another with output_dir=FOLDER"
    )


def prepare(recipe: Recipe, resume: bool) -> None:
    """Check that a run may start, or go on, in `output_dir`.

    Raises UserError, before anything is written, where the folder holds a run and ``resume`` is off, where it
    is on and there is none, or where the recipe is not the one that run was started with.
    """
    folder = Path(recipe.output_dir)
    if is_started(folder) and not resume:
        raise UserError(not_empty(folder))
    if not resume:
        return
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"--resume: {folder} holds no run (no config.yaml): leave --resume out to start one")
    for key, before, now in run_config.changes(load(folder / RUN_FILE), recipe):
        if not run_config.may_change(key):
            raise UserError(
                f"--resume: {folder} was started with another {key} ({before!r}, now {now!r}): undo the change, or "
                "start anew with output_dir=FOLDER"
            )
        if key != "output_dir":
            logger.warning("--resume: %s was %r and is now %r", key, before, now)


def _is_temporary(path: Path) -> bool:
    """Whether it is what a killed process was writing, see :func:`write_atomically`."""
    return path.name.startswith(".") and (path.name.endswith(".tmp") or ".tmp." in path.name)


def last_state(recipe: Recipe, period: int, steps: int, resume: bool) -> tuple[int, Path | None]:
    """The step that the run in `output_dir` has reached, and the checkpoint from which it goes on to ``steps`` steps.

    0 and None = from the beginning; no checkpoint and at least ``steps`` = a finished run that keeps none, such as one
    with grpo.save_strategy=no. Raises UserError where checkpoints were saved and none can be read. period: see
    :func:`checkpoints.to_continue`.
    """
    if not resume:
        return 0, None
    folder = Path(recipe.output_dir)
    info, found = read_info(folder), checkpoints.found(folder)
    closed = info.get("closed")
    if not found and isinstance(closed, int) and closed >= steps and is_closed(folder, closed):
        return closed, None
    saved = bool(info.get("saved", found))  # older versions kept no record
    checkpoint = checkpoints.to_continue(folder, saved, period, steps)
    return (checkpoints.step_of(checkpoint) if checkpoint else 0), checkpoint


def fingerprint(dataset: Any, validation: Any) -> str:
    """sha256 of the training rows (prompts, targets, grades, …) and of the validation queries and judgments."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True).encode())
    for row in zip(validation.ids, validation.queries, validation.rows, validation.grades, strict=True):
        digest.update(json.dumps([[float(x) for x in v] if not isinstance(v, str) else v for v in row]).encode())
    return digest.hexdigest()


def is_closed(folder: Path, step: int) -> bool:
    """Whether the closing evaluation of a run of ``step`` steps was done and is there."""
    there = (folder / "evaluation" / "test" / "comparison.json").is_file()
    return there and read_info(folder).get("closed") == step


def describe(args: Any, model_source: str, retriever: str, data: str) -> dict[str, Any]:
    """What a run is beside its recipe, for run.json. args: the trainer's; retriever, data: their fingerprints."""
    from rec_r1 import models

    return {
        "model_source": model_source,
        "retriever_fingerprint": retriever,
        "data_fingerprint": data,
        "processes": args.world_size,
        "device": models.device_name(args.device, args.world_size),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bm25s")}


# What a run is compared by when it is resumed, beside its recipe; an older run's run.json may lack some.
_SAME = ("retriever_fingerprint", "data_fingerprint", "model_source", "processes")


def begin(recipe: Recipe, step: int, info: dict[str, Any]) -> None:
    """Write run.json and config.yaml; on resume remove what was written after ``step``, which the run goes on from
    (0 = the beginning): rows of the logs, checkpoints, a best policy, the record of a closing evaluation.

    Raises UserError where the retriever, the data, the model or the number of processes is not the run's own.
    """
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    resumed = (folder / RUN_FILE).is_file()
    before = read_info(folder) if resumed else {}
    for key in _SAME:
        # The model's folder lies in the cache, wherever that is: its name says which model and which version.
        was, now = (Path(str(i.get(key))).name if key == "model_source" else i.get(key) for i in (before, info))
        if key in before and was != now:
            raise UserError(
                f"--resume: {key} was {before[key]!r} and is now {info.get(key)!r}: restore it, or start anew with "
                "output_dir=FOLDER"
            )
    if resumed:
        _forget(folder, step)
    kept = {"saved": before.get("saved", step)}
    if isinstance(before.get("closed"), int) and before["closed"] <= step:
        kept["closed"] = before["closed"]
    write_atomically(folder / "run.json", json.dumps(info | kept, indent=1))
    write_atomically(folder / RUN_FILE, dump(run_config.absolute(recipe)) + DOCUMENT_END)


def record(folder: Path, **facts: Any) -> None:
    """Add to run.json: saved = the last step whose checkpoint is complete, closed = the step at whose policy the
    closing evaluation was done."""
    write_atomically(folder / "run.json", json.dumps(read_info(folder) | facts, indent=1))


def _forget(folder: Path, step: int) -> None:
    """Remove what a run wrote after ``step`` (0 = everything), and what a kill left half done."""
    for path in [*folder.iterdir(), *folder.glob("evaluation/**/.*")]:
        if _is_temporary(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # A rollout is logged under the number of finished steps, so the checkpoint's own number is in its future; without
    # a checkpoint everything is written again.
    for log in folder.glob("metrics.jsonl"):
        _trim(log, step or -1)
    for log in folder.glob("rollouts*.jsonl"):
        _trim(log, step - 1)
    for path in checkpoints.found(folder):
        if checkpoints.step_of(path) > step:
            shutil.rmtree(path)
    restore_best(folder)
    if (folder / "best.json").is_file() and best_record(folder)["step"] > step:
        (folder / "best.json").unlink()
        shutil.rmtree(folder / "best", ignore_errors=True)


def _trim(log: Path, last: int) -> None:
    """Drop rows of steps after ``last``, and a last line that a kill cut short: they are written again."""
    kept = [row for row in read_rows(log) if isinstance(step := row.get("step"), int) and step <= last]
    write_atomically(log, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file that this toolkit wrote. Raises UserError, naming the file and ``fix``, for another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of the encoding
        raise UserError(f"{path}: damaged ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (no JSON object): {fix}")
    return content


def read_rows(path: Path, fix: str = "delete that line", may_be_cut: bool = True) -> list[dict[str, Any]]:
    """The rows of a JSONL file, without a last line that was cut short, be it inside a character, where the file grows
    line by line (``may_be_cut``). Split at line feeds only: a completion may hold other separators. Raises UserError,
    naming line and ``fix``, for another broken line."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if may_be_cut and number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged ({error}): {fix}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is damaged (no JSON object): {fix}")
        if row:
            rows.append(row)
    return rows


def read_info(folder: Path) -> dict[str, Any]:
    """run.json, what a run is beside its recipe; empty where there is none."""
    path = folder / "run.json"
    return read_json(path, "delete it, and the run is compared by its recipe alone") if path.is_file() else {}


def model_source(folder: Path, recipe: Recipe) -> str:
    """What the run's model is loaded from: where it was when the run began, else where it is found today (the run or
    the cache was moved)."""
    from rec_r1 import models

    source = read_info(folder).get("model_source")
    return source if isinstance(source, str) and Path(source).is_dir() else models.resolve(recipe.model.name)


def best_policy(folder: Path) -> Path:
    """The folder of the run's best policy by validation, else of its last checkpoint. Raises UserError for none, and
    for a best policy that is damaged."""
    if (folder / "best.json").is_file():
        best = _replaced(folder, best_record(folder)["step"])
        best = best if best.is_dir() else folder / "best"
        if best.is_dir():
            reason = checkpoints.weights_problem(best)
            if reason is not None:
                raise UserError(
                    f"{best}: {reason}: restore it from a copy, or delete best.json and the last checkpoint is taken"
                )
            return best
    last = checkpoints.last(folder)
    if last is None:
        raise UserError(f"{folder}: no run with a trained policy (no best/ and no checkpoint): train one first")
    return last


def step_of(folder: Path, policy: Path) -> int:
    """The training step at which ``policy``, a result of :func:`best_policy`, was saved."""
    return checkpoints.step_of(policy) or int(best_record(folder)["step"])


def best_record(folder: Path) -> dict[str, Any]:
    """best.json: step, metric and value of the policy in best/. Raises UserError where it is damaged."""
    path, fix = folder / "best.json", "delete it, and the last checkpoint is taken for the best policy"
    record = read_json(path, fix)
    for key, kind in (("step", int), ("metric", str), ("value", (int, float))):
        if not isinstance(record.get(key), kind):
            raise UserError(f"{path}: damaged ({key}: {record.get(key)!r}): {fix}")
    return record


def replace_best(folder: Path, policy: Path, record: dict[str, Any]) -> None:
    """Make the folder ``policy`` the run's best/, described by best.json.

    best.json is written after best/ is in place; until then the policy it describes is kept beside it, so that a kill
    at any moment leaves a pair, see :func:`restore_best`.
    """
    best, path = folder / "best", folder / "best.json"
    restore_best(folder)
    old = _replaced(folder, best_record(folder)["step"]) if path.is_file() else None
    if old is not None and best.is_dir():
        best.replace(old)
    policy.replace(best)
    write_atomically(path, json.dumps(record))
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def restore_best(folder: Path) -> None:
    """Undo a replacement of best/ that was not finished, and finish one that was."""
    best, path = folder / "best", folder / "best.json"
    if not path.is_file():
        shutil.rmtree(best, ignore_errors=True)
        return
    old = _replaced(folder, best_record(folder)["step"])
    if old.is_dir():
        shutil.rmtree(best, ignore_errors=True)
        old.replace(best)
    for other in folder.glob(".best-*.old"):
        shutil.rmtree(other)


def _replaced(folder: Path, step: int) -> Path:
    """Where the best policy of ``step`` is while another takes its place."""
    return folder / f".best-{step}.old"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, a half-written last line left out. Raises UserError where there is no such file."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the folder of a run")
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise UserError(f"{path}: row {number} is damaged (no step): delete that line")
    return rows


def check_run(folder: Path) -> Path:
    """``folder``, where it is a run. Raises UserError otherwise."""
    if not (folder / RUN_FILE).is_file():
        raise UserError(f"{folder}: not a run (no {RUN_FILE}): give the output_dir of a training")
    return folder


def names(folders: Sequence[Path]) -> list[str]:
    """What each run is called: its folder's name; those of one name go by their paths."""
    short = [folder.resolve().name for folder in folders]
    return [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]
