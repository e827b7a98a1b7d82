"""Transfers VQ-Rec between domains: negatives for pre-training, and permutations of the code embeddings.

See Hou et al. 2023 (arXiv:2210.12316), sections 3.2 and 3.3. A new domain has its own codebook, so that its code 5 has
another meaning than code 5 of the old domain. Each of the M tables of code embeddings is therefore permuted. The
permutation, which assigns an old embedding to each new code, is learned in a relaxed form by Gumbel-Sinkhorn (Mena et
al. 2018, "Learning Latent Permutations with Gumbel-Sinkhorn Networks"), and is then rounded to a real permutation.

Shapes: M codes, K values per code, h dimensions, P prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, read_meta
from retrievers.recommenders.fitted import ALSO
from retrievers.recommenders.next_item import Batch, Schedule, Windows, optimise
from retrievers.recommenders.vqrec.codes import Codebook
from retrievers.recommenders.vqrec.model import Shape, load

SWAP_PROBABILITY = 0.75  # ρ in the paper: the probability that a code of a semi-synthetic negative is drawn again.
SINKHORN_ITERATIONS = 20  # After so many iterations, rows and columns sum to 1 within about a hundredth.
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.2  # The temperature of the relaxation in the first and the last epoch.
FIRST_NOISE_SCALE = 0.5  # The scale of the Gumbel noise in the first epoch. It falls to 0 in the last.
TEXT_LOGIT_SCALE = 2.0  # The initial logit of two centroids with a cosine of 1.
PERMUTATION_LEARNING_RATE = 0.1  # The learning rate of the logits. It is high, because they must change by whole units.


def semi_synthetic(codes: Any, values: int, probability: float = SWAP_PROBABILITY) -> Any:
    """Codes of items that do not exist, for negatives (section 3.2.2): (P, M) uint8.

    codes: (P, M) uint8 codes of items.
    values: K.
    probability: the probability that a code is replaced by a random one. Default 0.75.

    Random codes are uniform, because OPQ uses the centroids about equally often; the authors' code does the same. One
    in K random codes equals the code that it replaces.
    """
    import torch

    drawn = torch.randint(0, values, codes.shape, device=codes.device, dtype=codes.dtype)
    return torch.where(torch.rand(codes.shape, device=codes.device) < probability, drawn, codes)


def sinkhorn(logits: Any, iterations: int = SINKHORN_ITERATIONS) -> Any:
    """Matrices whose rows and columns sum to about 1: (M, K, K), all positive.

    logits: (M, K, K) logarithms of the matrices to start from.
    iterations: how often rows, and then columns, are normalised. Default 20.

    This is the algorithm of Sinkhorn and Knopp (1967), computed with logarithms.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(2, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def gumbel_sinkhorn(logits: Any, temperature: float, noise: float) -> Any:
    """Random relaxed permutations, one per table: (M, K, K) (Mena et al. 2018, equation 5).

    logits: (M, K, K).
    temperature: the lower it is, the closer the result is to permutations.
    noise: the scale of the Gumbel noise.
    """
    import torch

    uniform = torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)
    return sinkhorn((logits - noise * torch.log(-torch.log(uniform))) / temperature)


def centroid_cosines(new: Codebook, old: Codebook) -> np.ndarray:
    """The cosine of each new centroid with each old centroid of the same piece, in the space of text embeddings.

    Returns (M, K, K) float32. Both codebooks must be learned from the same text encoder. Where the rotations of both
    are similar, the cosines show which codes have the same meaning. Where they are not, all cosines are about 0.
    """
    pieces, _, width = new.centroids.shape
    turn = (new.rotation @ old.rotation.T).reshape(
        pieces, width, pieces, width
    )  # The rotation from each old to each new piece.
    a, b = (book.centroids / np.maximum(np.linalg.norm(book.centroids, axis=2, keepdims=True), 1e-12)
            for book in (new, old))  # fmt: skip
    own = turn[np.arange(pieces), :, np.arange(pieces)]  # (M, width, width)
    return np.asarray(np.einsum("mcw,mwv,mkv->mck", a, own, b), np.float32)


