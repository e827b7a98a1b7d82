"""A run's checkpoints: from which of them training can continue. Reading one never executes code from a file."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

from rec_r1.config import UserError
from rec_r1.runs import processes

logger = logging.getLogger(__name__)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder. 0 = the folder is no checkpoint."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else 0


def found(folder: Path) -> list[Path]:
    """The folders of all checkpoints, including damaged ones, the newest first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) > 0]
    return sorted(paths, key=step_of, reverse=True)


def last(folder: Path) -> Path | None:
    """The newest checkpoint whose policy can be evaluated, because its weights can be read. None = there is none."""
    return next((path for path in found(folder) if state_problem(path) is None and weights_problem(path) is None), None)


def to_continue(folder: Path, saved: bool, period: int, total: int) -> Path | None:
    """The newest checkpoint from which training can continue. A warning is logged where newer ones are skipped.

    folder: the run's folder.
    saved: whether the run has ever completed a checkpoint.
    period: the number of steps between two moments at which a run can be resumed, see `trl_options.steps_a_generation`.
    total: the number of steps of the training. Its last checkpoint may lie between two such moments.

    Returns None where the run was stopped before it completed its first checkpoint, and therefore begins again.

    Raises UserError where checkpoints were completed and none can be read.
    """
    skipped: list[str] = []
    for path in found(folder):
        step = step_of(path)
        reason = problem(path)
        if reason is None and step % period and step < total:
            reason = f"it was saved inside a generation of {period} steps, whose completions no checkpoint holds"
        if reason is None:
            if skipped:
                logger.warning("--resume: %s: continuing from %s", "; ".join(skipped), path.name)
            return path
        skipped.append(f"{path.name} cannot be continued from ({reason})")
    if saved:
        raise UserError(
            f"--resume: {folder}: {'; '.join(skipped) or 'its checkpoints are gone'}: restore one from a copy, or "
            "start a new run with output_dir=FOLDER"
        )
    reasons = "; ".join(["--resume: the run was stopped before its first checkpoint was complete", *skipped])
    logger.warning("%s: %s begins again", reasons, folder)
    return None


def problem(checkpoint: Path) -> str | None:
    """Why the trainer cannot continue from a checkpoint, as "FILE: reason". None = it can."""
    reason = state_problem(checkpoint) or weights_problem(checkpoint)
    if reason is not None:
        return reason
    count = processes.launched()
    needed = ["scheduler.pt"]
    needed += ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    if any(checkpoint.glob("pytorch_model_fsdp*.bin")):  # FSDP wrote the weights and the optimizer whole.
        needed += ["pytorch_model_fsdp.bin", "optimizer.bin"]
    elif not _is_sharded(checkpoint):
        needed.append("optimizer.pt")
    existing = [
        str(path.relative_to(checkpoint))
        for pattern in ("*.pt", "*.pth", "*.bin", "global_step*/*.pt")
        for path in sorted(checkpoint.glob(pattern))
        if path.name != "training_args.bin"  # The trainer writes it and never reads it.
    ]
    for name in dict.fromkeys([*needed, *existing]):
        reason = _tensor_problem(checkpoint / name)
        if reason is not None:
            return f"{name}: {reason}"
    return _deepspeed_problem(checkpoint, count)


def _deepspeed_problem(checkpoint: Path, count: int) -> str | None:
    """Why DeepSpeed would not find its files in a checkpoint. None = it finds them, or the checkpoint has none."""
    folders = [path.name for path in checkpoint.glob("global_step*") if path.is_dir()]
    if not folders:
        return None
    latest = checkpoint / "latest"
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
    if named not in folders:
        return f"latest: {'missing' if named is None else f'it names {named!r}'}, and the folder is {folders[0]}"
    states = len(list((checkpoint / named).glob("*optim_states.pt")))
    return None if states == count else f"{named}: it has the optimizers of {states} of {count} processes"


def state_problem(checkpoint: Path) -> str | None:
    """The problem with trainer_state.json, the last file that the trainer writes. None = no problem."""
    from transformers import TrainerState

    path = checkpoint / "trainer_state.json"
    try:
        state: Any = TrainerState.load_from_json(str(path))
    except FileNotFoundError:
        return f"{path.name}: missing"
    except (OSError, ValueError, TypeError) as error:
        return f"{path.name}: damaged ({_short(error)})"
    if state.global_step != step_of(checkpoint) or not isinstance(state.epoch, int | float | None):
        return f"{path.name}: damaged (global_step {state.global_step!r}, epoch {state.epoch!r})"
    return None


def weights_problem(folder: Path) -> str | None:
    """Why the policy in a folder cannot be loaded. None = it can.

    folder: the folder of an adapter or of a whole model. Only the headers and lengths of safetensors files are checked.
    """
    if _is_sharded(folder) and not any(folder.glob("*.safetensors")):
        return None
    adapter = (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file()
    described = "adapter_config.json" if adapter else "config.json"
    for name in [described, *(path.name for path in folder.glob("*.index.json"))]:
        try:
            if not isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict):
                return f"{name}: damaged (no object)"
        except FileNotFoundError:
            return f"{name}: missing"
        except (OSError, ValueError) as error:
            return f"{name}: damaged ({_short(error)})"
    index = folder / "model.safetensors.index.json"
    if adapter:
        names = {"adapter_model.safetensors"}
    elif index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    else:
        names = {"model.safetensors"}
    for name in sorted(names):
        reason = _safetensors_problem(folder / name)
        if reason is not None:
            return f"{name}: {reason}"
    return None if names else f"{index.name}: damaged (it names no file)"


def _is_sharded(checkpoint: Path) -> bool:
    """Whether DeepSpeed or FSDP wrote the weights and the optimizer in parts, which are in folders of their own."""
    folders = (path for pattern in ("global_step*", "*_fsdp_*", "optimizer_*") for path in checkpoint.glob(pattern))
    return any(path.is_dir() for path in folders)


def _safetensors_problem(path: Path) -> str | None:
    """The problem with a safetensors file. None = no problem."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return None if list(file.keys()) else "damaged (no tensors)"
    except FileNotFoundError:
        return "missing"
    except (OSError, SafetensorError) as error:
        return f"damaged ({_short(error)})"


def _tensor_problem(path: Path) -> str | None:
    """The problem with a file of torch.save. None = no problem.

    The file is a zip archive with checksums. It is loaded without executing code from it, as the trainer loads it.
    DeepSpeed loads its own files without this protection, so they must pass this check first.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"damaged (checksum of {broken})"
        classes = _classes_of_deepspeed() if path.parent.name.startswith("global_step") else []
        with safe_globals(), torch.serialization.safe_globals(classes):
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        return "missing"
    except ImportError:
        return "DeepSpeed wrote it, but DeepSpeed is not installed: pip install 'rec-r1[zero]'"
    except Exception as error:  # A damaged archive may raise any exception.
        return f"damaged ({_short(error)})"
    return None


def _classes_of_deepspeed() -> list[Any]:
    """The classes of DeepSpeed that its checkpoints hold. Their objects hold numbers, and loading them runs no code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [ZeroStageEnum, LossScaler, DynamicLossScaler]


def _short(error: Exception) -> str:
    """The first sentence of an error's message, because torch adds a page of advice."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0][:120] if lines else type(error).__name__
