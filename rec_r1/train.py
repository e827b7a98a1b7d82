"""Train a policy with GRPO on a recipe. The functions `train` and `_train` show all steps, from top to bottom.

accelerate launch -m rec_r1.train recipes/quickstart.yaml grpo.learning_rate=1.0e-4
rec-r1 train recipes/quickstart.yaml --resume
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rec_r1 import config, console, models, runs
from rec_r1.checks.policy_check import check_policy, check_server_of
from rec_r1.checks.validate import check_data, check_recipe, warnings
from rec_r1.config import Recipe
from rec_r1.environment import open_environment
from rec_r1.generation import write_as_evaluated
from rec_r1.generation.vllm_engine import blaming_vllm
from rec_r1.runs import machines, processes, rollouts
from rec_r1.tasks import to_dataset
from rec_r1.training import seeds
from rec_r1.training.closing import close
from rec_r1.trl_options import check_vllm, refusals, steps_a_generation
from retrievers import RetrieverError
from retrievers.core.index_folder import naming

logger = logging.getLogger("rec_r1.train")


def parser(add_help: bool = True) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="rec-r1 train", add_help=add_help, description="Train a policy with GRPO on a retrieval metric.",
        epilog="example: rec-r1 train recipes/quickstart.yaml output_dir=runs/try grpo.max_steps=10",
    )  # fmt: skip
    p.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="change a setting: grpo.beta=0.001")
    p.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    p.add_argument("--seeds", type=int, help="train so many seeds, one run each, and compare over all of them")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    console.setup()

    def run() -> int:
        recipe = config.load(args.recipe, args.overrides)
        several = args.seeds is not None
        with processes.naming_lost_connection(lambda: machines.to_resume(Path(recipe.output_dir))):
            return seeds.train_all(recipe, args.seeds, args.resume, train) if several else train(recipe, args.resume)

    return console.guard(run, "run it again; --resume continues a run that has begun")


def train(recipe: Recipe, resume: bool = False) -> int:
    """Train a recipe, or continue the run in its output_dir with ``resume``, and evaluate the policy on test.

    Returns 0, or 130 where a signal stopped the run with a checkpoint. Raises UserError and RetrieverError.
    """
    models.keep_freed_memory()
    args = check_recipe(recipe)  # This starts the process group, where there is one.
    check_vllm(args)
    if args.local_process_index > 0:
        logging.getLogger("rec_r1").setLevel(logging.ERROR)
    with machines.alone_in(Path(recipe.output_dir)):
        return _train(recipe, resume, args)


def _train(recipe: Recipe, resume: bool, args: Any) -> int:
    """Train in a folder in which no other training is, see `train`. ``args``: the recipe's `trl.GRPOConfig`."""
    from transformers import set_seed

    from rec_r1.training.callbacks import Between, Copies, HeldOut, ImportanceRatio, Log, StopEarly
    from rec_r1.training.trainer import Trainer
    from rec_r1.training.warm_start import first_policy

    folder = Path(recipe.output_dir)
    machines.prepare(recipe, resume)
    env = open_environment(recipe, rollouts.file_of(folder, args.process_index), trains=True)
    train_split, steps = check_data(recipe, env, args)
    dataset = to_dataset(train_split, env.task.catalog, env.format)
    period = steps_a_generation(args)
    reached, checkpoint = processes.on_main_process(lambda: runs.last_state(recipe, period, steps.total, resume))
    source = processes.first_on_each_machine(lambda: models.resolve(recipe.model.name), "download the model")
    data = runs.fingerprint(dataset, env.task.validation)
    info = machines.equal_on_all(runs.describe(recipe, args, source, env.retriever.fingerprint, data))
    if reached >= steps.total:
        machines.begin(recipe, reached, info, resume)
        logger.info("--resume: all %d steps of %s are trained already, so nothing is trained", steps.total, folder)
        return close(folder, env, reached) if args.process_index == 0 else 0

    checked = check_policy(recipe, env, args, steps, source)
    processes.on_main_process(lambda: check_server_of(recipe, args, checked, wait=True))
    policy, lora = first_policy(recipe, env, source)
    set_seed(recipe.seed)
    write_as_evaluated(policy, checked.tokenizer, recipe)
    held_out, stop = HeldOut(recipe, env), StopEarly(env.scorer)
    processes.wait("load the model")
    with refusals(args):
        trainer = Trainer(
            recipe, env.scorer, model=policy, args=args, train_dataset=dataset, processing_class=checked.tokenizer,
            peft_config=lora, callbacks=[held_out, Copies(folder), Log(folder), ImportanceRatio(), stop, Between()],
        )  # fmt: skip
    held_out.trainer = trainer
    machines.begin(recipe, reached, info, resume)
    for line in (*warnings(recipe, args, steps), *checked.warnings):
        logger.warning("%s", line)
    logger.info(
        "training %s (%s, %s) with %s on %s: %d of %d training queries, %d steps of %d completions, into %s",
        recipe.model.name, str(policy.dtype).removeprefix("torch."), info["device"], recipe.retriever.kind,
        env.task.name, len(train_split), len(env.task.train), steps.total, args.generation_batch_size, folder,
    )  # fmt: skip
    started = time.monotonic()
    with naming(folder), blaming_vllm(args):
        trainer.train(resume_from_checkpoint=str(folder / checkpoint.name) if checkpoint else None)
    seconds, peak = time.monotonic() - started, models.peak_memory()
    logger.info("step %d after %.0f s, peak memory %.1f GiB", trainer.state.global_step, seconds, peak)
    if stop.stopped and stop.outage:
        fix = "restart the retriever, then continue with --resume"
        raise RetrieverError(f"{stop.outage}: the run stopped with a checkpoint: {fix}")
    if stop.stopped:
        logger.info("the run stopped with a checkpoint in %s: continue it with --resume", folder)
        return 130
    if args.process_index == 0:
        held_out.trainer = None
        del trainer, policy  # The closing evaluation loads the saved policy, as a user will.
        return close(folder, env, steps.total)  # The other processes have ended: no collective call is possible now.
    return 0


console.make_callable(__name__, train)  # `rec_r1.train` is this module, for `accelerate launch -m`, and the function.

if __name__ == "__main__":
    sys.exit(main())
