"""What tests of a run's folder make: checkpoints, policies, damage, a closing evaluation."""

import json
from pathlib import Path

import numpy as np

from rec_r1 import runs
from rec_r1.runs import checkpoints

INFO = {
    "model_source": "m", "retriever_fingerprint": "f", "data_fingerprint": "d", "processes": "1", "sharding": "n",
    "versions": {},
}  # fmt: skip


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    """What the trainer saves for an adapter; trainer_state.json last."""
    import torch
    from safetensors.numpy import save_file

    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    save_file({"weight": np.ones(50, np.float32)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step, "of": np.arange(40, dtype=np.uint32), "at": torch.ones(30)}, path / name)
    if complete:
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0}))
    return path


def resumed_from(recipe, period: int = 1, steps: int = 500) -> str | None:
    runs.prepare(recipe, resume=True)
    step, path = runs.last_state(recipe, period, steps, resume=True)
    assert step == (checkpoints.step_of(path) if path else 0)
    return path and path.name


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "flipped":  # one byte of a tensor
        path.write_bytes(content[:-300] + bytes([content[-300] ^ 255]) + content[-299:])
    else:
        half, zeros = content[: len(content) // 2], bytes(len(content))
        whole = {"empty": b"", "cut": half, "short": content[:-1], "garbage": b"\x80\x02garbage", "zeros": zeros}
        path.write_bytes(whole[how])


def policy(folder: Path, value: float) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    save_file({"weight": np.full(3, value, np.float32)}, folder / "adapter_model.safetensors")
    return folder


def close(folder: Path, step: int) -> None:
    (folder / "evaluation" / "test").mkdir(parents=True)
    (folder / "evaluation" / "test" / "comparison.json").write_text("{}")
    runs.record(folder, closed=step)
