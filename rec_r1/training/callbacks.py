"""What happens beside training: logs, pictures, held-out evaluation, a clean stop on Ctrl-C; and checkpoints at moments
from which a resumed training is the uninterrupted one."""

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
from rec_r1.evaluation.evaluate import metric_scorer, score_raw
from rec_r1.generation import generate, sampling_of
from rec_r1.generation.rollouts import generating, is_collective
from rec_r1.pages import plots
from rec_r1.scoring import Scorer
from rec_r1.tasks import prompts
from rec_r1.trl_options import steps_a_generation

logger = logging.getLogger(__name__)


class Progress(ProgressCallback):
    """The trainer's bar, with the reward beside it instead of a screenful of metrics every step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix_str(f"reward {logs['reward']:.3f}")


FIRST_DRAWING = 10  # seconds after the start: there are curves by then, and a shorter training is drawn at its end


class Log(TrainerCallback):
    """metrics.jsonl, a row a logged step; reward_curve.png, drawn again while training; and in run.json the last step
    whose checkpoint is complete."""

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
        if time.monotonic() >= self.next_drawing:
            started = time.monotonic()
            plots.draw([self.folder], self.folder / "reward_curve.png")
            # A picture takes a good second on a small machine: at most 1% of the time goes there.
            self.next_drawing = time.monotonic() + 100 * (time.monotonic() - started)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            runs.record(self.folder, saved=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            plots.draw([self.folder], self.folder / "reward_curve.png")


class HeldOut(TrainerCallback):
    """Every `every_steps`: greedy answers on validation, through the same Scorer, beside the raw query.

    Logs `eval/METRIC`, `eval/raw/METRIC` and both on the mismatch slice; saves the policy as `best/` whenever
    the first metric exceeds its previous best. Every process answers its share of the queries.
    """

    def __init__(self, recipe: Recipe, env: Environment) -> None:
        self.recipe = recipe
        self.format = env.format
        self.catalog = env.task.catalog
        limit, split = recipe.evaluation.validation_limit, env.task.validation
        self.split = split if limit is None else split.take(range(min(limit, len(split))))
        self.scorer = metric_scorer(env.scorer, recipe.evaluation.metrics)
        self.raw = score_raw(self.split, self.scorer).components
        self.scorer.training = True  # from now on a broken retriever stops the run with a checkpoint
        self.of_training = env.scorer
        self.folder = Path(recipe.output_dir)
        self.trainer: Any = None  # set once the trainer exists

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
        # TRL files a log under the model's mode: in eval mode it leaves the step's own metrics alone.
        trainer.model.eval()
        due = control.should_log  # any log clears it, and with it the log of the step that has just ended
        trainer.log(logs)
        control.should_log = due
        trainer.model.train()
        if failed:
            logger.warning(
                "the retriever failed for %.0f%% of the held-out queries at step %d: not compared with the best so far",
                100 * failed, step,
            )  # fmt: skip
        elif step > 0:
            self._keep_best(trainer, step, first, logs[f"eval/{first}"])

    def _scores(self, trainer: Any) -> tuple[dict[str, np.ndarray], float]:
        """metric -> (Q,) scores, and the share of queries that the retriever failed for; the same on every process."""
        from accelerate.utils import gather_object

        accelerator = trainer.accelerator
        mine = list(range(accelerator.process_index, len(self.split), accelerator.num_processes))
        part = self.split.take(mine)
        trainer.model.eval()
        with generating(trainer) as model:
            answers = generate(
                model,
                trainer.processing_class,
                prompts(part, self.catalog, self.format),
                sampling_of(self.recipe),
                self.recipe.evaluation.batch_size,
                collective=is_collective(trainer),
            )
        trainer.model.train()
        scored = self.scorer.score_split(answers, part)
        self.of_training.fatal = self.of_training.fatal or self.scorer.fatal  # where StopEarly looks
        gathered = gather_object(
            [
                (i, ({m: float(v[j]) for m, v in scored.components.items()}, bool(scored.failed[j])))
                for j, i in enumerate(mine)
            ]
        )
        by_query = [scores for _, scores in sorted(gathered, key=lambda pair: pair[0])]
        scores = {m: np.array([values[m] for values, _ in by_query], np.float32) for m in self.raw}
        return scores, sum(failed for _, failed in by_query) / len(by_query)

    def _keep_best(self, trainer: Any, step: int, metric: str, value: float) -> None:
        there = (self.folder / "best.json").is_file()
        best = runs.best_record(self.folder)["value"] if there else -math.inf
        trainer.accelerator.wait_for_everyone()  # every process has read the record before the first rewrites it
        if value <= best:
            return
        temporary = self.folder / ".best.tmp"
        trainer.save_model(str(temporary))
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            models.drop_pickles(temporary)
            runs.replace_best(self.folder, temporary, {"step": step, "metric": metric, "value": value})
        trainer.accelerator.wait_for_everyone()


class StopEarly(TrainerCallback):
    """Ends training after the running step, or after the last one that uses its completions, with a checkpoint: on
    Ctrl-C (or SIGTERM; a second one ends it at once), and when the Scorer reports an outage of the retriever."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.stopped = False
        self.outage: str | None = None  # of any process, the same on every one
        self._asked = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        logger.warning("stopping after this step; once more to stop at once")
        for known, handler in self._before.items():
            signal.signal(known, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_process_asked() and state.global_step % steps_a_generation(args) == 0:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _any_process_asked(self) -> bool:
        """Processes have their reasons at different moments: they stop after the same step, and say the same, or they
        would hang."""
        from accelerate.utils import gather_object

        reasons = gather_object([(self._asked, self.scorer.outage)])
        self.outage = next((outage for _, outage in reasons if outage is not None), None)
        return self.outage is not None or any(asked for asked, _ in reasons)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Between(TrainerCallback):
    """Puts a checkpoint that is due inside a generation off to its end, and logs before each one: what the trainer has
    gathered since its last log is in no checkpoint."""

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
        control.should_log = control.should_log or control.should_save  # save_strategy=epoch; no generation is open
