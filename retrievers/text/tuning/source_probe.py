"""The source probe: can a linear probe tell written negatives from documents of the catalogue?

Where it can, an encoder that is tuned to put written texts away from queries can learn how a language model writes,
instead of what is relevant. That is of no use for ranking documents, none of which was written by the model.

The probe is a logistic regression over the embeddings of the encoder before it is tuned, cross-validated. Its AUC is
the probability that it gives a written text a higher score than a document, both of which it has not seen: 0.5 = it
cannot tell them apart, 1 = it always can.

The interval comes from a bootstrap over groups, and is then widened: any two folds are in the training part of each
other's probe, so that their AUCs are correlated. The factor is that of Nadeau & Bengio 2003 ("Inference for the
generalization error"), the square root of 1 + J * test / train groups for J folds. In 200 simulations in which both
sides had one source, with 120 groups of 32 dimensions, 195 intervals contained 0.5; without the factor, 170 did. The
test `test_the_probe_is_calibrated` repeats such simulations.

Shapes: G groups, each with the embedding of a written text and of the document that it was written for; d dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retrievers.text.tuning.pairs import Pairs

FOLDS = 5
FEWEST = 5 * FOLDS  # The probe is not made for fewer groups.
MOST = 1000  # This many groups are enough for an interval of about 0.02 to either side.
STRENGTH = 0.1  # C of the logistic regression, over standardised dimensions.
RESAMPLES = 2000
WIDER = math.sqrt(1 + FOLDS / (FOLDS - 1))  # For J folds, there are J - 1 training groups for each test group.
NEAR_ONE = 0.9  # An AUC above this is called near 1.


def groups_of(pairs: Pairs, numbers: np.ndarray, seed: int) -> np.ndarray:
    """Pairs whose written texts and documents the probe compares: (G, 2) int64, a pair and the number of its text.

    pairs: X pairs.
    numbers: (X, m) int64 numbers of written texts; -1 = there is none.
    seed: the seed of the choice.

    No query, document or text is in two groups, so that the probe of a fold was not fitted on any text of this fold.
    """
    used: tuple[set[int], set[int], set[int]] = (set(), set(), set())
    out = []
    for x in np.random.default_rng(seed).permutation(np.flatnonzero(numbers[:, 0] >= 0)).tolist():
        each = int(pairs.query[x]), int(pairs.row[x]), int(numbers[x, 0])
        if any(one in seen for one, seen in zip(each, used, strict=True)):
            continue
        for one, seen in zip(each, used, strict=True):
            seen.add(one)
        out.append((x, each[2]))
        if len(out) == MOST:
            break
    return np.array(out, np.int64).reshape(-1, 2)


def probe(written: np.ndarray, real: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How well written texts are told from documents.

    written, real: (G, d) embeddings, of any float dtype. Row g of both belongs to group g, which is in one fold.
    seed: the seed of the folds and of the interval.

    Returns `auc` with `low` and `high`, its 95% bootstrap interval over groups, and `groups`. For fewer than `FEWEST`
    groups, the first three are None.
    """
    count = len(written)
    written, real = (np.asarray(side, np.float64) for side in (written, real))
    if count < FEWEST:
        return {"auc": None, "low": None, "high": None, "groups": count}
    rng = np.random.default_rng(seed)
    folds = np.array_split(rng.permutation(count), FOLDS)
    wins = [_wins(written, real, fold) for fold in folds]
    draws = np.zeros(RESAMPLES)
    for each in wins:  # The groups of a fold are resampled within it, because another fold has another probe.
        times = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), RESAMPLES)
        draws += np.einsum("rg,rg->r", times @ each, times) / len(each) / count
    auc = sum(each.mean() * len(each) for each in wins) / count
    low, high = np.clip(auc + WIDER * (np.percentile(draws, [2.5, 97.5]) - auc), 0, 1)
    return {"auc": round(float(auc), 4), "low": round(float(low), 4), "high": round(float(high), 4), "groups": count}


def _wins(written: np.ndarray, real: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(F, F) for the F groups of a fold: whether the probe, which has not seen them, scores written text i above
    document j; 0.5 for equal scores."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rest = np.setdiff1d(np.arange(len(written)), fold)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    model.fit(np.concatenate([written[rest], real[rest]]), np.repeat([1, 0], len(rest)))
    above, below = (model.decision_function(vectors[fold]) for vectors in (written, real))
    difference = above[:, None] - below[None]
    return np.where(difference > 0, 1.0, np.where(difference == 0, 0.5, 0.0))


def sentence(found: Mapping[str, Any]) -> str:
    """What the probe says, as one sentence. found: what :func:`probe` returns."""
    if found["auc"] is None:
        return (
            f"source probe: only {found['groups']} pairs with a written text share no query and no document, and it "
            f"needs {FEWEST}: it was not made"
        )
    numbers = f"source probe: AUC {found['auc']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    if found["low"] > NEAR_ONE:
        return (
            f"{numbers}: a linear probe tells written negatives from documents, so the encoder can learn who wrote a "
            "text instead of what is relevant"
        )
    if found["low"] > 0.5:
        return (
            f"{numbers}: a linear probe tells some written negatives from documents, so the encoder can learn in part "
            "who wrote a text"
        )
    return f"{numbers}: a linear probe is not shown to tell written negatives from documents"
