"""Checks of settings that several models have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LEAST_LENGTH = 8  # Of a text that is cut, in tokens. The marks around a pair of texts take three or four of them.


def model_problems(settings: Mapping[str, Any]) -> list[str]:
    """One line for each wrong setting of those that the models of this package share. A device is looked for on this
    machine.

    settings: name -> value. `model`, `batch_size`, `device` and `trust_remote_code` must be there; the names of
        prefixes end with "_prefix", and those of lengths with "_length".
    """
    found = []
    model, batch_size, trusted = settings["model"], settings["batch_size"], settings["trust_remote_code"]
    if not isinstance(model, str) or not model.strip():
        found.append(f"retriever.params.model must be a folder, a hub id or a name, got {model!r}: correct it")
    if type(batch_size) is not int or batch_size < 1:
        found.append(f"retriever.params.batch_size must be an integer >= 1, got {batch_size!r}: 64 is usual")
    if type(trusted) is not bool:
        found.append(f"retriever.params.trust_remote_code must be true or false, got {trusted!r}: false is usual")
    for name, value in settings.items():
        if name.endswith("_prefix") and not isinstance(value, str):
            found.append(f"retriever.params.{name} must be a text, got {value!r}: put it in quotes")
        if name.endswith("_length") and value is not None and (type(value) is not int or value < LEAST_LENGTH):
            found.append(
                f"retriever.params.{name} must be null or an integer >= {LEAST_LENGTH}, got {value!r}: null takes the "
                "model's own"
            )
    if settings["device"] is not None:
        found.extend(device_problems(settings["device"]))
    return found


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch does not have on this machine."""
    for problem in device_problems(device):
        raise ValueError(problem)


def device_problems(device: Any) -> Iterator[str]:
    """One line for a device on which torch cannot compute on this machine; no line for one on which it can."""
    import torch

    try:
        if not isinstance(device, str):
            raise TypeError("it must be a name such as cuda:0")
        torch.ones(1, device=device).item()  # The device "meta" has tensors, but no values.
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        yield (
            f"retriever.params.device: {device!r} is not available on this machine ({reason}): leave it out, or set cpu"
        )
