"""Ranking metrics against trec_eval and a brute-force reference, and their properties."""

import pickle

import ir_measures
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ir_measures import AP, RR, P, R, Success, nDCG

from rewards import METRICS, Outcome, RankingReward, average_precision, capped_recall, mrr, ndcg, recall

DEPTHS = (1, 5, 10, 100)
EVERY = [(name, {}) for name in METRICS] + [("ndcg", {"gain": "exponential"})]
BAD_KS = [0, -1, 2.0, True, "10", None]


def batch(ranks, grades):
    """Lists of rows -> arrays of the dtypes that the Scorer passes."""
    return np.array(ranks, dtype=np.int32), np.array(grades, dtype=np.float32)


# ---------------------------------------------------------------- parity with other libraries


@pytest.fixture(scope="module")
def rankings():
    """1,000 queries over 150 documents, 1 to 12 judged with grades 0 to 3, some of them not retrieved."""
    rng = np.random.default_rng(0)
    ranks, grades = np.zeros((1000, 12), np.int32), np.zeros((1000, 12), np.float32)
    qrels, run = {}, {}
    for query in range(1000):
        judged = rng.choice(150, size=rng.integers(1, 13), replace=False)
        # Half of the queries rank their targets near the top, so that a small k finds some.
        order = np.argsort(rng.random(150) - np.isin(np.arange(150), judged) * 0.6 * (query % 2))
        ranking = order[: rng.choice([8, 60, 120])]
        grade = rng.integers(0, 4, len(judged))
        grade[0] = max(grade[0], 1)  # the libraries return 0, not NaN, where nothing is relevant
        place = {document: rank for rank, document in enumerate(ranking, start=1)}
        ranks[query, : len(judged)] = [place.get(document, 0) for document in judged]
        grades[query, : len(judged)] = grade
        qrels[f"q{query}"] = {f"d{d}": int(g) for d, g in zip(judged, grade, strict=True)}
        # Strictly descending scores: trec_eval would break ties by document id.
        run[f"q{query}"] = {f"d{d}": float(len(ranking) - i) for i, d in enumerate(ranking)}
    return ranks, grades, qrels, run


def trec_eval(measure, qrels, run):
    values = {value.query_id: value.value for value in ir_measures.pytrec_eval.iter_calc([measure], qrels, run)}
    return np.array([values[query] for query in qrels])


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize(
    ("name", "measure"), [("ndcg", nDCG), ("recall", R), ("precision", P), ("map", AP), ("hit", Success)]
)
def test_parity_with_trec_eval(rankings, name, measure, k):
    ranks, grades, qrels, run = rankings
    ours = METRICS[name](ranks, grades, k)
    assert 0 < ours.mean() <= 1
    np.testing.assert_allclose(ours, trec_eval(measure @ k, qrels, run), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", DEPTHS)
def test_mrr_parity_with_trec_eval_on_the_cut_run(rankings, k):
    # trec_eval's recip_rank has no k, so the run is cut to k.
    ranks, grades, qrels, run = rankings
    cut = {query: dict(list(documents.items())[:k]) for query, documents in run.items()}
    np.testing.assert_allclose(mrr(ranks, grades, k), trec_eval(RR, qrels, cut), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", DEPTHS)
def test_exponential_gain_parity_with_trec_eval(rankings, k):
    # trec_eval takes a grade for its gain, so it is given 2^grade - 1.
    ranks, grades, qrels, run = rankings
    gains = {query: {document: 2**grade - 1 for document, grade in judged.items()} for query, judged in qrels.items()}
    ours = ndcg(ranks, grades, k, gain="exponential")
    np.testing.assert_allclose(ours, trec_eval(nDCG @ k, gains, run), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- a brute force, one row at a time


def brute_force(name, ranks, grades, k, gain="linear"):
    relevant = [(r, g) for r, g in zip(ranks, grades, strict=True) if g > 0]
    found = sorted(r for r, _ in relevant if 1 <= r <= k)
    size = {r: g if gain == "linear" else 2.0**g - 1 for r, g in relevant}
    best = sorted((g if gain == "linear" else 2.0**g - 1 for _, g in relevant), reverse=True)[:k]
    if not relevant:
        return float("nan")
    return {
        "ndcg": lambda: (
            sum(size[r] / np.log2(r + 1) for r in found) / sum(g / np.log2(i + 2) for i, g in enumerate(best))
        ),
        "recall": lambda: len(found) / len(relevant),
        "capped_recall": lambda: len(found) / min(k, len(relevant)),
        "precision": lambda: len(found) / k,
        "mrr": lambda: max((1 / r for r in found), default=0.0),
        "map": lambda: sum(sum(f <= r for f in found) / r for r in found) / len(relevant),
        "hit": lambda: float(len(found) > 0),
    }[name]()


@st.composite
def judged_batches(draw):
    """(ranks, grades) of up to 4 rows and 6 targets, with padding, targets not retrieved and empty rows."""
    rows, targets = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    ranks, grades = np.zeros((rows, targets), np.int32), np.zeros((rows, targets), np.float32)
    for row in range(rows):
        places = draw(st.permutations(range(1, 13)))[:targets]
        for column in range(targets):
            grades[row, column] = draw(st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0, 2.0, 3.0, 9.0]))
            ranks[row, column] = places[column] if draw(st.booleans()) else 0
    return ranks, grades


depths = st.integers(1, 14)


@given(judged=judged_batches(), k=depths)
def test_every_metric_equals_brute_force(judged, k):
    ranks, grades = judged
    for name, params in EVERY:
        ours = METRICS[name](ranks, grades, k, **params)
        expected = [brute_force(name, r, g, k, **params) for r, g in zip(ranks.tolist(), grades.tolist(), strict=True)]
        assert ours.dtype == np.float32
        assert ours.shape == (len(ranks),)
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6, err_msg=name)


