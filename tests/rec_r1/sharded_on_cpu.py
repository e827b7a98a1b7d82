"""Trains as often as it is told to, with the weights sharded by FSDP2 or ZeRO-3 over processes without a GPU.

accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 --mixed_precision no \
    tests/rec_r1/sharded_on_cpu.py '[["quickstart", "output_dir=FOLDER"], ["quickstart", "output_dir=OTHER"]]'

accelerate shards only what is on GPUs. On CPUs it drops the launch's FSDP and DeepSpeed options without a word, and
every process trains a whole model. Here it is told that the processes have GPUs. Tensors stay on the CPU, and gloo
connects the processes.
"""

import json
import os
import sys
import zlib

import numpy as np
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from rec_r1 import train


def written(outcome) -> np.ndarray:
    """A metric that says what a completion is: equal means over queries are, in practice, equal completions."""
    return np.array([zlib.crc32(text.encode()) / 2**32 for text in outcome.completions], np.float32)


def shard_on_cpus() -> None:
    """Let accelerate shard as the configuration of the launch says."""
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero:
        import deepspeed.ops
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False  # It is compiled for minutes; gloo suffices.
    made = AcceleratorState.__init__

    def as_on_gpus(self, *args, **options) -> None:
        known = PartialState._shared_state
        if known.get("distributed_type") == DistributedType.MULTI_CPU:
            known["distributed_type"] = DistributedType.DEEPSPEED if zero else DistributedType.MULTI_GPU
        made(self, *args, **options)

    AcceleratorState.__init__ = as_on_gpus


if __name__ == "__main__":
    shard_on_cpus()
    for arguments in json.loads(sys.argv[1]):
        assert train.main(arguments) == 0
        # Another training, or an evaluation in the same process, must find what a user's script would find.
        sharded = AcceleratorState().distributed_type
        assert sharded in (DistributedType.FSDP, DistributedType.DEEPSPEED), sharded
