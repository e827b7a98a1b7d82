"""A cross-encoder that begins with the weights of an encoder of single texts, for machines without a public one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.encoders import sentence
from retrievers.encoders.sentence import Encoder


def save(encoder: Encoder, folder: Path, seed: int) -> Path:
    """Write a cross-encoder with the weights of an encoder, unless ``folder`` holds it already.

    Its head, which makes one score of a pair of texts, is random. So it must be tuned before it ranks anything.

        save(Encoder("all-minilm-l6-v2"), Path("start"), seed=0)  # retriever.kind=rerank retriever.params.model=start

    encoder: the encoder.
    folder: where the cross-encoder is written. Its name must depend on the encoder and the seed.
    seed: the seed of the head's weights.

    Returns ``folder``. Raises ValueError for an encoder without a Transformer, and RetrieverError where it does not
    load.
    """
    if is_filled(folder):
        return folder
    import torch
    from transformers import AutoModelForSequenceClassification

    given = encoder.settings
    trusted = bool(given["trust_remote_code"])
    model = sentence.load(str(encoder.model.folder), given["pooling"], "cpu", trusted)
    body = model.transformers_model
    if body is None:
        raise ValueError(
            f"retriever.params.model: {given['model']} has no Transformer, which a cross-encoder could begin with: "
            "take another encoder, or name a cross-encoder"
        )
    with TemporaryDirectory(prefix="rec-r1-cross-") as parts, torch.random.fork_rng(devices=[]):
        body.save_pretrained(parts)
        torch.manual_seed(seed)
        with _without_warnings():  # The library warns of a random head, which is wanted here.
            whole = AutoModelForSequenceClassification.from_pretrained(parts, num_labels=1, trust_remote_code=trusted)
        with new_folder(folder) as temporary:
            whole.save_pretrained(str(temporary))
            model.tokenizer.save_pretrained(str(temporary))
    return folder


@contextmanager
def _without_warnings() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