# ---------------------------------------------------------------- properties


@given(judged=judged_batches(), k=depths, seed=st.integers(0, 1000))
def test_any_order_of_targets_and_rows_gives_the_same(judged, k, seed):
    ranks, grades = judged
    shuffle = np.random.default_rng(seed).permutation(ranks.shape[1])
    for name, params in EVERY:
        whole = METRICS[name](ranks, grades, k, **params)
        assert np.all(np.isnan(whole) | ((whole >= 0) & (whole <= 1))), name
        assert np.array_equal(np.isnan(whole), ~(grades > 0).any(axis=1)), name
        shuffled = METRICS[name](ranks[:, shuffle], grades[:, shuffle], k, **params)
        np.testing.assert_allclose(shuffled, whole, rtol=1e-6, err_msg=name)
        alone = [METRICS[name](ranks[i : i + 1], grades[i : i + 1], k, **params)[0] for i in range(len(ranks))]
        np.testing.assert_array_equal(np.array(alone, np.float32), whole, err_msg=name)


@given(st.lists(st.sampled_from([0.1, 1.0, 2.0, 5.0]), min_size=1, max_size=8), st.integers(1, 12))
def test_a_perfect_ranking_scores_1(grades, depth):
    count = len(grades)
    ranks = np.empty(count, np.int32)
    ranks[np.argsort(grades)[::-1]] = np.arange(1, count + 1)  # the best grade first
    # precision reaches 1 only where k relevant targets exist, recall and map only where all fit within k
    depths = {"precision": min(depth, count), "recall": max(depth, count), "map": max(depth, count)}
    for name, params in EVERY:
        found = METRICS[name](*batch([ranks], [grades]), depths.get(name, depth), **params)
        np.testing.assert_allclose(found, [1.0], rtol=1e-6, err_msg=name)


def test_ideal_dcg_sorts_the_grades():
    # If the ideal DCG took the dataset's order, 1 before 3, it would be 1 + 3/log2(3) = 2.89, and ndcg 3.63/2.89 > 1.
    ranks, grades = batch([[2, 1]], [[1, 3]])
    assert ndcg(ranks, grades, 10)[0] == pytest.approx(1.0)


def test_ideal_dcg_is_cut_at_k():
    ranks, grades = batch([[1, 0, 0]], [[2, 2, 2]])
    assert ndcg(ranks, grades, 1)[0] == pytest.approx(1.0)
    assert ndcg(ranks, grades, 2)[0] == pytest.approx(1 / (1 + 1 / np.log2(3)))


def test_gains_differ_on_graded_and_agree_on_binary_judgments():
    ranks, grades = batch([[1, 2]], [[1, 3]])
    dcg, ideal = 1 + 7 / np.log2(3), 7 + 1 / np.log2(3)
    assert ndcg(ranks, grades, 10, "exponential")[0] == pytest.approx(dcg / ideal)
    assert ndcg(ranks, grades, 10)[0] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    binary = np.ones_like(grades)
    assert ndcg(ranks + 3, binary, 10)[0] == ndcg(ranks + 3, binary, 10, "exponential")[0]


def test_average_precision_by_hand_with_unsorted_targets():
    ranks, grades = batch([[6, 0, 3, 1]], [[1, 1, 2, 1]])  # precisions 1/1, 2/3, 3/6; four relevant
    assert average_precision(ranks, grades, 10)[0] == pytest.approx((1 + 2 / 3 + 3 / 6) / 4)
    assert average_precision(ranks, grades, 5)[0] == pytest.approx((1 + 2 / 3) / 4)


def test_capped_recall_reaches_1_where_recall_cannot():
    ranks, grades = batch([[1, 2, 3, 4]], [[1, 1, 1, 1]])
    assert capped_recall(ranks, grades, 2)[0] == 1.0
    assert recall(ranks, grades, 2)[0] == 0.5


def test_a_retrieved_target_of_grade_0_counts_for_nothing():
    judged, padded = batch([[2, 1]], [[1, 0]]), batch([[2, 0]], [[1, 0]])
    for name, params in EVERY:
        value = METRICS[name](*judged, 1, **params)
        assert value[0] == METRICS[name](*padded, 1, **params)[0] == 0.0, name


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("k", BAD_KS)
def test_bad_k_is_refused(name, k):
    with pytest.raises(ValueError, match=r"k must be an integer >= 1, got .*: set it to") as caught:
        METRICS[name](*batch([[1]], [[1]]), k)
    assert repr(k) in str(caught.value)


