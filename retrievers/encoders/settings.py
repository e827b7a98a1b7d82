"""Checks of settings that several models have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from retrievers.core.parameters import Checks, check_flag, check_integer, check_text, wrong

LEAST_LENGTH = 8  # Of a text that is cut, in tokens. The marks around a pair of texts take three or four of them.


def model_problems(settings: Mapping[str, Any]) -> list[str]:
    """One line for each wrong setting of those that the models of this package share. A device is looked for on this
    machine.

    settings: name -> value. `model`, `batch_size`, `device` and `trust_remote_code` must be there; the names of
        prefixes end with "_prefix", and those of lengths with "_length".
    """
    checks = Checks()
    with checks:
        if not isinstance(settings["model"], str) or not settings["model"].strip():
            raise wrong("model", "a folder, a hub id or a name", settings["model"], "all-minilm-l6-v2")
    with checks:
        check_integer("batch_size", settings["batch_size"], 64)
    with checks:
        check_flag("trust_remote_code", settings["trust_remote_code"])
    for name, value in settings.items():
        with checks:
            if name.endswith("_prefix"):
                check_text(name, value, "")
            if name.endswith("_length"):
                check_integer(name, value, None, LEAST_LENGTH, optional=True)
    if settings["device"] is not None:
        checks.found.extend(device_problems(settings["device"]))
    return checks.found


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
