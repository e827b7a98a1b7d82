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
