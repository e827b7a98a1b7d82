"""Systems side by side, from their rows."""

import dataclasses
import json

import numpy as np
import pytest

from rec_r1.evaluation import compare, records, tables
from rec_r1.evaluation.records import System
from rec_r1.evaluation.significance import bootstrap, randomisation


def system(name: str, scores, slices=None, query="two words") -> System:
    rows = [
        {
            "query_id": f"q{q}",
            "query": query,
            "slices": {k: v[q] for k, v in (slices or {}).items()},
            "metrics": {"ndcg@10": None if np.isnan(value) else float(value)},
        }
        for q, value in enumerate(scores)
    ]
    return System(name, "policy", f"{name}, greedy", rows, {"malformed": 0.0})


def made(*found: System, reference=None):
    return compare.compare({s.name: s for s in found}, ["ndcg@10"], 0.2, reference)


def row(result, name, slice_="all"):
    (table,) = [t for t in result["tables"] if t["slice"] == slice_]
    return next((c for c in table["comparisons"] if c["against"] == name), None) or next(
        r for r in table["rows"] if r["system"] == name
    )


def test_differences_are_paired():
    rng = np.random.default_rng(6)
    raw = np.clip(rng.random(200), 0, 0.9)
    trained = raw + rng.normal(0.02, 0.01, 200)
    result = made(system("raw query", raw), system("untrained", raw), system("trained", trained))
    against = row(result, "raw query")
    expected = bootstrap(trained - raw)
    assert (against["difference"], against["low"]) == (expected["mean"], expected["low"]) and against["low"] > 0
    assert against["p"] == randomisation(trained - raw) and against["p_holm"] > against["p"]
    assert against["wins"] + against["ties"] + against["losses"] == 200
    assert against["wins"] == (trained > raw).sum()
    means = {r["system"]: r for r in result["tables"][0]["rows"]}
    assert means["trained"]["low"] < means["raw query"]["high"]  # unpaired intervals overlap


def test_holm_goes_over_all_slices_of_a_metric():
    raw = np.linspace(0, 1, 40)
    result = made(system("raw query", raw), system("untrained", raw), system("trained", raw + 0.01))
    comparisons = [c for t in result["tables"] for c in t["comparisons"]]
    assert [t["slice"] for t in result["tables"]] == ["all", "mismatch"] and len(comparisons) == 4
    tested = [c for c in comparisons if c["p"] is not None]
    assert len(tested) == 3
    assert min(c["p"] for c in tested) * 3 == pytest.approx(min(c["p_holm"] for c in tested))


def test_nothing_is_tested_against_the_system_whose_score_chose_the_slice():
    rng = np.random.default_rng(2)
    raw, untrained, trained = rng.random((3, 200))  # three equal systems: raw is low on mismatch by choice alone
    found = system("raw query", raw), system("untrained", untrained), system("trained", trained)
    result = made(*found)
    mismatch = result["tables"][1]
    against_raw, against_untrained = mismatch["comparisons"]
    assert mismatch["slice"] == "mismatch" and against_raw["against"] == "raw query"
    assert against_raw["p"] is None and against_raw["p_holm"] is None and against_raw["low"] > 0.2
    chosen = raw < 0.2
    assert against_untrained["p"] == randomisation((trained - untrained)[chosen])
    assert all(c["p"] is not None for c in result["tables"][0]["comparisons"])
    shown = tables.closing(result, "test")
    assert (
        "None" not in shown
        and "No p against the raw query on mismatch, because these queries were chosen by its score" in shown
    )
    (line,) = [line for line in shown.splitlines() if line.startswith("trained - raw query")]
    assert line.endswith("] –")
    without = made(system("raw query", raw), system("popularity", untrained))
    assert [t["comparisons"][0]["p"] is None for t in without["tables"]] == [False, True]


def of_users(name, scores, each):
    """Sequential rows: user u asks ``each`` queries."""
    found = system(name, scores, {"target": ["warm"] * len(scores)})
    for q, row in enumerate(found.rows):
        row["query_id"] = f"u{q // each}:{q % each + 1}"
    return found


def test_the_queries_of_a_user_count_together():
    rng = np.random.default_rng(3)
    raw = rng.random(120)
    trained = raw + np.repeat(rng.normal(0.05, 0.3, 20), 6)  # a user's queries gain alike
    plain = made(system("raw query", raw), system("trained", trained))
    result = made(of_users("raw query", raw, 6), of_users("trained", trained, 6))
    one, other = (r["tables"][0]["comparisons"][0] for r in (plain, result))
    assert (plain["users"], result["users"]) == (None, 20) and one["difference"] == pytest.approx(other["difference"])
    assert other["high"] - other["low"] > 1.8 * (one["high"] - one["low"]) and other["p"] > 3 * one["p"]
    assert "intervals and p are over 20 users with all their queries" in tables.closing(result, "test")


