"""The loss that an encoder is tuned by, beside brute force and the library's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers.text.tuning.loss import Objective, as_module, correction_of


def brute_force(columns, labels, objective) -> float:
    """The loss by the formula at the head of loss.py, one pair after another, in float64."""

    def cosine(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    size, m = len(labels), labels.shape[1] - 3
    documents = [(columns[1][i], labels[i, 2], True) for i in range(size)]
    documents += [(columns[2 + k][i], labels[i, 3 + k], False) for k in range(m) for i in range(size)]
    losses, divergences = [], []
    for i in range(size):
        known = set(objective.known[objective.offsets[labels[i, 0]] : objective.offsets[labels[i, 0] + 1]].tolist())
        terms, before, now = [], [], []
        for j, (vector, row, drawn) in enumerate(documents):
            if row < 0:
                continue
            score = objective.scale * cosine(columns[0][i], vector)
            now.append(score)
            if objective.frozen is not None:
                before.append(objective.scale * cosine(objective.frozen[0][labels[i, 1]], objective.frozen[1][row]))
            correction = objective.correction[row] if drawn and objective.correction is not None else 0.0
            if j == i:
                own = score - correction
            if j == i or row not in known:
                terms.append(score - correction)
        losses.append(np.log(np.exp(np.array(terms)).sum()) - own)
        if before:
            p = np.exp(np.array(before) - np.logaddexp.reduce(before))
            divergences.append((p * (np.log(p) - (np.array(now) - np.logaddexp.reduce(now)))).sum())
    loss = float(np.mean(losses))
    return loss if not objective.keep else (1 - objective.keep) * loss + objective.keep * float(np.mean(divergences))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.3]), st.integers(0, 999))
def test_the_loss_is_the_brute_force(size, m, log_q, keep, seed):
    import torch

    rng = np.random.default_rng(seed)
    n, d, groups = 9, 4, 3
    known = [np.sort(rng.choice(n, rng.integers(1, 4), replace=False)) for _ in range(groups)]
    group = rng.integers(0, groups, size)
    positive = np.array([rng.choice(known[g]) for g in group])
    others = rng.integers(-1, n, (size, m))
    for i in range(size):
        others[i][np.isin(others[i], known[group[i]])] = -1
    labels = np.column_stack([group, rng.integers(0, 5, size), positive, others])
    objective = Objective(
        7.0,
        correction_of(np.concatenate([positive, positive[:1]]), n) if log_q else None,
        np.concatenate([[0], np.cumsum([len(k) for k in known])]),
        np.concatenate(known),
        keep,
        (rng.normal(size=(5, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float16)) if keep else None,
    )
    columns = [rng.normal(size=(size, d)) for _ in range(2 + m)]
    found = objective.of_embeddings([torch.from_numpy(c) for c in columns], torch.from_numpy(labels))
    assert float(found) == pytest.approx(brute_force(columns, labels, objective), abs=1e-5)


@pytest.mark.slow
def test_without_correction_it_is_the_library_s_loss():
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch import nn

    rng = np.random.default_rng(0)
    columns = [torch.from_numpy(rng.normal(size=(5, 8))) for _ in range(3)]
    labels = torch.from_numpy(np.column_stack([np.arange(5), np.arange(5), np.arange(5), np.arange(5) + 5]))
    objective = Objective(20.0, None, np.arange(6), np.arange(5))
    theirs = MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings(columns, labels)
    assert float(objective.of_embeddings(columns, labels)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.slow
def test_gradient_caching_changes_no_gradient():
    import torch
    from torch import nn

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inside = nn.Linear(6, 4)

        def forward(self, features):
            return {"sentence_embedding": self.inside(features["input_ids"])}

    rng = np.random.default_rng(0)
    features = [{"input_ids": torch.from_numpy(rng.normal(size=(7, 6)).astype(np.float32))} for _ in range(3)]
    labels = torch.from_numpy(np.column_stack([np.arange(7), np.arange(7), np.arange(7), [-1, *range(7, 13)]]))
    objective = Objective(20.0, correction_of(np.array([0, 1, 1, 2, 3, 4, 5, 6]), 13), np.arange(8), np.arange(7))
    found = []
    for mini_batch in (None, 3):
        model = Linear()
        loss = as_module(model, objective, mini_batch)(features, labels)
        loss.backward()
        found.append((float(loss.detach()), model.inside.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5) and found[0][1].abs().max() > 0.01


def test_the_correction_is_the_log_of_the_frequency_beside_the_mean():
    found = correction_of(np.array([3, 3, 3, 0]), 5)  # The frequencies are 3 and 1, and 2 on average.
    assert found == pytest.approx([np.log(0.5), 0, 0, np.log(1.5), 0])
