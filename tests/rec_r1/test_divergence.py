"""How far alike texts go together in choices: every figure against brute force or scipy."""

import math

import numpy as np
import pytest
import scipy  # `scipy.stats` is imported when it is used: that takes a second
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from rec_r1.similarity_gap import divergence, sentences

SEED = np.random.default_rng


def matrix(seed=0, users=40, items=15, share=0.25):
    return csr_matrix((SEED(seed).random((users, items)) < share).astype(np.float32))


def vectors(seed=0, items=15, d=4):
    found = SEED(seed).normal(size=(items, d)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=3, max_size=40))
def test_spearman_is_scipy_s(pairs):
    one, two = map(np.array, zip(*pairs, strict=True))
    mine = divergence.spearman(one, two)
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(scipy.stats.spearmanr(one, two).statistic)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_auc_counts_pairs_and_ties_by_half(positive, negative):
    by_hand = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert divergence.auc(np.array(positive), np.array(negative)) == pytest.approx(by_hand)


def test_auc_by_hand_and_of_nothing():
    assert divergence.auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert math.isnan(divergence.auc(np.array([]), np.array([1.0])))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_cosines_and_neighbours_are_brute_force_s(seed):
    x = matrix(seed)
    dense = x.toarray()
    counts = divergence.cooccurrence(x)
    expected = dense.T @ dense
    np.fill_diagonal(expected, 0)
    assert (counts.toarray() == expected).all()
    norms = np.linalg.norm(dense, axis=0)
    cosine = divergence.cosines(counts, dense.sum(axis=0))
    wanted = expected / np.maximum(np.outer(norms, norms), 1e-9)
    np.testing.assert_allclose(cosine.toarray(), wanted, rtol=1e-5)
    for i, found in enumerate(divergence.top_together(cosine, 4)):
        row = cosine.toarray()[i]
        order = sorted((j for j in range(15) if row[j] > 0), key=lambda j: (-row[j], j))
        assert found.tolist() == order[:4]
    e = vectors(seed)
    products = e @ e.T
    for i, found in enumerate(divergence.top_text(e, 4, block=6)):
        assert i not in found
        others = np.delete(products[i], i)
        np.testing.assert_allclose(products[i][found], np.sort(others)[::-1][:4], rtol=1e-5)


def test_overlap_and_apart_are_brute_force_s_under_any_labels():
    x, e, rng = matrix(3, share=0.08), vectors(3), SEED(5)
    counts = divergence.cooccurrence(x)
    lists = divergence.top_together(divergence.cosines(counts, x.toarray().sum(axis=0)), 4)
    text, met = divergence.top_text(e, 4), divergence.together(counts)
    for labels in (np.arange(15), rng.permutation(15)):
        by_hand, alone = [], []
        for a in range(15):
            near = {int(labels[b]) for b in text[a]}
            item = int(labels[a])
            alone += [counts[item, b] == 0 for b in near]
            if len(lists[item]):
                by_hand.append(len(near & set(lists[item].tolist())) / len(lists[item]))
        assert divergence.overlap(text, lists)(labels) == pytest.approx(np.mean(by_hand))
        assert divergence.apart(text, met)(labels) == pytest.approx(np.mean(alone))


def test_the_null_is_of_relabelled_texts():
    e, rng = vectors(1), SEED(0)
    i, j = divergence.any_pairs(15, rng)
    assert len(i) == 105 and (i < j).all()
    values = SEED(9).random(105)
    statistic = divergence.of_pairs(divergence.similarity(e), i, j, values)
    labels = rng.permutation(15)
    renamed = [float(e[labels[a]] @ e[labels[b]]) for a, b in zip(i, j, strict=True)]
    assert statistic(labels) == pytest.approx(scipy.stats.spearmanr(renamed, values).statistic, abs=1e-4)
    found = divergence.null(statistic, 15, SEED(0), 300)
    assert found["null_low"] < found["null_mean"] < found["null_high"] and abs(found["null_mean"]) < 0.05
    assert found["value"] == statistic(np.arange(15))


