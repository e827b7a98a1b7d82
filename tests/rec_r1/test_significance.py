"""Intervals and tests against scipy, by simulation under the null, and by their own laws."""

import numpy as np
import pytest
import scipy  # `scipy.stats` is imported when it is used: that takes a second
from hypothesis import given
from hypothesis import strategies as st

from rec_r1.evaluation.significance import bootstrap, holm, randomisation, resampled


def test_the_interval_is_the_normal_one_where_that_holds():
    values = np.random.default_rng(1).normal(0.4, 0.2, 500)
    got = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(500)
    assert got["mean"] == pytest.approx(values.mean()) and got["n"] == 500
    assert got["low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got["high"] == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap(values) == got


def test_nan_queries_are_left_out_and_nothing_stays_nothing():
    assert bootstrap(np.array([1.0, np.nan, 0.0]))["n"] == 2
    empty = bootstrap(np.array([np.nan]))
    assert empty["n"] == 0 and np.isnan(empty["mean"])


@pytest.mark.slow
def test_coverage():
    """95% intervals of 300 samples of 60: between 90% and 98% hold the true mean (binomial, p < 1e-4 outside)."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.random(60)) for _ in range(300)]
    assert 0.90 <= np.mean([i["low"] <= 0.5 <= i["high"] for i in intervals]) <= 0.98


def test_the_mean_is_exact_and_lies_in_its_interval():
    got = bootstrap(np.array([0.0, 0.25, 0.5, 1.0], np.float32))
    assert got["mean"] == 0.4375 and got["low"] < 0.4375 < got["high"] and got["n"] == 4
    same = bootstrap(np.full(7, 0.25))
    assert (same["mean"], same["low"], same["high"]) == (0.25, 0.25, 0.25)


def test_the_seed_alone_decides_the_interval():
    values = np.random.default_rng(3).random(40)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1)["low"] != bootstrap(values, seed=2)["low"]


def test_nan_queries_count_for_nothing():
    values = np.random.default_rng(4).random(30)
    assert bootstrap(np.insert(values, [0, 7, 30], np.nan)) == bootstrap(values)


@pytest.mark.parametrize("values", [np.array([]), np.full(3, np.nan)])
def test_no_query_has_no_interval(values):
    got = bootstrap(values)
    assert got["n"] == 0 and all(np.isnan(got[key]) for key in ("mean", "low", "high"))


def test_a_shift_moves_the_interval_and_nothing_else():
    values = np.random.default_rng(5).random(50)
    got, moved = bootstrap(values), bootstrap(values - 3)
    for key in ("mean", "low", "high"):
        assert moved[key] == pytest.approx(got[key] - 3)


@pytest.mark.parametrize("seed", range(5))
def test_exact_p_is_scipy_s(seed):
    rng = np.random.default_rng(seed)
    differences = np.round(rng.normal(0.1, 0.3, 11), 2)
    differences[3] = 0  # moves no mean
    known = differences[differences != 0]
    expected = scipy.stats.permutation_test((known,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert randomisation(differences) == pytest.approx(expected.pvalue, abs=1e-12)


def test_a_sampled_p_is_never_0():
    """The observed assignment is one of those counted: (1 + hits) / (1 + resamples), Phipson and Smyth 2010."""
    differences = np.full(40, 0.5)  # no random exchange of 40 signs comes near
    assert randomisation(differences, resamples=999) == 1 / 1000


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.05, 0.1])
def test_sampled_p_is_scipy_s_within_the_error_of_sampling(shift):
    differences = np.random.default_rng(1).normal(shift, 0.4, 120)
    how = {"permutation_type": "samples", "n_resamples": 20_000, "rng": 2}
    expected = scipy.stats.permutation_test((differences,), np.sum, **how)
    p = expected.pvalue
    assert randomisation(differences) == pytest.approx(
        p, abs=4 * np.sqrt(p * (1 - p) * (1 / 10_000 + 1 / 20_000)) + 1e-4
    )


def test_bootstrap_interval_is_scipy_s_percentile_interval():
    values = np.random.default_rng(3).exponential(1.0, 80)
    ours = bootstrap(values)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=4)
    theirs = theirs.confidence_interval
    width = ours["high"] - ours["low"]
    assert ours["low"] == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.05 * width)


@pytest.mark.slow
def test_one_null_comparison_in_twenty_is_significant():
    """2,000 comparisons of equal systems on 40 queries, skewed differences with many ties, as ndcg has them."""
    rng = np.random.default_rng(0)
    size = rng.exponential(0.2, (2000, 40)) * (rng.random((2000, 40)) < 0.6)
    differences = size * rng.choice([-1.0, 1.0], size.shape)
    found = sum(randomisation(row, seed, resamples=999) < 0.05 for seed, row in enumerate(differences))
    low, high = scipy.stats.binom.interval(0.999, 2000, 0.05)
    assert low <= found <= high


@pytest.mark.slow
def test_with_users_one_null_comparison_in_twenty_is_significant():
    """As above, where 14 users of 1 to 9 queries each have an effect of their own; query by query it is one in six."""
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(14), [1, 9, 2, 8, 3, 7, 4, 6, 5, 5, 4, 3, 2, 1])
    found = naive = 0
    for seed in range(1000):
        differences = rng.normal(0, 0.3, 14)[users] + rng.normal(0, 0.1, len(users))
        found += randomisation(differences, seed, resamples=499, groups=users) < 0.05
        naive += randomisation(differences, seed, resamples=499) < 0.05
    low, high = scipy.stats.binom.interval(0.999, 1000, 0.05)
    assert low <= found <= high and naive > 150


def test_a_group_a_query_changes_nothing():
    values = np.random.default_rng(6).normal(0.1, 0.3, 50)
    values[[3, 9]] = np.nan
    own = [f"u{q}:1" for q in range(50)]
    assert bootstrap(values, groups=own) == bootstrap(values)
    assert randomisation(values, groups=own) == randomisation(values)
    own[3] = own[0]  # a query without a value counts for nothing
    assert bootstrap(values, groups=own) == bootstrap(values)


def test_groups_are_drawn_and_exchanged_whole():
    rng = np.random.default_rng(7)
    users = np.repeat(np.arange(30), 4)
    values = np.repeat(rng.normal(0.1, 0.3, 30), 4)
    whole = bootstrap(values, groups=users)
    draws = resampled(values[:, None], users)[:, 0]
    assert (whole["low"], whole["high"]) == tuple(np.percentile(draws, [2.5, 97.5])) and whole["n"] == 120
    assert whole["mean"] == bootstrap(values)["mean"]
    # Users of equal size: their sums are the means times 4, and the test is that of the users.
    assert randomisation(values, groups=[f"u{u:02}" for u in users]) == randomisation(values[::4])
    assert randomisation(np.array([0.1, 0.2, -0.3, 0.4]), groups=["a", "a", "a", "b"]) == 1.0  # a's cancel


def test_under_the_null_holm_errs_in_one_table_of_twenty_at_most():
    rng = np.random.default_rng(1)
    tables = rng.random((2000, 8))  # p of eight true null hypotheses each
    wrong = sum(min(holm(table)) < 0.05 for table in tables)
    low, high = scipy.stats.binom.interval(0.999, 2000, 1 - (1 - 0.05 / 8) ** 8)
    assert low <= wrong <= high


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.2]) == [0.2] and holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers(p):
    adjusted = holm(p)
    assert all(p_ <= a <= 1 for p_, a in zip(p, adjusted, strict=True))
    order = np.argsort(p, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=30))
def test_p_does_not_depend_on_sign_order_or_scale(values):
    differences = np.array(values)
    p = randomisation(differences, resamples=200)
    assert 0 < p <= 1
    assert randomisation(-differences, resamples=200) == p == randomisation(differences * 4, resamples=200)
    if not differences.any():
        assert p == 1


def test_queries_without_a_value_count_for_nothing():
    differences = np.random.default_rng(2).normal(0.1, 0.3, 40)
    assert randomisation(np.insert(differences, [0, 9], np.nan)) == randomisation(differences)
    assert randomisation(np.array([np.nan])) == 1.0


@pytest.mark.parametrize("value", [0.63093, 0.1, 1 / 3, 0.0, -0.7])
def test_equal_scores_have_an_interval_of_one_point(value):
    """Sums in another order differ in the last digit, and no figure can draw a bar of negative length."""
    for queries in range(2, 40):
        for groups in (None, [f"u{q // 2}" for q in range(queries)]):
            found = bootstrap(np.full(queries, value), groups=groups)
            assert found["low"] == found["mean"] == found["high"]
