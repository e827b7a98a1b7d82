"""Time of a training step: this toolkit, plain TRL with the same settings, plain TRL as it comes.

    python tests/benchmarks/step.py [--rounds 3] [--steps 6]

Arms run in turn, each in a process of its own (memory settings are the process's), A B C A B C …:
  ours      the quickstart's settings, Scorer with BM25, transcript, logs; held-out evaluation left out
  same      plain GRPOTrainer, the same settings, model and memory settings, a constant reward
  plain     plain GRPOTrainer as it comes on a CPU: LoRA on all layers, gradient checkpointing, one batch of as many
Prints the median step of each, the ratios, and where the time of `ours` goes. The first step of a process is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ARMS = ("ours", "same", "plain")
PARTS = {"generation": "_generate_single_turn", "reward": "_calculate_rewards", "loss": "_compute_loss"}


def constant(completions: list, **_: object) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]  # some variance, so that the loss is not all zeros


def run_arm(arm: str, steps: int) -> dict[str, list[float]]:
    """Wall seconds of ``steps`` steps, and of their parts, in this process."""
    import dataclasses

    from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback
    from trl import GRPOTrainer

    from rec_r1 import config, console, models, tasks
    from rec_r1.callbacks import Log, StopOnSignal
    from rec_r1.environment import open_environment
    from rec_r1.options import grpo_config, lora_config

    console.setup()
    out = tempfile.mkdtemp()
    recipe = config.load("quickstart", [f"output_dir={out}", f"grpo.max_steps={steps + 1}", "grpo.save_strategy='no'"])
    if arm == "plain":
        batch = recipe.grpo["per_device_train_batch_size"] * recipe.grpo["gradient_accumulation_steps"]
        grpo = recipe.grpo | {"gradient_checkpointing": True, "per_device_train_batch_size": batch}
        lora = {k: v for k, v in (recipe.lora or {}).items() if k != "layers_to_transform"}
        recipe = dataclasses.replace(recipe, grpo=grpo | {"gradient_accumulation_steps": 1}, lora=lora)
    else:
        models.keep_freed_memory()
    source = models.resolve(recipe.model.name)
    env = open_environment(recipe, Path(out) / "rollouts.jsonl")
    split = tasks.keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    if arm == "plain":
        policy = AutoModelForCausalLM.from_pretrained(source, dtype=models.fast_dtype())
    else:
        policy = models.load_policy(source, recipe.model)
    times: dict[str, list[float]] = {"step": [], **{part: [] for part in PARTS}}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()
            for part in PARTS:
                times[part].append(0.0)

        def on_log(self, *_: object, **__: object) -> None:  # after the step's own log: our logging counts
            if len(times["step"]) < len(times["loss"]):
                times["step"].append(time.perf_counter() - self.started)

    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=env.scorer if arm == "ours" else constant,
        args=grpo_config(recipe),
        train_dataset=tasks.to_dataset(split, env.task.catalog, env.format),
        processing_class=models.load_tokenizer(source),
        peft_config=lora_config(recipe),
        callbacks=[Log(Path(out)), StopOnSignal()] if arm == "ours" else [],
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    trainer.add_callback(Clock())
    for part, name in PARTS.items():  # a stopwatch around each, in all arms alike
        setattr(trainer, name, _timed(getattr(trainer, name), times[part]))
    trainer.train()
    return {part: values[1:] for part, values in times.items()}


def _timed(function, times: list[float]):
    def call(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times[-1] += time.perf_counter() - started

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print("RESULT " + json.dumps(run_arm(args.arm, args.steps)))
        return
    collected: dict[str, dict[str, list[float]]] = {arm: {"step": [], **{p: [] for p in PARTS}} for arm in args.arms}
    ratios: dict[str, list[float]] = {f"{arm} / {args.arms[0]}": [] for arm in args.arms[1:]}
    for number in range(args.rounds):
        medians = {}
        for arm in args.arms:
            command = [sys.executable, __file__, "--arm", arm, "--steps", str(args.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            result = json.loads(done.stdout.split("RESULT ")[1])
            medians[arm] = median(result["step"])
            for part, values in result.items():
                collected[arm][part] += values
            print(f"round {number + 1}  {arm:<6} {medians[arm]:6.2f} s a step", flush=True)
        for arm in args.arms[1:]:
            ratios[f"{arm} / {args.arms[0]}"].append(medians[arm] / medians[args.arms[0]])
    print(f"\n{'arm':<7}{'step':>8}" + "".join(f"{part:>13}" for part in PARTS) + f"{'backward etc.':>16}   (median s)")
    for arm in args.arms:
        step = median(collected[arm]["step"])
        parts = [median(collected[arm][part]) for part in PARTS]
        share = f"   reward: {parts[1] / step:.2%} of a step"
        print(f"{arm:<7}{step:8.2f}" + "".join(f"{p:13.3f}" for p in parts) + f"{step - sum(parts):16.2f}" + share)
    for name, values in ratios.items():
        print(f"{name}: {median(values):.3f}   (rounds: {', '.join(f'{v:.3f}' for v in values)})")


if __name__ == "__main__":
    main()
