"""The fit of an encoder by sentence-transformers' trainer, with all weights or with LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.encoders import sentence
from retrievers.text.tuning.job_folder import Job
from retrievers.text.tuning.loss import Objective, as_module, correction_of
from retrievers.text.tuning.measure import measure
from retrievers.text.tuning.trainer import Subject, arguments_of, pairs_in_order, trainer_of


def subject(job: Job) -> Subject:
    """The encoder of a job. With LoRA it has new adapters, and only these are trained and saved."""
    model = _base(job)
    save = _with_adapters(job, model) if job.tuned["lora"] is not None else _whole(model)
    return Subject(
        model,
        save,
        lambda one: measure(job, one),
        lambda callback: _trainer(job, model, callback),
        lambda best: _tuned(job, best),
    )


def _whole(model: Any) -> Callable[[Path], None]:
    return lambda folder: model.save_pretrained(str(folder), create_model_card=False)


def _with_adapters(job: Job, model: Any) -> Callable[[Path], None]:
    """Add adapters to the encoder in place, and return the function that saves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    if model.transformers_model is None:
        raise ValueError("retriever.params.tuned.lora: this encoder is no Transformer: leave lora out")
    set_seed(job.tuned["seed"])  # LoRA's weights are drawn at random.
    try:
        adapted = get_peft_model(model.transformers_model, LoraConfig(**job.tuned["lora"]))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"retriever.params.tuned.lora: {reason}: change its options") from error
    return lambda folder: adapted.save_pretrained(str(folder))


def _base(job: Job) -> Any:
    given = job.settings["encoder"]
    return sentence.load(job.settings["model"], given["pooling"], given["device"], given["trust_remote_code"])


def _cut(model: Any, most: int | None) -> Callable[..., Any]:
    """What turns the texts of a step into features: that of the model, but longer texts are cut to ``most`` tokens.

    The model itself keeps its length: it is measured and saved with that, as the encoder before it was tuned is.
    """
    longest = model.max_seq_length
    if most is None or not isinstance(longest, int) or longest <= most:
        whole: Callable[..., Any] = model.preprocess
        return whole

    def preprocess(*given: Any, **how: Any) -> Any:
        model.max_seq_length = most
        try:
            return model.preprocess(*given, **how)
        finally:
            model.max_seq_length = longest

    return preprocess


def _trainer(job: Job, model: Any, callback: Any) -> Any:
    """The trainer, which goes once through all epochs' pairs in their order."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    tuned = job.tuned
    dataset = Dataset.from_dict({"pair": pairs_in_order(job).tolist()})
    dataset.set_transform(lambda batch: job.columns(batch["pair"]))
    prompts = model.prompts.get(model.default_prompt_name) or None
    arguments = SentenceTransformerTrainingArguments(**arguments_of(job, model, job.batch_size), prompts=prompts)
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
    trainer = trainer_of(
        SentenceTransformerTrainer, model=model, arguments=arguments, dataset=dataset, loss=loss, callback=callback
    )
    trainer.data_collator.preprocess_fn = _cut(model, tuned["max_tokens"])
    return trainer


def _tuned(job: Job, best: Path | None) -> Any:
    """The encoder of the best epoch, with LoRA's weights merged into it. best: None = as it was."""
    if best is not None and job.tuned["lora"] is None:
        given = job.settings["encoder"]
        return sentence.load(str(best), None, given["device"], given["trust_remote_code"])
    model = _base(job)
    if best is not None:
        from peft import PeftModel

        PeftModel.from_pretrained(model.transformers_model, str(best)).merge_and_unload()
    return model