def test_a_planted_relation_is_found_and_none_is_not():
    blocks = np.repeat(np.arange(6), 5)  # items of six topics; users stay within one
    rng = SEED(0)
    topical = csr_matrix(np.stack([(blocks == u % 6) & (rng.random(30) < 0.7) for u in range(80)]).astype(np.float32))
    e = np.eye(6, dtype=np.float32)[blocks] + 0.1 * rng.normal(size=(30, 6)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    related = divergence.measure(e, topical)["measures"]
    for name, sign in (("overlap", 1), ("apart", -1), ("auc", 1), ("cosine_any", 1)):
        assert sentences.place(related[name]) == sign, name
    assert related["auc"]["value"] > 0.95
    unrelated = divergence.measure(e[rng.permutation(30)], topical)["measures"]
    assert abs(unrelated["auc"]["value"] - 0.5) < 0.1 and abs(unrelated["cosine_any"]["value"]) < 0.15


def test_negatives_never_met_and_are_as_popular():
    x = matrix(2, users=60, items=80, share=0.05)
    popularity, counts = x.toarray().sum(axis=0).astype(int), divergence.cooccurrence(x)
    met, rng = divergence.together(counts), SEED(0)
    i, j = divergence.met_pairs(counts, rng)
    assert len(i) == counts.nnz // 2
    kept, other, found = divergence.matched_negatives(i, j, popularity, met, rng)
    assert found.mean() > 0.9
    replaced = np.where(kept == i, j, i)
    for a, b, old in zip(kept[found], other[found], replaced[found], strict=True):
        assert a != b and counts[a, b] == 0 and popularity[b] == popularity[old]  # 5% of few users are none
    many = popularity * 30 + SEED(1).integers(0, 9, 80)
    kept, other, found = divergence.matched_negatives(i, j, many, met, SEED(0))
    ratio = many[other[found]] / many[np.where(kept == i, j, i)[found]]
    assert found.mean() > 0.9 and ratio.min() >= 1 / 1.05 and ratio.max() <= 1.05 and (ratio != 1).any()
    few = divergence.met_pairs(counts, rng, 10)
    assert len(few[0]) == 10 and met.has(*few).all()
    everyone = divergence.cooccurrence(csr_matrix(np.ones((3, 5), np.float32)))
    i, j = divergence.met_pairs(everyone, rng)
    assert not divergence.matched_negatives(i, j, np.full(5, 3), divergence.together(everyone), rng)[2].any()


def independent(seed, users=1000, items=200):
    """Users choose each item by its popularity alone; the more popular, the more of its text is the same."""
    rng = SEED(seed)
    chance = np.exp(rng.uniform(np.log(0.004), np.log(0.15), items))
    x = (rng.random((users, items)) < chance).astype(np.float32)
    x = x[:, x.any(axis=0)]
    popularity = x.sum(axis=0).astype(int)
    e = (np.log2(popularity) - 1)[:, None] * rng.normal(size=8) + 1.5 * rng.normal(size=(len(popularity), 8))
    return csr_matrix(x), popularity, e / np.linalg.norm(e, axis=1, keepdims=True)


@pytest.mark.slow
def test_popularity_alone_tells_nothing_apart():
    def auc(seed, classed):
        x, popularity, e = independent(seed)
        counts, near, rng = divergence.cooccurrence(x), divergence.similarity(e), SEED(seed)
        i, j = divergence.met_pairs(counts, rng)
        if classed:  # of one class: all whose users have the same logarithm, rounded down
            popularity = 2 ** np.floor(np.log2(popularity)).astype(int)
        kept, other, found = divergence.matched_negatives(i, j, popularity, divergence.together(counts), rng)
        return divergence.auc(near(i[found], j[found]), near(kept[found], other[found]))

    assert np.mean([auc(seed, False) for seed in range(10)]) == pytest.approx(0.5, abs=0.003)
    assert np.mean([auc(seed, True) for seed in range(10)]) > 0.507
    x, _, e = independent(0, 300, 90)
    found = divergence.measure(e, x)
    assert sentences.place(found["measures"]["auc"]) == 0
    assert found["users_met"] == pytest.approx(found["users_matched"], rel=0.01)
    assert found["matched_share"] == found["matched_pairs"] / found["met_pairs"] > 0.3


def test_ease_s_weights_are_read_by_blocks_and_items_without_choices_left_out():
    x = matrix(4).toarray()
    x[:, [2, 7]] = 0
    b = SEED(1).normal(size=(15, 15))
    e = vectors(4)
    found = divergence.measure(e, csr_matrix(x), lambda: iter([(0, b[:8]), (8, b[8:])]))
    assert found["items"] == 13
    known = [k for k in range(15) if k not in (2, 7)]
    pairs = [(i, j) for n, i in enumerate(known) for j in known[n + 1 :]]
    expected = scipy.stats.spearmanr(
        [float(e[i] @ e[j]) for i, j in pairs], [(b[i, j] + b[j, i]) / 2 for i, j in pairs]
    ).statistic
    assert found["measures"]["ease_any"]["value"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="no two items"):
        divergence.measure(vectors(), csr_matrix(np.eye(15, dtype=np.float32)))
