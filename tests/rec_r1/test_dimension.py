"""Dimension or alignment: the retrievers of few dimensions by brute force, and the verdicts in known worlds."""

from types import SimpleNamespace

import numpy as np
import pytest

import retrievers
from rec_r1.similarity_gap import claims, dimension, vectors
from rec_r1.similarity_gap.dimension import CHOICES, Sweep
from rec_r1.similarity_gap.vectors import Choices, projected
from retrievers import Interactions, Query
from retrievers.recommenders.ease import GRID

N, D = 60, 16


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Encoder:
    """An open `dense`, as far as it is read here. The text of a query is the number of its vector."""

    def __init__(self, documents, queries, normalize=True):
        self.embeddings = documents.astype(np.float16)
        self.encoder, self.params = self, SimpleNamespace(normalize=normalize)
        self.fingerprint, self._queries = "encoder", queries.astype(np.float32)
        self.dimension = documents.shape[1]

    def __len__(self):
        return len(self.embeddings)

    def queries(self, texts):
        return np.stack([self._queries[int(text)] if text.strip() else np.ones(self.dimension) for text in texts])


def ranks_by(scores, targets):
    own = np.take_along_axis(scores, targets, axis=1)
    return 1 + (scores[:, None, :] > own[:, :, None]).sum(axis=2)


def interactions(users=40, items=N, each=8, validation=30, seed=0, dims=4):
    """Users with a taste of few dimensions, and others with a validation choice."""
    rng = np.random.default_rng(seed)
    tastes, kinds = rng.normal(size=(users + validation, dims)), rng.normal(size=(items, dims))
    noise = rng.gumbel(size=(users + validation, items))
    chosen = np.argsort(-(2 * tastes @ kinds.T + noise), axis=1)[:, :each].tolist()
    held = chosen[users:]
    return Interactions.from_sequences(
        items, chosen[:users], validation=([row[:-1] for row in held], [row[-1] for row in held])
    )


# ---- Retrievers


@pytest.mark.parametrize("normalize", [True, False])
def test_a_projection_ranks_as_the_truncated_svd_does(normalize):
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(D, D)) * np.linspace(3, 0.2, D)
    documents, asked = rng.normal(size=(N, D)) @ shape + 0.5, rng.normal(size=(25, D)) @ shape
    if normalize:
        documents, asked = unit(documents), unit(asked)
    encoder = Encoder(documents, asked, normalize)
    targets = rng.integers(0, N, (25, 2)).astype(np.int32)
    queries = [Query(str(q)) for q in range(25)]
    _, _, axes = np.linalg.svd(encoder.embeddings.astype(float), full_matrices=False)
    for d in (4, 8, D):
        short, question = encoder.embeddings.astype(float) @ axes[:d].T, asked @ axes[:d].T
        expected = question @ (unit(short) if normalize else short).T
        found = projected(encoder, d)
        # float16 may exchange documents with almost equal scores.
        assert np.abs(found.ranks(queries, targets) - ranks_by(expected, targets)).max() <= 1
        hits = found.search(queries, 5)
        assert np.array_equal(found.ranks(queries, hits.rows), np.tile(np.arange(1, 6), (25, 1)))
    assert ranks_by(asked @ documents.T, targets) == pytest.approx(projected(encoder, D).ranks(queries, targets), abs=1)


def test_a_query_without_text_or_history_retrieves_nothing():
    encoder = Encoder(np.eye(D), np.eye(D))
    for found in (projected(encoder, 8), Choices(interactions(), 4).of(4)):
        assert found.ranks([Query(" ")], np.array([[1]], np.int32)).tolist() == [[0]]
        assert (found.search([Query("")], 3).rows == -1).all()


@pytest.mark.parametrize("regularization", [1.0, 100.0])
def test_vectors_of_choices_are_the_best_matrix_of_their_rank(regularization):
    given = interactions()
    x = given.matrix().toarray().astype(float)
    augmented = np.concatenate([x, np.sqrt(regularization) * np.eye(N)])
    wanted = np.concatenate([x, np.zeros((N, N))])
    ridge = np.linalg.lstsq(augmented, wanted, rcond=None)[0]

    def loss(b):
        return np.linalg.norm(augmented @ b - wanted) ** 2

    for d in (3, 10):
        left, values, right = np.linalg.svd(augmented @ ridge, full_matrices=False)
        best = np.linalg.lstsq(augmented, left[:, :d] * values[:d] @ right[:d], rcond=None)[0]
        w = Choices(given, d).model(d, regularization).vectors.astype(float)
        assert w.shape == (N, d) and np.allclose(w @ w.T, best, atol=1e-5)
        rng = np.random.default_rng(d)
        for _ in range(20):
            other = (w + 0.01 * rng.normal(size=w.shape)) @ (w + 0.01 * rng.normal(size=w.shape)).T
            assert loss(w @ w.T) < loss(other)


def test_both_decompositions_are_the_same(monkeypatch):
    given = interactions()
    few = Choices(given, 5).model(5, 10.0).vectors
    all_of_them = Choices(given, N).model(5, 10.0).vectors
    assert np.allclose(few @ few.T, all_of_them @ all_of_them.T, atol=1e-5)
    assert Choices(given, N).model(N, 10.0).vectors.shape == (N, 40)  # The rank of 40 users' choices.


