"""Fusion, compared with its formula."""

import pickle

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, Query
from retrievers.combine.hybrid import Hybrid, Params

TEXTS = ["party popper", "sad face", "party face", "a face of a party", "castle", "running shoes"]
CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))
PARTS = [retrievers.open("bm25", CATALOG, b=0.0), retrievers.open("bm25", CATALOG, stemmer=None)]
QUERIES = [Query("party face"), Query("runs castle"), Query("zebra")]


def fused(parts, weights, **params) -> Hybrid:
    return Hybrid(parts, weights, len(TEXTS), Params(**params))


def order_of(scores: dict) -> list[int]:
    return sorted(scores, key=lambda row: (-np.float32(scores[row]), row))


def test_reciprocal_rank_fusion():
    weights = [1.0, 0.5]
    hits = fused(PARTS, weights).search(QUERIES, len(TEXTS))
    for q, query in enumerate(QUERIES):
        expected: dict[int, float] = {}
        for part, weight in zip(PARTS, weights, strict=True):
            for rank, row in enumerate(part.search([query], 6).rows[0].tolist(), 1):
                if row >= 0:
                    expected[row] = expected.get(row, 0) + weight / (60 + rank)
        order = order_of(expected)
        assert hits.rows[q].tolist() == order + [-1] * (6 - len(order))
        assert hits.scores[q, : len(order)] == pytest.approx([expected[row] for row in order])


@pytest.mark.parametrize("norm", ["minmax", "none"])
def test_weighted_scores(norm):
    weights = [0.3, 2.0]
    hits = fused(PARTS, weights, method="weighted", norm=norm).search(QUERIES, len(TEXTS))
    for q, query in enumerate(QUERIES):
        expected: dict[int, float] = {}
        for part, weight in zip(PARTS, weights, strict=True):
            found = part.search([query], 6)
            scores = {int(r): float(s) for r, s in zip(found.rows[0], found.scores[0], strict=True) if r >= 0}
            low, high = min(scores.values(), default=0), max(scores.values(), default=0)
            for row, score in scores.items():
                if norm == "minmax":
                    score = (score - low) / (high - low) if high > low else 1.0
                expected[row] = expected.get(row, 0) + weight * score
        order = order_of(expected)
        assert hits.rows[q].tolist() == order + [-1] * (6 - len(order))
        assert hits.scores[q, : len(order)] == pytest.approx([expected[row] for row in order], rel=1e-5)


def test_what_no_part_has_within_its_depth_is_not_retrieved():
    shallow = fused(PARTS[:1], [1.0], depth=2)
    assert (shallow.search(QUERIES[:1], 6).rows >= 0).sum() == 2
    assert sorted(shallow.ranks(QUERIES[:1], np.arange(6)[None])[0].tolist()) == [0, 0, 0, 0, 1, 2]


def test_a_part_that_fails_fails_the_fusion():
    class Down:
        fingerprint = "down"

        def search(self, queries, k):
            raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        fused([PARTS[0], Down()], [1.0, 1.0]).ranks(QUERIES, np.zeros((3, 1), int))


def test_the_fingerprint_follows_parts_weights_and_method():
    several = [
        fused(PARTS, [1, 1]), fused(PARTS[::-1], [1, 1]), fused(PARTS, [1, 2]), fused(PARTS, [1, 1], depth=9),
        fused(PARTS, [1, 1], method="weighted"), fused(PARTS, [1, 1], method="weighted", norm="none"),
    ]  # fmt: skip
    assert len({one.fingerprint for one in several}) == 6
    assert pickle.loads(pickle.dumps(several[0])).fingerprint == several[0].fingerprint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "max"}, "choose rrf or weighted"),
        ({"norm": "z"}, "choose minmax or none"),
        ({"depth": 0}, "depth must be an integer >= 1"),
        ({"retrievers": []}, "at least one"),
        ({"retrievers": ["bm25"]}, r"retrievers\[0\] must be a mapping with a kind"),
        ({"retrievers": [{"kind": "bm25"}, {"kind": "bm25", "wieght": 2}]}, r"retrievers\[1\]: unknown key 'wieght'"),
        ({"retrievers": [{"kind": "bm25", "weight": -1}]}, "weight must be a number above 0"),
        ({"retrievers": [{"kind": "bm52"}]}, "did you mean 'bm25'"),
        ({"retrievers": [{"kind": "bm25", "params": {"k2": 1}}]}, "choose from k1, b"),
    ],
)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("hybrid", CATALOG, **params)
