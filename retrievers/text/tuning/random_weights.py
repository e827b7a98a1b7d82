"""An encoder of the same architecture and the same tokenizer with random weights, to measure what pre-training adds."""

from __future__ import annotations

from pathlib import Path

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.encoders import sentence
from retrievers.encoders.sentence import Encoder


def save(encoder: Encoder, folder: Path, seed: int) -> Path:
    """Write an encoder like another one but with random weights, unless ``folder`` holds it already.

    encoder: the pre-trained encoder.
    folder: where the new one is written. Its name must depend on the encoder, its pooling and the seed.
    seed: the seed of the weights, which are drawn as those of the architecture are before it is pre-trained.

    Returns ``folder``, which can be given as the parameter `model`. Raises ValueError for an encoder that has weights
    outside a Transformer, and RetrieverError where it does not load.
    """
    if is_filled(folder):
        return folder
    import torch

    given = encoder.settings
    model = sentence.load(str(encoder.model.folder), given["pooling"], "cpu", given["trust_remote_code"])
    body = model.transformers_model
    if body is None or sum(p.numel() for p in model.parameters()) != sum(p.numel() for p in body.parameters()):
        raise ValueError(
            f"retriever.params.model: {given['model']} has weights outside a Transformer, and no random weights can be "
            "drawn for these: take another encoder"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(body)(body.config).state_dict()
    body.load_state_dict({name: fresh[name] for name in body.state_dict()})
    with new_folder(folder) as temporary:
        model.save_pretrained(str(temporary), create_model_card=False)
    return folder
