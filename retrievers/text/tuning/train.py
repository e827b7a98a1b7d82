"""Tune an encoder, in a process of its own: `python -m retrievers.text.tuning.train FOLDER`.

FOLDER is made by `job.py`. The process writes into it:

- checkpoints/: the checkpoints of sentence-transformers' trainer, from which an interrupted fit continues;
- best/ and progress.json: the encoder of the best epoch so far, and the metric of each epoch;
- encoder/ and report.json: the result. report.json is written last.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.encoders import sentence
from retrievers.text.tuning.job_folder import ERROR, Job
from retrievers.text.tuning.loss import Objective, as_module, correction_of
from retrievers.text.tuning.measure import measure
from retrievers.types import ToolkitError

logger = logging.getLogger("retrievers.text.tuning.train")  # As a process, this module is __main__.
STEPS_BETWEEN_CHECKPOINTS = 50
WEIGHTS = "weights.safetensors"  # The encoder in a checkpoint.
OUT_OF_MEMORY = "retriever.params.tuned: the memory is too small: lower batch_size, or set mini_batch"


class Progress:
    """The metric of each epoch, and which epoch is the best so far, in progress.json; `best` holds its encoder.

    Epoch 0 is the encoder before it is tuned. Without a validation split no epoch has a metric, and the last is best.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.best_folder = folder / "progress.json", folder / "best"
        found: dict[str, Any] = {"metrics": [], "best": 0}
        if self.file.is_file():
            found = json.loads(self.file.read_text(encoding="utf-8"))
        self.metrics: list[float | None] = found["metrics"]
        self.best: int = found["best"]

    def add(self, epoch: int, metric: float | None, save: Callable[[Path], None]) -> None:
        """Add the metric of an epoch, and store its encoder if it is the best. A repeated epoch counts anew."""
        self.metrics = [*self.metrics[:epoch], metric]
        self.best = min(self.best, epoch)
        previous = self.metrics[self.best]
        if epoch == 0 or self.best == epoch or metric is None or (previous is not None and metric > previous):
            self.best = epoch
            if epoch:
                _replace(self.best_folder, save)
        _write(self.file, {"metrics": self.metrics, "best": self.best})