def test_users_with_one_query_each_change_no_number():
    rng = np.random.default_rng(4)
    raw, trained = rng.random((2, 60))
    plain = made(system("raw query", raw, {"target": ["warm"] * 60}), system("trained", trained))
    assert made(of_users("raw query", raw, 1), of_users("trained", trained, 1))["tables"] == plain["tables"]
    (all_, _) = plain["tables"]
    values = bootstrap(trained)
    assert all_["rows"][1] == {"system": "trained", **values}
    assert all_["comparisons"][0]["p"] == randomisation(trained - raw)


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "better"), (-0.1, "worse"), (0.0, "no difference shown")])
def test_the_verdict_is_about_the_best_of_the_others(gain, verdict):
    rng = np.random.default_rng(0)
    raw, untrained = np.zeros(60), rng.random(60)
    trained = untrained + gain if gain else rng.permutation(untrained)
    best = made(system("raw query", raw), system("untrained", untrained), system("trained", trained))["best_baseline"]
    assert best["system"] == "untrained" and best["verdict"] == verdict


def test_an_upper_bound_has_a_row_and_changes_no_comparison():
    rng = np.random.default_rng(1)
    raw = rng.random(60)
    untrained = np.clip(raw + rng.normal(0.02, 0.1, 60), 0, 1)
    others = system("raw query", raw), system("untrained", untrained), system("trained", untrained + 0.01)
    bound = dataclasses.replace(system("best of 8, upper bound", np.ones(60)), reads_judgments=True)
    without, result = made(*others), made(*others, bound)
    assert result["best_baseline"] == without["best_baseline"] and result["best_baseline"]["system"] == "untrained"
    for before, after in zip(without["tables"], result["tables"], strict=True):
        assert after["comparisons"] == before["comparisons"] and after["rows"][:-1] == before["rows"]
        assert (after["rows"][-1]["system"], after["rows"][-1]["mean"]) == (bound.name, 1.0)
    shown = tables.closing(result, "test")
    assert f"{bound.name}: it reads the judgments, so nothing is compared with it" in shown
    assert "reads the judgments" not in tables.closing(without, "test")
    beside_raw = made(others[0], bound)  # Without a trained policy, too.
    assert [table["comparisons"] for table in beside_raw["tables"]] == [[], []] and beside_raw["best_baseline"] is None
    fair = made(*others, dataclasses.replace(bound, reads_judgments=False))  # The property decides, not the name.
    assert fair["best_baseline"]["system"] == bound.name


def test_a_lucky_mean_is_no_difference():
    raw = np.zeros(60)
    lucky = raw.copy()
    lucky[:3] = 1.0  # three of sixty queries
    best = made(system("raw query", raw), system("trained", lucky))["best_baseline"]
    assert best["difference"] == pytest.approx(0.05) and best["verdict"] == "no difference shown"


def test_a_verdict_needs_an_interval_without_0(monkeypatch):
    """Both tests have to agree: a p below 0.05 alone is not enough."""
    monkeypatch.setattr("rec_r1.evaluation.compare.randomisation", lambda *_, **__: 0.001)
    values = np.tile([1.0, -0.9], 30)
    best = made(system("raw query", np.zeros(60)), system("trained", values))["best_baseline"]
    assert best["p_holm"] < 0.05 and best["low"] < 0 < best["high"]
    assert best["verdict"] == "no difference shown"


def test_without_a_trained_policy_all_are_compared_with_the_raw_query():
    raw = np.linspace(0, 1, 10)
    result = made(system("raw query", raw), system("popularity", raw[::-1].copy()))
    (one,) = result["tables"][0]["comparisons"]
    assert (one["system"], one["against"]) == ("popularity", "raw query") and result["best_baseline"] is None
    alone = made(system("raw query", raw))
    assert alone["tables"][0]["comparisons"] == [] and tables.sentence(alone) == ""


def test_the_length_of_a_query_without_blanks():
    rows = [{"query": query, "slices": {}} for query in ["鞋"] * 5 + ["防水登山鞋男款"] * 5]
    found = {name: chosen.tolist() for name, chosen in compare.more_slices(rows).items()}
    assert found == {"length=1-2": [True] * 5 + [False] * 5, "length=6-10": [False] * 5 + [True] * 5}


