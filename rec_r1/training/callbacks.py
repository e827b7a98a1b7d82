"""Callbacks of the trainer: logs, reward curves, validation, a clean stop on Ctrl-C, and the moments of checkpoints.

Checkpoints are saved only at moments from which a resumed training gives the same result as an uninterrupted one.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ProgressCallback, TrainerCallback

from rec_r1 import models, runs
from rec_r1.config import Recipe
from rec_r1.environment import Environment
from rec_r1.evaluation.compare import slices
from rec_r1.evaluation.evaluate import metric_scorer, score_raw, validation_split
from rec_r1.generation import importance_ratio, sampling_of
from rec_r1.generation.rollouts import generate_held_out
from rec_r1.pages import plots
from rec_r1.runs import machines, processes
from rec_r1.scoring import Scorer
from rec_r1.tasks import prompts
from rec_r1.trl_options import steps_a_generation

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):
    """Shows the reward beside the trainer's progress bar, instead of all metrics at every step.

    TRL logs None as the reward of a step in which the retriever failed for all completions.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "reward" in logs:
            reward = logs["reward"]
            self.training_bar.set_postfix_str("no reward" if reward is None else f"reward {reward:.3f}")


FIRST_DRAWING = 10  # seconds after the start: there are curves by then, and a shorter training is drawn at its end


class Log(TrainerCallback):
    """Writes metrics.jsonl, reward_curve.png and the last saved step in run.json.

    metrics.jsonl gets one row per logged step. The curve is drawn again and again during the training. run.json names
    the last step whose checkpoint is complete.

    folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.next_drawing = time.monotonic() + FIRST_DRAWING

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, "time": round(time.time(), 2)}
        row |= {k: v for k, v in logs.items() if not (isinstance(v, float) and math.isnan(v))}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        ends = "train_runtime" in logs  # The row with which a training ends; on_train_end draws right after it.
        if time.monotonic() >= self.next_drawing and not ends:
            started = time.monotonic()
            plots.draw([self.folder], self.folder / "reward_curve.png")
            # Drawing takes more than a second on a small machine. It may take at most 1% of the time.
            self.next_drawing = time.monotonic() + 100 * (time.monotonic() - started)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            runs.record(self.folder, saved=state.global_step)
            runs.restore_best(self.folder)  # A replaced policy that only a removed checkpoint needed is removed.

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            plots.draw([self.folder], self.folder / "reward_curve.png")


class ImportanceRatio(TrainerCallback):
    """Warns where the importance ratio of vLLM's completions is far from 1.

    It warns once, as soon as `importance_ratio.WIDTH` values are logged whose mean is far from 1, or at the end of a
    shorter training.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and importance_ratio.MEAN in logs:
            self.values.append(logs[importance_ratio.MEAN])
            if len(self.values) >= importance_ratio.WIDTH:
                self._judge()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._judge()

    def _judge(self) -> None:
        problem = None if self.warned else importance_ratio.far_from_one(self.values)
        if problem is not None:
            self.warned = True
            logger.warning("%s", problem)