def test_the_regularization_is_the_best_on_validation():
    given = interactions()
    asked, targets = given.validation_queries()

    def ndcg(regularization):
        w = Choices(given, 4).model(4, regularization).vectors
        total = 0.0
        for query, (target,) in zip(asked, targets.tolist(), strict=True):
            scores = w[list(query.history)].sum(axis=0) @ w.T
            scores[list(query.history)] = -np.inf
            place = 1 + int((scores > scores[target]).sum())
            total += 1 / np.log2(1 + place) if place <= 10 and scores[target] > 0 else 0.0
        return total

    best, model = Choices(given, 4).chosen(4)
    assert ndcg(best) == pytest.approx(max(ndcg(each) for each in GRID))
    w = model.vectors
    found = Choices(given, 4).of(4).ranks(asked, targets)
    scores = np.stack([w[list(query.history)].sum(axis=0) for query in asked]) @ w.T
    assert np.abs(found - ranks_by(scores, targets)).max() <= 1


def test_a_retriever_is_named_by_what_it_depends_on():
    one, other = interactions(), interactions(seed=1)
    encoder = Encoder(np.eye(D), np.eye(D))
    names = [Choices(given, 8).of(d).fingerprint for given in (one, other) for d in (4, 8)]
    names += [projected(encoder, d).fingerprint for d in (4, 8)]
    assert len(set(names)) == 6 and Choices(one, 16).of(4).fingerprint == names[0]


# ---- Worlds


def swept(encoder, given, histories, targets, users):
    """The sweep of one encoder on Q queries with one target each."""
    queries = [Query(str(q), tuple(history)) for q, history in enumerate(histories)]
    choices = Choices(given, D)
    found = {"encoder": [], CHOICES: []}
    for d in dimension.numbers(D):
        for name, backend in (("encoder", projected(encoder, d)), (CHOICES, choices.of(d))):
            ranks = retrievers.Unseen(backend, len(encoder)).ranks(queries, targets[:, None])[:, 0]
            found[name].append(np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0))
    return Sweep(dimension.numbers(D), {name: np.stack(each)[None] for name, each in found.items()}, users)


def world(scales, aligned, by_taste, seed=0, queries=400, users=400):
    """What is found in a world where users choose by a taste of D dimensions with these scales.

    aligned: whether the encoder's embeddings are the items and the tastes; else they are random.
    by_taste: whether histories are chosen by the taste; else they are random.
    """
    rng = np.random.default_rng(seed)
    items = unit(rng.normal(size=(N * 3, D)) * scales)
    tastes = unit(rng.normal(size=(users + 30 + queries, D)) * scales)
    order = np.argsort(-(20 * tastes @ items.T + rng.gumbel(size=(len(tastes), len(items)))), axis=1)
    targets = order[:, 0].astype(np.int32)
    past = order[:, 1:7] if by_taste else np.argsort(rng.random(order.shape), axis=1)[:, :6]
    past = [[row for row in rows if row != target] for rows, target in zip(past.tolist(), targets, strict=True)]
    encoder = Encoder(*(items, tastes[-queries:]) if aligned else (unit(rng.normal(size=items.shape)),
                                                                   unit(rng.normal(size=(queries, D)))))  # fmt: skip
    trained = [[*rows, target] for rows, target in zip(past[:users], targets[:users].tolist(), strict=True)]
    held = past[users : users + 30], targets[users : users + 30].tolist()
    given = Interactions.from_sequences(len(items), trained, validation=held)
    asked = [f"u{q}" for q in range(queries)]
    sweep = swept(encoder, given, past[-queries:], targets[-queries:], asked)
    rows, sentence = dimension.tested(sweep, "encoder")
    return {row["key"]: row for row in rows}, sentence, sweep


FIRST_HALF = np.array([1.0] * 8 + [0.02] * 8)
EVERYWHERE = np.ones(D)


def test_where_relevance_lives_in_the_first_half_the_other_half_is_not_needed():
    rows, sentence, sweep = world(FIRST_HALF, aligned=True, by_taste=False)
    assert rows["dimension"]["verdict"] == claims.RELAXED and rows["alignment"]["verdict"] == claims.RELAXED
    assert sentence.startswith("Neither the number of its dimensions (16) nor alignment")
    assert sweep.dimensions == [8, 16] and rows["dimension"]["systems"]["reduced"] == "encoder, 8 dimensions"


def test_where_relevance_lives_in_all_dimensions_their_number_may_limit():
    rows, sentence, _ = world(EVERYWHERE, aligned=True, by_taste=False)
    assert rows["dimension"]["verdict"] == claims.STANDS and rows["alignment"]["verdict"] == claims.RELAXED
    assert sentence.startswith("The number of its dimensions (16) may limit encoder here")


def test_where_the_encoder_knows_nothing_alignment_limits_it():
    rows, sentence, _ = world(EVERYWHERE, aligned=False, by_taste=True)
    assert rows["dimension"]["verdict"] != claims.STANDS and rows["alignment"]["verdict"] == claims.STANDS
    assert sentence.startswith("Alignment limits encoder here, and not the number of its dimensions")


def test_alignment_goes_before_the_number_of_dimensions():
    assert "Alignment limits" in dimension.limit("e", 8, claims.STANDS, claims.STANDS)
    assert "may limit" in dimension.limit("e", 8, claims.STANDS, claims.UNDECIDED)
    assert dimension.limit("e", 8, claims.UNDECIDED, claims.UNDECIDED).startswith("Neither")


def test_the_numbers_of_dimensions():
    assert dimension.numbers(384) == [12, 24, 48, 96, 192, 384] and dimension.numbers(8) == [8]
    assert dimension.numbers(7) == [] and vectors.principal_axes(np.eye(3)).shape == (3, 3)
