"""Tune a model, in a process of its own: `python -m retrievers.text.tuning.train FOLDER`.

FOLDER is made by `job.py` or `cross_job.py`. The process writes into it:

- checkpoints/: the checkpoints of sentence-transformers' trainer, from which an interrupted fit continues;
- best/ and progress.json: the model of the best epoch so far, and the metric of each epoch;
- encoder/ and report.json: the result. report.json is written last.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from retrievers.encoders.files import write_tuned_on
from retrievers.text.tuning import cross_fit, encoder_fit
from retrievers.text.tuning.job_folder import ENCODER, ERROR, Job
from retrievers.text.tuning.trainer import Progress, Subject, epochs_of, last_checkpoint, replace_folder, write_json
from retrievers.types import ToolkitError

logger = logging.getLogger("retrievers.text.tuning.train")  # As a process, this module is __main__.
OUT_OF_MEMORY = "retriever.params.tuned: the memory is too small: lower batch_size, or set mini_batch of an encoder"


def run(folder: Path) -> None:
    """Tune the model of a folder, or continue where an interrupted process stopped.

    Raises RetrieverError and ValueError for what a user can fix.
    """
    from filelock import FileLock

    with FileLock(folder / "lock"):  # A process whose starter was killed may still run.
        if (folder / "report.json").is_file():
            return
        job = Job(folder)
        subject = _subject(job)
        progress = Progress(folder)
        if not progress.metrics:
            progress.add(0, subject.measure(subject.model), subject.save)
        trainer = subject.trainer(epochs_of(job, progress, subject.measure, subject.save))
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint is not None:
            logger.info("continuing the fit from %s", checkpoint)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _finish(job, progress, subject)


def _subject(job: Job) -> Subject:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # Otherwise transformers shows a bar over the files that it writes.
    return (encoder_fit if job.settings["kind"] == "encoder" else cross_fit).subject(job)


def _finish(job: Job, progress: Progress, subject: Subject) -> None:
    """Write the model of the best epoch and the report."""
    model = subject.tuned(progress.best_folder if progress.best else None)

    def save(folder: Path) -> None:
        model.save_pretrained(str(folder), create_model_card=False)
        write_tuned_on(folder, job.settings["tuned_on"], job.settings["identity"])

    replace_folder(job.folder / ENCODER, save)
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
    write_json(job.folder / "report.json", report)


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
