"""From one domain to another: pre-training over several, and code embeddings permuted to fit a new one's codes.

Hou et al. 2023 (arXiv:2210.12316), sections 3.2 and 3.3. A new domain has a codebook of its own, so its code 5 means
something else than the old one's. Each of the M tables of code embeddings is permuted: which old embedding a new code
takes is learned through Gumbel-Sinkhorn (Mena et al. 2018, "Learning Latent Permutations with Gumbel-Sinkhorn
Networks") and made a hard choice in the end.

Shapes: M codes, K values a code, h dimensions, P prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrievers.recommenders.vqrec.codes import Codebook
from retrievers.recommenders.vqrec.train import Schedule, Windows, optimise

SWAP_PROBABILITY = 0.75  # ρ, the probability that a code of a semi-synthetic negative is another; the paper's
SINKHORN_ITERATIONS = 20  # of Sinkhorn's normalisation: rows and columns then sum to 1 within a hundredth or so
FIRST_TEMPERATURE, LAST_TEMPERATURE = 1.0, 0.2  # temperature of the relaxation in the first and the last epoch
FIRST_NOISE_SCALE = 0.5  # scale of the Gumbel noise in the first epoch; none in the last
TEXT_LOGIT_SCALE = 2.0  # logits of a cosine of 1 at the start
PERMUTATION_LEARNING_RATE = 0.1  # learning rate of the logits: they must move by units, not by hundredths


def semi_synthetic(codes: Any, values: int, probability: float = SWAP_PROBABILITY) -> Any:
    """(P, M) uint8 codes -> (P, M) of which each is drawn anew, uniformly among ``values``, with ``probability``.

    Uniformly, since OPQ fills the centroids about equally (section 3.2.2; the authors' code does so too): an item
    that does not exist, but might. One code in K is drawn as it was.
    """
    import torch

    drawn = torch.randint(0, values, codes.shape, device=codes.device, dtype=codes.dtype)
    return torch.where(torch.rand(codes.shape, device=codes.device) < probability, drawn, codes)


def sinkhorn(logits: Any, iterations: int = SINKHORN_ITERATIONS) -> Any:
    """(M, K, K) logits -> (M, K, K) positive, rows and columns about 1 each: exp, then both normalised in turn
    (Sinkhorn and Knopp 1967), in logarithms, columns last."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(2, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def gumbel_sinkhorn(logits: Any, temperature: float, noise: float) -> Any:
    """(M, K, K) -> a relaxed permutation a table, about which a draw of Gumbel noise decides (Mena et al., eq. 5)."""
    import torch

    uniform = torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)
    return sinkhorn((logits - noise * torch.log(-torch.log(uniform))) / temperature)


def alike(new: Codebook, old: Codebook) -> np.ndarray:
    """(M, K, K) float32 cosines, in the space of the text, of each new centroid with each old one of the same piece.

    Where both domains' rotations agree, and so the same piece is about the same, this says which code was which; where
    they do not, it is about 0 and says nothing. The same text encoder is taken for granted.
    """
    pieces, _, width = new.centroids.shape
    turn = (new.rotation @ old.rotation.T).reshape(pieces, width, pieces, width)  # old piece seen from the new one
    a, b = (book.centroids / np.maximum(np.linalg.norm(book.centroids, axis=2, keepdims=True), 1e-12)
            for book in (new, old))  # fmt: skip
    own = turn[np.arange(pieces), :, np.arange(pieces)]  # (M, width, width)
    return np.asarray(np.einsum("mcw,mwv,mkv->mck", a, own, b), np.float32)


def harden(logits: np.ndarray) -> np.ndarray:
    """(M, K, K) -> (M, K) int64: the permutation with the largest sum of logits, a table (Hungarian method)."""
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
    """Permute the network's code embeddings until they fit another domain's codes; nothing else of it changes.

    loss: inputs, targets, table (M K, h) -> scalar. measure: of the network, whose table is the permuted one when it
    is asked. start: (M, K, K) logits to begin with. Returns (M, K): the old embedding of each new code; and what
    :func:`optimise` reports. The permutation of the best epoch is the one that stays.
    """
    import torch

    weight = net["content"].weight
    old = weight.detach().clone().view(-1, values, weight.shape[1])
    begin = torch.zeros((len(old), values, values), device=old.device)
    logits = torch.nn.Parameter(begin if start is None else begin + torch.from_numpy(start).to(old.device))
    net.requires_grad_(False)
    net.eval()

    def chosen() -> np.ndarray:
        # A hair for the diagonal: where nothing was learned, a code keeps its number
        return harden(logits.detach().cpu().numpy() + 1e-6 * np.eye(values))

    def place(permutation: np.ndarray) -> None:
        taken = old.gather(1, torch.from_numpy(permutation).to(old.device)[..., None].expand(-1, -1, old.shape[2]))
        weight.data.copy_(taken.reshape(weight.shape))

    def relaxed(inputs: np.ndarray, targets: np.ndarray, epoch: int) -> Any:
        done = (epoch - 1) / max(1, schedule.epochs - 1)
        matrix = gumbel_sinkhorn(
            logits, FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** done, FIRST_NOISE_SCALE * (1 - done)
        )
        return loss(inputs, targets, torch.bmm(matrix, old).reshape(weight.shape))

    def figure() -> float | None:
        place(chosen())
        return measure()

    report = optimise([logits], relaxed, windows, schedule, figure, "permuting")
    permutation = chosen()
    place(permutation)
    net.requires_grad_(True)
    return permutation, report


def joined(sequences: Sequence[Sequence[np.ndarray]], sizes: Sequence[int]) -> list[np.ndarray]:
    """The sequences of several domains, of ``sizes`` documents each, with rows into all documents behind each other."""
    first = np.concatenate([[0], np.cumsum(sizes)])
    return [np.asarray(sequence, np.int64) + first[d] for d, domain in enumerate(sequences) for sequence in domain]
