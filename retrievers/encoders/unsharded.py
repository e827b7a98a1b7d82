"""Load a model whole in every process, even while a training shards its policy. For models other than the policy."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_ZERO = "transformers.integrations.deepspeed"  # The module that knows whether ZeRO-3 is on.
_FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # The option of accelerate under which transformers leaves weights empty.


@contextlib.contextmanager
def unsharded() -> Iterator[None]:
    """Models that are loaded in the body are whole in every process, and no process waits for another.

    A training with DeepSpeed ZeRO-3 or FSDP shards its policy. But transformers decides this for all models of a
    process. While ZeRO-3 is on, every `from_pretrained` keeps only a part of the model in each process, and waits until
    all processes load it. With FSDP, only the first process of a machine initialises the weights that a model's files
    lack. The others leave them empty, because they expect to receive them.

        with unsharded():
            model = SentenceTransformer(folder)

    It may be nested. In a process that shards no model it does nothing.
    """
    deepspeed = sys.modules.get(_ZERO)  # ZeRO-3 is off in a process that has not imported this module.
    # transformers has functions that set and forget the configuration, and none that returns it.
    reference = deepspeed._hf_deepspeed_config_weak_ref if deepspeed is not None else None
    configuration = reference() if reference is not None else None
    before = os.environ.get(_FSDP)
    if deepspeed is not None:
        deepspeed.unset_hf_deepspeed_config()
    if before is not None:
        os.environ[_FSDP] = "false"
    try:
        yield
    finally:
        if deepspeed is not None and configuration is not None:
            deepspeed.set_hf_deepspeed_config(configuration)
        if before is not None:
            os.environ[_FSDP] = before
