import numpy as np
import pytest

from rec_r1.evaluate import bootstrap, compare, slices, table


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


def test_coverage():
    """95% intervals of 300 samples of 60: between 90% and 98% hold the true mean (binomial, p < 1e-4 outside)."""
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.random(60)) for _ in range(300)]
    assert 0.90 <= np.mean([i["low"] <= 0.5 <= i["high"] for i in intervals]) <= 0.98


def test_differences_are_paired():
    raw = np.linspace(0, 1, 50)
    result = compare({"raw query": raw, "trained": raw + 0.1}, raw, 0.2)
    for part in ("all", "mismatch"):
        difference = result[part]["trained - raw query"]
        assert difference["mean"] == pytest.approx(0.1) and difference["high"] - difference["low"] < 1e-9
    assert result["mismatch"]["trained"]["n"] == slices(raw, 0.2)["mismatch"].sum() == 10


def test_table_lines_up():
    raw = np.linspace(0, 1, 50)
    lines = table("ndcg@10", "test", compare({"raw query": raw, "trained": raw}, raw, 0.2)).splitlines()
    assert lines[0].startswith("ndcg@10 on test") and "all (n=50)" in lines[0] and "mismatch (n=10)" in lines[0]
    assert lines[-1].startswith("trained - raw query  +0.000 [+0.000, +0.000]")
    assert len(lines) == 5


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


def test_a_difference_is_of_the_same_query():
    rng = np.random.default_rng(6)
    raw = rng.random(200)
    trained = raw + rng.normal(0.02, 0.01, 200)
    rows = compare({"raw query": raw, "untrained": raw, "trained": trained}, raw, 0.2)["all"]
    difference = rows["trained - raw query"]
    assert difference["low"] > 0 and difference == bootstrap(trained - raw)  # paired: 0.02 is clear
    assert rows["trained"]["low"] < rows["raw query"]["high"]  # unpaired intervals overlap
    assert list(rows) == ["raw query", "untrained", "trained", "trained - raw query", "trained - untrained"]


def test_without_a_trained_policy_there_is_no_difference():
    raw = np.linspace(0, 1, 10)
    assert list(compare({"raw query": raw}, raw, 0.2)["all"]) == ["raw query"]


def test_a_score_at_the_threshold_or_unknown_is_no_mismatch():
    got = slices(np.array([0.0, 0.19, 0.2, 1.0, np.nan]), 0.2)
    assert got["all"].tolist() == [True] * 5 and got["mismatch"].tolist() == [True, True, False, False, False]


def test_a_table_with_an_empty_slice():
    raw = np.ones(4)
    lines = table("hit@1", "validation", compare({"raw query": raw, "trained": raw - 0.5}, raw, 0.2)).splitlines()
    assert "mismatch (n=0)" in lines[0] and set(lines[1]) == {"-"}
    assert "1.000 [1.000, 1.000]" in lines[2] and "nan" in lines[2]
    assert lines[4].startswith("trained - raw query") and "-0.500 [-0.500, -0.500]" in lines[4] and len(lines) == 5
