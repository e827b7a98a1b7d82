"""Time of a training step of a recipe: without what a step may leave out, with each such lever alone, with all.

    python tests/benchmarks/step.py [--rounds 3] [--steps 4] [--arms plain everything …] [--neighbours 2] [--limit 600]
                                    [--recipe cpu/search] [--set task.path=FOLDER] [--json FILE]

Arms run in turn, each in a process of its own (memory settings are the process's), A B C A B C …:
  plain        plain GRPOTrainer as it comes on a CPU: LoRA on all layers, gradient checkpointing, a constant reward
  old recipe   the recipe of the quickstart before 2026-11-26: the query three times, ndcg@100 alone, twice the learning
               rate, no repetition penalty, `speed` off, in four parts of 24 completions
  nothing      the recipe with `speed` off, in four parts of 24 completions
  ends         … and completions end at their answer
  shares       … and the completions of a prompt share its cache, in rollouts and in the loss
  live         … and rows of advantage 0 stay out of the loss
  one part     … and 96 completions at once
  everything   the recipe as it is
  spinning     the recipe with threads that spin where they wait (OMP_WAIT_POLICY=ACTIVE); beside busy neighbours a step
               takes minutes, so that this arm is only run where it is named
  sleeping     the recipe with threads that sleep where they wait (OMP_WAIT_POLICY=PASSIVE); only run where it is named
  default      the recipe with threads that spin 300,000 times before they sleep, as those of GNU's OpenMP do where
               nothing is set; only run where it is named
Prints for each arm the median step, its parts, the tokens of a completion, the share of live groups, and `bookkeeping`:
the time of the Scorer, the record of prompts, the choice of rows, logs and transcript, beside generation, loss and
backward. `cpu` is the processor time of a step; other work on the machine changes it less than the clock's time.
The first step of a process is warm-up. `--neighbours` starts so many processes that compute without end beside the
arms, and `--limit` stops an arm after so many seconds. `--recipe` and `--set` name another recipe than the quickstart
and changes to it, and `--json` is a file for the medians, which levers.py reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

OFF = ["speed.end_at_answer=false", "speed.share_prompts=false", "speed.live_rows=false"]
PARTS = ["grpo.per_device_train_batch_size=24"]
# `rec-r1 train RECIPE … grpo.max_steps=52 evaluation.every_steps=8 grpo.save_steps=8` trains it as a whole.
OLD_RECIPE = [
    *OFF,
    *PARTS,
    "speed.explore=1",
    "grpo.learning_rate=6e-4",
    "evaluation.repetition_penalty=1",
    "rewards={ndcg@100: 1}",
    "format.repeat=3",
    "format.examples=0",
    'format.prompt="happy: smile, joy, laugh\\nrain: umbrella, cloud, weather\\n{query}:"',
]
ARMS = {
    "plain": [],
    "old recipe": OLD_RECIPE,
    "nothing": [*OFF, *PARTS],
    "ends": [*OFF, *PARTS, "speed.end_at_answer=true"],
    "shares": [*OFF, *PARTS, "speed.share_prompts=true"],
    "live": [*OFF, *PARTS, "speed.live_rows=true"],
    "one part": OFF,
    "everything": [],
    "spinning": [],
    "sleeping": [],
    "default": [],
}
WAITING = {
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    # With a policy set, console.setup sets no count of its own.
    "default": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300000"},
}
COLUMNS = ("step", "cpu", "generation", "loss", "backward", "bookkeeping")
PARTS_OF_STEP = COLUMNS[2:]


def constant(completions: list, **_: object) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]  # some variance, so that the loss is not all zeros


def run_arm(arm: str, steps: int, name: str, changes: list[str]) -> dict[str, Any]:
    """Seconds of ``steps`` steps of a recipe and of their parts, in this process; tokens a completion, live groups."""
    from rec_r1 import console

    console.setup()  # before torch is loaded
    from transformers import TrainerCallback

    times: dict[str, list[float]] = {name: [] for name in COLUMNS}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started, self.cpu = time.perf_counter(), time.process_time()
            for name in PARTS_OF_STEP:
                times[name].append(0.0)

        def on_log(self, *_: object, **__: object) -> None:  # after the step's own log: our logging counts
            if len(times["step"]) < len(times["loss"]):
                times["step"].append(time.perf_counter() - self.started)
                times["cpu"].append(time.process_time() - self.cpu)

    trainer = (plain if arm == "plain" else ours)(name, [*changes, *ARMS[arm]], steps, times)
    trainer.add_callback(Clock())
    trainer.compute_loss = _timed(trainer.compute_loss, times["loss"])
    trainer.accelerator.backward = _timed(trainer.accelerator.backward, times["backward"])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row][1:]
    return {
        **{name: values[1:] for name, values in times.items()},
        "tokens": mean(row["completions/mean_length"] for row in logged),
        "live": 1 - mean(row["frac_reward_zero_std"] for row in logged),
    }


def ours(name: str, overrides: list[str], steps: int, times: dict[str, list[float]]) -> Any:
    """The trainer that `rec_r1.train` makes, without held-out evaluation."""
    from rec_r1 import config, models, tasks
    from rec_r1.environment import open_environment
    from rec_r1.training import live_rows, trainer
    from rec_r1.training.callbacks import Between, Log, StopEarly
    from rec_r1.trl_options import grpo_config, lora_config

    models.keep_freed_memory()
    out = tempfile.mkdtemp()
    more = [f"output_dir={out}", f"grpo.max_steps={steps + 1}", "grpo.save_strategy='no'"]
    recipe = config.load(name, [*more, *overrides])
    source = models.resolve(recipe.model.name)
    env = open_environment(recipe, Path(out) / "rollouts.jsonl")
    split = tasks.keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    log, stop = Log(Path(out)), StopEarly(env.scorer)
    trainer.live_rows = _timed(live_rows.live_rows, times["bookkeeping"])
    made = trainer.Trainer(
        recipe,
        _TimedScorer(env.scorer, times["bookkeeping"]),
        model=models.load_policy(source, recipe.model),
        args=grpo_config(recipe),
        train_dataset=tasks.to_dataset(split, env.task.catalog, env.format),
        processing_class=models.load_tokenizer(source),
        peft_config=lora_config(recipe),
        callbacks=[log, stop, Between()],
    )
    made.rollout_func = _timed(made.rollout_func, times["generation"])
    made.record.on_step_end = _timed(made.record.on_step_end, times["bookkeeping"])
    log.on_log = _timed(log.on_log, times["bookkeeping"])
    return made


class _TimedScorer:
    __name__ = "reward"

    def __init__(self, scorer: Any, times: list[float]) -> None:
        self.call, self.take_earned = _timed(scorer.__call__, times), scorer.take_earned

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)


def plain(name: str, overrides: list[str], steps: int, times: dict[str, list[float]]) -> Any:
    from transformers import AutoModelForCausalLM
    from trl import GRPOTrainer

    from rec_r1 import config, models, tasks
    from rec_r1.environment import open_environment
    from rec_r1.trl_options import grpo_config, lora_config

    more = [f"output_dir={tempfile.mkdtemp()}", f"grpo.max_steps={steps + 1}", "grpo.save_strategy='no'"]
    recipe = config.load(name, [*more, *overrides, "grpo.gradient_checkpointing=true"])
    lora = {key: value for key, value in (recipe.lora or {}).items() if key != "layers_to_transform"}
    recipe = dataclasses.replace(recipe, lora=lora)
    source = models.resolve(recipe.model.name)
    env = open_environment(recipe)
    split = tasks.keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    made = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype=models.fast_dtype()),
        reward_funcs=constant,
        args=grpo_config(recipe),
        train_dataset=tasks.to_dataset(split, env.task.catalog, env.format),
        processing_class=models.load_tokenizer(source),
        peft_config=lora_config(recipe),
    )
    made._generate_single_turn = _timed(made._generate_single_turn, times["generation"])
    return made


def _timed(function: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            if times:
                times[-1] += time.perf_counter() - started

    return call


def run_rounds(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The results of each arm, one per round, without the arms that did not end within the limit."""
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    for number in range(args.rounds):
        for arm in list(rounds):
            command = [sys.executable, __file__, "--arm", arm, "--steps", str(args.steps)]
            command += ["--recipe", args.recipe, *(word for change in args.set for word in ("--set", change))]
            env = os.environ | WAITING.get(arm, {})
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, env=env, timeout=args.limit
                )
            except subprocess.TimeoutExpired:
                print(
                    f"round {number + 1}  {arm:<10} {args.steps + 1} steps had not ended after {args.limit:g} s",
                    flush=True,
                )
                del rounds[arm]
                continue
            rounds[arm].append(json.loads(done.stdout.split("RESULT ")[1]))
            print(f"round {number + 1}  {arm:<10} {median(rounds[arm][-1]['step']):6.2f} s a step", flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if arm not in WAITING])
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print("RESULT " + json.dumps(run_arm(args.arm, args.steps, args.recipe, args.set)))
        return
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.neighbours)]
    try:
        rounds = run_rounds(args)
    finally:
        for process in busy:
            process.kill()
    if not rounds:
        return
    print(f"\n{'median s':<11}" + "".join(f"{name:>12}" for name in (*COLUMNS, "tokens", "live groups")))
    for arm, found in rounds.items():
        parts = [median(value for one in found for value in one[name]) for name in COLUMNS]
        rest = f"{mean(one['tokens'] for one in found):12.1f}{mean(one['live'] for one in found):12.2f}"
        print(f"{arm:<11}" + "".join(f"{value:12.3f}" for value in parts) + rest)
    if args.json:
        medians = {arm: median(value for one in found for value in one["step"]) for arm, found in rounds.items()}
        args.json.write_text(json.dumps(medians))
    *others, last = rounds
    for arm in others:
        for name in ("step", "cpu"):
            pairs = zip(rounds[arm], rounds[last], strict=True)
            ratios = [median(one[name]) / median(other[name]) for one, other in pairs]
            shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{arm} / {last}, {name}: {median(ratios):.2f}   (rounds: {shown})")


if __name__ == "__main__":
    main()