def best_permutation(logits: np.ndarray) -> np.ndarray:
    """The permutation with the largest sum of logits, for each table: (M, K) int64 (Hungarian method).

    logits: (M, K, K).
    """
    from scipy.optimize import linear_sum_assignment

    return np.stack([linear_sum_assignment(table, maximize=True)[1] for table in logits]).astype(np.int64)


def align(
    net: Any,
    values: int,
    loss: Callable[..., Any],
    windows: Windows,
    schedule: Schedule,
    measure: Callable[[], float | None],
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Permute the code embeddings of a network so that they fit the codes of another domain.

    net: the network. Only its code embeddings change.
    values: K.
    loss: takes a batch and code embeddings, (M K, h), and returns a scalar tensor.
    windows, schedule: see :func:`optimise`.
    measure: the validation metric of the network with the permuted embeddings, or None without a validation split.
    start: (M, K, K) initial logits. None, the default, = 0.

    Returns the old embedding of each new code, (M, K) int64, and the report of :func:`optimise`. The permutation of the
    best epoch is kept.
    """
    import torch

    weight = net["content"].weight
    old = weight.detach().clone().view(-1, values, weight.shape[1])
    begin = torch.zeros((len(old), values, values), device=old.device)
    logits = torch.nn.Parameter(begin if start is None else begin + torch.from_numpy(start).to(old.device))
    net.requires_grad_(False)
    net.eval()

    def chosen() -> np.ndarray:
        # The diagonal is slightly preferred, so that a code keeps its number where nothing was learned.
        return best_permutation(logits.detach().cpu().numpy() + 1e-6 * np.eye(values))

    def place(permutation: np.ndarray) -> None:
        taken = old.gather(1, torch.from_numpy(permutation).to(old.device)[..., None].expand(-1, -1, old.shape[2]))
        weight.data.copy_(taken.reshape(weight.shape))

    def relaxed(batch: Batch, epoch: int) -> Any:
        done = (epoch - 1) / max(1, schedule.epochs - 1)
        matrix = gumbel_sinkhorn(
            logits, FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** done, FIRST_NOISE_SCALE * (1 - done)
        )
        return loss(batch, torch.bmm(matrix, old).reshape(weight.shape))

    def figure() -> float | None:
        place(chosen())
        return measure()

    report = optimise([logits], relaxed, windows, schedule, figure, "permuting")
    permutation = chosen()
    place(permutation)
    net.requires_grad_(True)
    return permutation, report


def load_pretrained(folder: Path, dropout: float, text: int) -> tuple[Any, Shape]:
    """Load a pre-trained network and its shape.

    folder: the folder of the network.
    dropout: the dropout of the fit, which replaces that of pre-training.
    text: the dimensions of the text embeddings.

    Raises RetrieverError where the files are damaged, and ValueError where the network projects text embeddings of
    another number of dimensions.
    """
    try:
        net, shape = load(folder, dropout=dropout)
        if shape.codes:
            Codebook.load(folder)
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    if not shape.codes and shape.text != text:
        raise ValueError(
            f"retriever.params.model: the text embeddings have {text} dimensions, but the pre-trained network needs "
            f"{shape.text}: take the encoder that it was pre-trained with"
        )
    return net, shape


def pretrained_on(folder: Path, catalog: Catalog) -> tuple[str, ...]:
    """The fingerprints of the interactions in one catalogue that a network was pre-trained on.

    folder: the folder of the network: of `pretrain`, or of an index of `vqrec`.
    catalog: the catalogue. Other shops do not count, because networks are pre-trained to be used elsewhere.

    Raises RetrieverError where the description of the network is missing or damaged.
    """
    meta = read_meta(folder, {})
    domains = meta.get("domains", [[meta.get("catalog"), meta.get("interactions")]])
    return *(given for theirs, given in domains if theirs == catalog.fingerprint), *meta.get(ALSO, ())


def concatenated(sequences: Sequence[Sequence[np.ndarray]], sizes: Sequence[int]) -> list[np.ndarray]:
    """The sequences of several domains in one list, with rows of the concatenated catalogues.

    sequences: the sequences of each domain.
    sizes: the number of items of each domain.
    """
    first = np.concatenate([[0], np.cumsum(sizes)])
    return [np.asarray(sequence, np.int64) + first[d] for d, domain in enumerate(sequences) for sequence in domain]
