"""What the fits of all models share: sentence-transformers' trainer, its checkpoints, and the best epoch."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.text.tuning.job_folder import Job

logger = logging.getLogger(__name__)
STEPS_BETWEEN_CHECKPOINTS = 50
WEIGHTS = "weights.safetensors"  # The model in a checkpoint.


class Subject(NamedTuple):
    """A model that is to be tuned.

    model: the model of sentence-transformers, before it is tuned.
    save: writes what the fit changes into a folder.
    measure: the metric of the model on validation; None without a validation split.
    trainer: the trainer with a callback.
    tuned: the folder that ``save`` wrote for the best epoch, or None = the model as it was -> the model to keep.
    """

    model: Any
    save: Callable[[Path], None]
    measure: Callable[[Any], float | None]
    trainer: Callable[[Any], Any]
    tuned: Callable[[Path | None], Any]


class Progress:
    """The metric of each epoch, and which epoch is the best so far, in progress.json; `best` holds its model.

    Epoch 0 is the model before it is tuned. Without a validation split no epoch has a metric, and the last is best.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.best_folder = folder / "progress.json", folder / "best"
        found: dict[str, Any] = {"metrics": [], "best": 0}
        if self.file.is_file():
            found = json.loads(self.file.read_text(encoding="utf-8"))
        self.metrics: list[float | None] = found["metrics"]
        self.best: int = found["best"]

    def add(self, epoch: int, metric: float | None, save: Callable[[Path], None]) -> None:
        """Add the metric of an epoch, and store its model if it is the best. A repeated epoch counts anew."""
        self.metrics = [*self.metrics[:epoch], metric]
        self.best = min(self.best, epoch)
        previous = self.metrics[self.best]
        if epoch == 0 or self.best == epoch or metric is None or (previous is not None and metric > previous):
            self.best = epoch
            if epoch:
                replace_folder(self.best_folder, save)
        write_json(self.file, {"metrics": self.metrics, "best": self.best})


def trainer_of(kind: type, *, model: Any, arguments: Any, dataset: Any, loss: Any, callback: Any) -> Any:
    """A trainer of the class ``kind``, which goes once through the dataset.

    Its checkpoints hold the weights as they are. Those of the library would be loaded as another model, which peft and
    transformers refuse for adapters in some of their releases.
    """
    from safetensors.torch import load_model, save_model
    from transformers.trainer_callback import PrinterCallback

    class Trainer(kind):  # type: ignore[misc,valid-type]
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(Path(output_dir) / WEIGHTS))

        def add_model_card_callback(self, default_args_dict: Any) -> None:
            """No model card is written, whose examples would be read from the dataset."""

        def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
            load_model(self.model, str(Path(checkpoint_path) / WEIGHTS))

    trainer = Trainer(model, arguments, train_dataset=dataset, loss=loss, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


def arguments_of(job: Job, model: Any, size: int) -> dict[str, Any]:
    """The arguments of every trainer. size: the number of rows of the dataset in a step."""
    tuned = job.tuned
    return {
        "output_dir": str(job.folder / "checkpoints"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": size,
        "learning_rate": tuned["learning_rate"],
        "warmup_steps": tuned["warmup"],
        "seed": tuned["seed"],
        "batch_sampler": in_order,
        "save_strategy": "steps",
        "save_steps": min(job.steps, STEPS_BETWEEN_CHECKPOINTS),
        "save_total_limit": 2,
        "logging_strategy": "steps",
        "logging_steps": job.steps,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": model.device.type == "cpu",
        "dataloader_pin_memory": model.device.type != "cpu",
    }


def pairs_in_order(job: Job) -> np.ndarray:
    """The numbers of the pairs that the trainer goes through: (epochs * steps * batch size,) int64. The last pairs of
    an epoch that do not fill a step are left out."""
    epochs = np.arange(int(job.tuned["epochs"]))[:, None] * job.epoch_size
    kept: np.ndarray = (epochs + np.arange(job.steps * job.batch_size)).ravel()
    return kept


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """The batches of a dataset in its own order."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def epochs_of(
    job: Job, progress: Progress, measure: Callable[[Any], float | None], save: Callable[[Path], None]
) -> Any:
    """The callback that shows the progress, and measures and stores the model after each epoch.

    measure: the metric of the model on validation; None without a validation split.
    save: writes the model into a folder.
    """
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Epochs(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="tuning", unit="step", leave=False)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.bar.update()
            if state.global_step % job.steps == 0:
                epoch = state.global_step // job.steps
                metric = measure(model)
                progress.add(epoch, metric, save)
                shown = "no validation split" if metric is None else f"validation ndcg@10 {metric:.4f}"
                logger.info("epoch %d of %d: %s", epoch, job.tuned["epochs"], shown)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            if not np.isfinite(logs["loss"]):
                raise ValueError(
                    f"retriever.params.tuned.learning_rate: the loss is {logs['loss']} after {state.global_step} "
                    f"steps: lower it, {job.tuned['learning_rate']:g} is too high"
                )
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Epochs()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint from which the trainer can continue. Its trainer_state.json is written last."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            if state["global_step"] == int(path.name.rpartition("-")[2]):
                return path
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Replace ``folder`` by one that ``save`` writes."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def write_json(file: Path, value: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)
