"""Checks of the settings that all models of this package have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def model_problems(model: Any, batch_size: Any, device: Any, trust_remote_code: Any) -> list[str]:
    """One line for each wrong one of the settings that all models have. A device is looked for on this machine."""
    found = []
    if not isinstance(model, str) or not model.strip():
        found.append(f"retriever.params.model must be a folder, a hub id or a name, got {model!r}")
    if type(batch_size) is not int or batch_size < 1:
        found.append(f"retriever.params.batch_size must be an integer >= 1, got {batch_size!r}")
    if type(trust_remote_code) is not bool:
        found.append(f"retriever.params.trust_remote_code must be true or false, got {trust_remote_code!r}")
    if device is not None:
        found.extend(device_problems(device))
    return found


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not have on this machine."""
    for problem in device_problems(device):
        raise ValueError(problem)


def device_problems(device: Any) -> Iterator[str]:
    """One line for a device that torch does not have on this machine; no line for one that it has."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        yield (
            f"retriever.params.device: {device!r} is not available on this machine ({reason}): leave it out, or set cpu"
        )