def test_numpy_integer_is_a_k():
    assert recall(*batch([[1]], [[1]]), np.int64(1))[0] == 1.0


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("ranks", "grades", "message"),
    [
        ([[1, 2]], [[1]], r"ranks \(1, 2\) and grades \(1, 1\) must share one shape \(B, T\): pad both"),
        ([1], [1], r"ranks \(1,\) and grades \(1,\) must share one shape"),
        ([[1]], [[-1]], "grades must be finite and >= 0, got -1: use 0"),
        ([[1]], [[np.nan]], "grades must be finite and >= 0, got nan"),
        ([[1]], [[np.inf]], "grades must be finite and >= 0, got inf"),
        ([[-1]], [[1]], "ranks must be integers >= 0, got a negative one: count from 1"),
        ([[1], [4]], [[1, 1], [1, 1]], "must share one shape"),
        ([[1, 2], [4, 4]], [[1, 1], [1, 2]], "row 1 has two relevant targets at rank 4: drop duplicate"),
    ],
)
def test_bad_arrays_are_refused(name, ranks, grades, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](*batch(ranks, grades), 10)


def test_ranks_that_are_not_integers_are_refused():
    with pytest.raises(ValueError, match="ranks must be integers >= 0, got dtype float64"):
        recall(np.array([[1.0]]), np.array([[1.0]]), 10)


def test_not_retrieved_and_irrelevant_targets_may_share_a_rank():
    ranks, grades = batch([[0, 0, 3, 3]], [[1, 1, 1, 0]])
    assert recall(ranks, grades, 10)[0] == pytest.approx(1 / 3)


def test_unknown_gain_is_refused():
    with pytest.raises(ValueError, match="unknown gain 'log': choose from linear, exponential"):
        ndcg(*batch([[1]], [[1]]), 10, gain="log")


def test_exponential_gain_refuses_to_overflow():
    ranks, grades = batch([[1, 3]], [[2000, 1]])
    with pytest.raises(ValueError, match=r"grades of up to 2000 overflow the exponential gain .* rescale"):
        ndcg(ranks, grades, 10, gain="exponential")
    assert 0.99 < ndcg(ranks, grades, 10)[0] <= 1.0
    assert ndcg(*batch([[1, 2]], [[500, 500]]), 10, gain="exponential")[0] == pytest.approx(1.0)


# ---------------------------------------------------------------- RankingReward


def outcome(ranks, grades):
    ranks, grades = batch(ranks, grades)
    return Outcome([""] * len(ranks), [None] * len(ranks), ranks, grades)


@pytest.mark.parametrize("metric", METRICS)
def test_reward_is_its_metric_and_survives_pickling(metric):
    seen = outcome([[3, 1, 0], [0, 0, 0], [0, 0, 0]], [[1, 2, 1], [1, 0, 0], [0, 0, 0]])
    reward = RankingReward(metric, 2)
    values = reward(seen)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, METRICS[metric](seen.ranks, seen.grades, 2))
    assert values[0] > 0
    assert values[1] == 0.0  # malformed, so nothing is retrieved
    assert np.isnan(values[2])  # nothing is relevant
    copy = pickle.loads(pickle.dumps(reward))
    assert copy == reward
    np.testing.assert_array_equal(copy(seen), values)


def test_reward_uses_its_gain():
    seen = outcome([[1, 2]], [[1, 3]])
    exponential = RankingReward("ndcg", 10, gain="exponential")
    assert exponential(seen)[0] == ndcg(seen.ranks, seen.grades, 10, "exponential")[0]
    assert exponential(seen)[0] != RankingReward("ndcg", 10)(seen)[0]


def test_reward_names():
    assert RankingReward("ndcg", 10).__name__ == "ndcg@10"
    assert RankingReward("ndcg", 100).__name__ == "ndcg@100"
    assert RankingReward("ndcg", 10, "exponential").__name__ == "ndcg_exp@10"
    assert RankingReward("capped_recall", 5).__name__ == "capped_recall@5"
    assert RankingReward.__name__ == "RankingReward"


@pytest.mark.parametrize("k", BAD_KS)
def test_reward_refuses_a_bad_k(k):
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        RankingReward("ndcg", k)


def test_reward_refuses_unknown_metric_and_gain():
    with pytest.raises(ValueError, match=r"unknown metric 'ncdg': choose from ndcg, recall, .*hit"):
        RankingReward("ncdg", 10)
    with pytest.raises(ValueError, match="unknown gain 'log': choose from linear, exponential"):
        RankingReward("ndcg", 10, "log")


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "ndcg"])
def test_reward_refuses_a_gain_outside_ndcg(metric):
    with pytest.raises(ValueError, match=f"{metric} has no gain, got 'exponential': remove gain, or use ndcg"):
        RankingReward(metric, 10, "exponential")