def test_slices_of_the_task_and_of_length():
    raw = np.linspace(0, 1, 30)
    labels = {"target": ["cold"] * 6 + ["warm"] * 22 + ["tail"] * 2}
    result = made(system("raw query", raw, labels), system("trained", raw, labels))
    names = {t["slice"]: t["n"] for t in result["tables"]}
    assert names == {"all": 30, "mismatch": 6, "target=warm": 22, "target=cold": 6}  # two tail queries say nothing
    mixed = system("raw query", raw)
    for q, r in enumerate(mixed.rows):
        r["query"] = "one" if q < 10 else "a longer one of seven words, really"
    assert {t["slice"]: t["n"] for t in made(mixed)["tables"]} == {
        "all": 30, "mismatch": 6, "length=6-10": 20, "length=1-2": 10,
    }  # fmt: skip


def test_unknown_values_and_an_empty_slice():
    raw = np.ones(6)
    raw[0] = np.nan
    result = made(system("raw query", raw), system("trained", raw))
    assert [t["slice"] for t in result["tables"]] == ["all"] and row(result, "raw query")["p"] == 1
    assert result["tables"][0]["rows"][0]["n"] == 5


def test_most_changed_queries():
    untrained = np.linspace(0, 1, 40)
    trained = untrained.copy()
    trained[3], trained[5], trained[7] = 1.0, 0.9, 0.0
    changed = made(system("raw query", untrained), system("untrained", untrained), system("trained", trained))[
        "changed"
    ]
    assert changed == {"improved": ["q3", "q5"], "worsened": ["q7"]}


def test_written_comparison_is_strict_json(tmp_path):
    raw = np.ones(6)
    raw[0] = np.nan
    found = {s.name: s for s in (system("raw query", raw), system("trained", raw * 0.5))}
    records.folder_of(tmp_path, "test").mkdir(parents=True)
    result = compare.compare(found, ["ndcg@10"], 0.2)
    compare.write(tmp_path, "test", found, result, {"task": "shop"})
    kept = json.loads((tmp_path / "evaluation" / "test" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert kept["task"] == "shop" and kept["tables"] == json.loads(json.dumps(result["tables"]))
    assert kept["systems"]["trained"]["description"] == "trained, greedy"


def test_tables_line_up_and_end_in_a_sentence():
    rng = np.random.default_rng(1)
    raw = np.sort(rng.random(50))
    result = made(system("trained", np.minimum(1, raw + 0.1)), system("raw query", raw))
    lines = tables.closing(result, "test").splitlines()
    assert lines[0].startswith("ndcg@10 on test") and "all (n=50)" in lines[0] and "mismatch (n=" in lines[0]
    assert set(lines[1]) == {"-"} and lines[2].startswith("trained ") and lines[3].startswith("raw query ")
    assert lines[4].startswith("trained - raw query") and " p<.001" in lines[4]
    assert lines[5].split()[:6] == ["won", "/", "tied", "/", "lost", "against"]
    assert lines[-1].startswith("trained is better than the best of the others (raw query): ndcg@10 +0.")
    columns = [line.index("  ", 1) for line in lines[2:4]]
    assert len({len(line) for line in lines[:1]}) == 1 and columns


def test_a_metric_without_a_value_on_a_slice_is_shown_as_a_dash(tmp_path):
    """A metric of one's own may have no value for a query. comparison.json has null in place of NaN."""
    raw = np.linspace(0, 1, 20)
    some = np.where(raw < 0.2, np.nan, raw)
    named = {"raw query": raw, "untrained": raw, "trained": np.minimum(raw + 0.1, 1)}
    systems = {name: system(name, values) for name, values in named.items()}
    for each in systems.values():
        for row, value in zip(each.rows, some, strict=True):
            row["metrics"]["mine"] = None if np.isnan(value) else value
    result = compare.compare(systems, ["ndcg@10", "mine"], 0.2)
    empty = next(t for t in result["tables"] if t["metric"] == "mine" and t["slice"] == "mismatch")
    assert [c["p"] for c in empty["comparisons"]] == [None, None] and empty["rows"][0]["n"] == 0
    tested = [c for t in result["tables"] if t["metric"] == "mine" for c in t["comparisons"] if c["p"] is not None]
    assert len(tested) == 2  # Holm counts these alone.
    records.folder_of(tmp_path, "test").mkdir(parents=True)
    compare.write(tmp_path, "test", systems, result, {})
    for one in (result, compare.read(tmp_path, "test")):
        shown = tables.closing(one, "test")
        assert "nan" not in shown and "None" not in shown
        assert any(line.split() == ["untrained", *line.split()[1:-1], "–"] for line in shown.splitlines())
        assert shown.count("No p against the raw query on mismatch") == 1
