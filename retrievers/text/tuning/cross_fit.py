"""The fit of a cross-encoder by sentence-transformers' trainer, with the binary cross-entropy of pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.encoders import cross
from retrievers.text.tuning.job_folder import Job
from retrievers.text.tuning.measure import ndcg, some
from retrievers.text.tuning.trainer import Subject, arguments_of, pairs_in_order, trainer_of

MAX_VALIDATION_QUERIES = 300  # At most this many validation queries are reranked after an epoch.


def subject(job: Job) -> Subject:
    """The cross-encoder of a job."""
    model = _load(job, Path(job.settings["model"]))
    return Subject(
        model,
        lambda folder: model.save_pretrained(str(folder), create_model_card=False),
        lambda one: measure(job, one),
        lambda callback: _trainer(job, model, callback),
        lambda best: _load(job, best or Path(job.settings["model"])),
    )


def _load(job: Job, folder: Path) -> Any:
    given = job.settings["encoder"]
    return cross.load(str(folder), given["max_length"], given["device"], given["trust_remote_code"])


def _trainer(job: Job, model: Any, callback: Any) -> Any:
    """The trainer, which goes once through all epochs' pairs in their order, each with its negatives."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    each = 1 + job.arrays["negatives"].shape[1]
    places = (pairs_in_order(job)[:, None] * each + np.arange(each)).ravel()
    dataset = Dataset.from_dict({"place": places.tolist()})
    dataset.set_transform(lambda batch: columns(job, batch["place"]))
    prompts = model.prompts.get(model.default_prompt_name) or None
    arguments = CrossEncoderTrainingArguments(**arguments_of(job, model, job.batch_size * each), prompts=prompts)
    loss = BinaryCrossEntropyLoss(model)
    how = {"arguments": arguments, "dataset": dataset, "loss": loss, "callback": callback}
    return trainer_of(CrossEncoderTrainer, model=model, **how)


def columns(job: Job, places: Sequence[int]) -> dict[str, list[Any]]:
    """The texts and labels of pairs and negatives: a place is pair * (1 + negatives) + 0 for the relevant document, and
    + 1, 2, … for the negatives."""
    arrays = job.arrays
    pair, slot = np.divmod(np.array(places, np.int64), 1 + arrays["negatives"].shape[1])
    rows = np.concatenate([arrays["row"][:, None], arrays["negatives"]], axis=1)[pair, slot]
    return {
        "query": [job.queries[q] for q in arrays["query"][pair]],
        "document": [job.documents[int(row)] for row in rows],
        "label": (slot == 0).astype(float).tolist(),
    }


def measure(job: Job, model: Any) -> float | None:
    """The mean ndcg@10 on the validation split, in which the first documents of the inner retriever are reranked; None
    without one. All relevant documents count alike, and those that the inner retriever misses have no rank."""
    if not job.held_out:
        return None
    from torch.nn import Identity

    chosen = some(len(job.held_out), MAX_VALIDATION_QUERIES, np.random.default_rng(0)).tolist()
    found = [job.listed("candidates", q) for q in chosen]
    pairs = [
        (job.held_out[q], job.documents[row]) for q, rows in zip(chosen, found, strict=True) for row in rows.tolist()
    ]
    size = job.settings["encoder"]["batch_size"]
    scores = model.predict(pairs, batch_size=size, activation_fn=Identity(), show_progress_bar=False) if pairs else []
    total = 0.0
    ends = np.cumsum([len(rows) for rows in found])[:-1]
    for q, rows, own in zip(chosen, found, np.split(np.asarray(scores, np.float32), ends), strict=True):
        order = rows[np.lexsort((rows, -own))]
        relevant = job.listed("relevant", q)
        there = relevant[:, None] == order[None]
        total += ndcg(np.where(there.any(1), there.argmax(1) + 1, 0) if len(order) else np.zeros(len(relevant)))
    return round(total / len(chosen), 6)