class Copies(TrainerCallback):
    """Completes each checkpoint on every machine, where each has an output folder of its own.

    It comes before `Log`, which records that the checkpoint is complete.

    folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if machines.are_separate(self.folder):
            machines.copy_checkpoint(self.folder, state.global_step)


class HeldOut(TrainerCallback):
    """Evaluates the policy on the validation split every `evaluation.every_steps` steps, and keeps the best one.

    The policy's greedy completions and the raw queries are scored by the same Scorer. The callback logs `eval/METRIC`
    and `eval/raw/METRIC`, over all queries and over the mismatch slice. It saves the policy as `best/` whenever the
    first metric exceeds its previous best. Each process generates completions for a share of the queries.

    recipe: the recipe.
    env: its task, format and Scorer.

    Set ``trainer`` before the training begins.
    """

    def __init__(self, recipe: Recipe, env: Environment) -> None:
        self.recipe = recipe
        self.format = env.format
        self.catalog = env.task.catalog
        self.split = validation_split(recipe, env)
        self.scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
        self.raw = score_raw(self.split, self.scorer).components
        self.scorer.training = True  # From now on, a broken retriever stops the run with a checkpoint.
        self.training_scorer = env.scorer
        self.folder = Path(recipe.output_dir)
        self.trainer: Any = None  # Set when the trainer exists.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._evaluate(0, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.recipe.evaluation.every_steps
        if state.global_step >= state.max_steps or (every and state.global_step % every == 0):
            self._evaluate(state.global_step, control)

    def _evaluate(self, step: int, control: Any) -> None:
        trainer = self.trainer
        assert trainer is not None
        started = time.monotonic()
        scores, failed = self._scores(trainer)
        logs: dict[str, float] = {"retrieval/held_out_error_rate": failed}
        first = self.scorer.rewards.names[0]
        for name, chosen in slices(self.raw[first], self.recipe.evaluation.mismatch_below).items():
            suffix = "" if name == "all" else f"/{name}"
            for metric, values in scores.items():
                if not np.isnan(values[chosen]).all():
                    logs[f"eval{suffix}/{metric}"] = float(np.nanmean(values[chosen]))
                    logs[f"eval{suffix}/raw/{metric}"] = float(np.nanmean(self.raw[metric][chosen]))
        logs["eval/seconds"] = time.monotonic() - started
        # TRL keeps separate metrics for the modes train and eval. A log in eval mode does not touch those of the step.
        trainer.model.eval()
        due = control.should_log  # Every log resets it, but the step that has just ended must still be logged.
        trainer.log(logs)
        control.should_log = due
        trainer.model.train()
        if failed:
            logger.warning(
                "the retriever failed for %.0f%% of the held-out queries at step %d, so this step cannot be the best",
                100 * failed, step,
            )  # fmt: skip
        elif step > 0:
            self._keep_best(trainer, step, first, logs[f"eval/{first}"])

    def _scores(self, trainer: Any) -> tuple[dict[str, np.ndarray], float]:
        """Each metric's (Q,) scores, and the share of queries that the retriever failed for, equal on all processes."""
        from accelerate.utils import gather_object

        accelerator = trainer.accelerator
        places = list(range(accelerator.process_index, len(self.split), accelerator.num_processes))
        # All processes must ask equally many queries, see `generate_held_out`. A process that has one query fewer than
        # others also asks the first one, and drops its completion.
        most = -(-len(self.split) // accelerator.num_processes)
        asked = [*places, 0][:most]
        trainer.model.eval()
        questions = prompts(self.split.take(asked), self.catalog, self.format)
        completions = generate_held_out(trainer, questions, sampling_of(self.recipe), self.recipe.evaluation.batch_size)
        trainer.model.train()
        scored = self.scorer.score_split(completions[: len(places)], self.split.take(places))
        self.training_scorer.fatal = self.training_scorer.fatal or self.scorer.fatal  # StopEarly reads it there.
        gathered = gather_object(
            [
                (i, ({m: float(v[j]) for m, v in scored.components.items()}, bool(scored.failed[j])))
                for j, i in enumerate(places)
            ]
        )
        by_query = [scores for _, scores in sorted(gathered, key=lambda pair: pair[0])]
        scores = {m: np.array([values[m] for values, _ in by_query], np.float32) for m in self.raw}
        return scores, sum(failed for _, failed in by_query) / len(by_query)

    def _keep_best(self, trainer: Any, step: int, metric: str, value: float) -> None:
        # The main process decides, because the folder of another machine may have no best.json.
        if not processes.on_main_process(lambda: value > self._best_value()):
            return
        temporary = self.folder / ".best.tmp"
        trainer.save_model(str(temporary))
        trainer.accelerator.wait_for_everyone()

        def replace() -> None:
            models.drop_pickles(temporary)
            runs.replace_best(self.folder, temporary, {"step": step, "metric": metric, "value": value})

        processes.on_main_process(replace)

    def _best_value(self) -> float:
        exists = (self.folder / "best.json").is_file()
        return float(runs.best_record(self.folder)["value"]) if exists else -math.inf


class StopEarly(TrainerCallback):
    """Stops the training with a checkpoint after Ctrl-C, after SIGTERM, or when the Scorer reports an outage.

    The training stops after the last step that uses the current completions. A second signal stops it at once.

    scorer: the Scorer of the training.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.stopped = False
        self.outage: str | None = None  # The outage that some process reports, equal on all processes.
        self._signalled = False
        self._old_handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old_handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signalled = True
        logger.warning("the training stops after this step: press Ctrl-C again to stop it at once")
        for known, handler in self._old_handlers.items():
            signal.signal(known, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_process_stops() and state.global_step % steps_a_generation(args) == 0:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _any_process_stops(self) -> bool:
        """Whether some process has a reason to stop. All must stop after the same step, or they would hang."""
        from accelerate.utils import gather_object

        reasons = gather_object([(self._signalled, self.scorer.outage)])
        self.outage = next((outage for _, outage in reasons if outage is not None), None)
        return self.outage is not None or any(signalled for signalled, _ in reasons)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)


class Between(TrainerCallback):
    """Saves checkpoints only between two generations, and logs before each of them.

    A generation is the completions that one or several steps use. They are in no checkpoint, so a checkpoint that is
    due while they are in use is saved after their last step. The metrics that the trainer has collected since its last
    log are in no checkpoint either, so they are logged first.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.due = self.due or control.should_save
        now = control.should_training_stop or state.global_step % steps_a_generation(args) == 0
        control.should_save = self.due and now
        if control.should_save:
            self.due = False
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = control.should_log or control.should_save  # For save_strategy=epoch.