def run(folder: Path) -> None:
    """Tune the encoder of a folder, or continue where an interrupted process stopped.

    Raises RetrieverError and ValueError for what a user can fix.
    """
    from filelock import FileLock

    with FileLock(folder / "lock"):  # A process whose starter was killed may still run.
        if (folder / "report.json").is_file():
            return
        job = Job(folder)
        model, save = _load(job)
        progress = Progress(folder)
        if not progress.metrics:
            progress.add(0, measure(job, model), save)
        trainer = _trainer(job, model, _epochs(job, progress, save))
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is not None:
            logger.info("continuing the fit from %s", checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _finish(job, progress)


def _load(job: Job) -> tuple[Any, Callable[[Path], None]]:
    """The encoder before it is tuned, and a function that saves it. With LoRA it has new adapters, and only these are
    trained and saved."""
    from transformers import set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Otherwise transformers shows a bar over the files that it writes.
    model = _base(job)
    if job.tuned["lora"] is None:
        return model, lambda folder: model.save_pretrained(str(folder), create_model_card=False)
    from peft import LoraConfig, get_peft_model

    if model.transformers_model is None:
        raise ValueError("retriever.params.tuned.lora: this encoder is no Transformer: leave lora out")
    set_seed(job.tuned["seed"])  # LoRA's weights are drawn at random.
    try:
        # The layers of the encoder are replaced in place.
        adapted = get_peft_model(model.transformers_model, LoraConfig(**job.tuned["lora"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"retriever.params.tuned.lora: {_line(error)}: change its options") from error
    return model, lambda folder: adapted.save_pretrained(str(folder))


def _base(job: Job) -> Any:
    given = job.settings["encoder"]
    model = sentence.load(job.settings["model"], given["pooling"], given["device"], given["trust_remote_code"])
    most = job.tuned["max_tokens"]
    longest = model.max_seq_length
    if most is not None and isinstance(longest, int) and longest > most:
        model.max_seq_length = most
    return model


def _trainer(job: Job, model: Any, callback: Any) -> Any:
    """The trainer, which goes once through all epochs' pairs in their order.

    Its checkpoints hold the weights as they are. Those of the library would be loaded as another model, which peft and
    transformers refuse for adapters in some of their releases.
    """
    from datasets import Dataset
    from safetensors.torch import load_model, save_model
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers.trainer_callback import PrinterCallback

    tuned, size, steps = job.tuned, job.batch_size, job.steps
    kept = (np.arange(tuned["epochs"])[:, None] * job.epoch_size + np.arange(steps * size)).ravel()
    dataset = Dataset.from_dict({"pair": kept.tolist()})
    dataset.set_transform(lambda batch: job.columns(batch["pair"]))

    class Trainer(SentenceTransformerTrainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(Path(output_dir) / WEIGHTS))

        def add_model_card_callback(self, default_args_dict: Any) -> None:
            """No model card is written, whose examples would be read from the dataset."""

        def _load_from_checkpoint(self, checkpoint_path: str, model: Any = None) -> None:
            load_model(self.model, str(Path(checkpoint_path) / WEIGHTS))

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(job.folder / "checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=size,
        learning_rate=tuned["learning_rate"],
        warmup_steps=tuned["warmup"],
        seed=tuned["seed"],
        prompts=model.prompts.get(model.default_prompt_name) or None,
        batch_sampler=_in_order,
        save_strategy="steps",
        save_steps=min(steps, STEPS_BETWEEN_CHECKPOINTS),
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type != "cpu",
    )
    frozen = None
    if tuned["keep"]:
        frozen = tuple(np.load(job.folder / f"frozen_{name}.npy", mmap_mode="r") for name in ("queries", "documents"))
    objective = Objective(
        tuned["scale"],
        correction_of(job.arrays["row"], len(job.documents) + len(job.written)) if tuned["log_q"] else None,
        job.arrays["known_offsets"],
        job.arrays["known"],
        tuned["keep"],
        frozen,
    )
    loss = as_module(model, objective, tuned["mini_batch"])
    trainer = Trainer(model, arguments, train_dataset=dataset, loss=loss, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """The batches of a dataset in its own order."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def _epochs(job: Job, progress: Progress, save: Callable[[Path], None]) -> Any:
    """The callback that shows the progress, and measures and stores the encoder after each epoch."""
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
                metric = measure(job, model)
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


def _finish(job: Job, progress: Progress) -> None:
    """Write the encoder of the best epoch, with LoRA's weights merged into it, and the report."""
    model = _base(job)
    if progress.best and job.tuned["lora"] is not None:
        from peft import PeftModel

        PeftModel.from_pretrained(model.transformers_model, str(progress.best_folder)).merge_and_unload()
    elif progress.best:
        given = job.settings["encoder"]
        model = sentence.load(str(progress.best_folder), None, given["device"], given["trust_remote_code"])
    _replace(job.folder / "encoder", lambda folder: model.save_pretrained(str(folder), create_model_card=False))
    before, *after = progress.metrics
    report = {
        "on": job.settings["on"],
        "pairs": job.epoch_size,
        "steps": job.steps,
        "batch": job.batch_size,
        "epochs": progress.best,
        "ran": len(after),
        "before": before,
        "ndcg@10": after,
    }
    _write(job.folder / "report.json", report)


def _replace(folder: Path, save: Callable[[Path], None]) -> None:
    """Replace ``folder`` by one that ``save`` writes."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _write(file: Path, value: Any) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(file)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: Sequence[str]) -> int:
    """Run the job of a folder. Returns 0, or 2 after a mistake that a user can fix, whose message is in error.txt."""
    (name,) = argv
    folder = Path(name)
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name.startswith("retrievers") or record.levelno >= logging.WARNING)
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(message)s")
    (folder / ERROR).unlink(missing_ok=True)
    try:
        run(folder)
    except KeyboardInterrupt:
        return 130
    except (ToolkitError, ValueError, OSError) as error:
        message = _line(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        message = f"{OUT_OF_MEMORY} ({_line(error)})"
    else:
        return 0
    (folder / ERROR).write_text(message, encoding="utf-8")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
