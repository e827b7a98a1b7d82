"""Runs' answers on other retrievers: each run read as it was made, whatever order they are named in."""

import dataclasses
import json

import numpy as np
import pytest
from datasets_ import plain_folder
from runs_ import policy

from rec_r1 import config
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.evaluation import records, transfer, transfer_text
from rec_r1.evaluation.evaluate import metric_scorer, save_raw, score_answers
from rec_r1.evaluation.significance import bootstrap, randomisation
from rec_r1.pages import run_report

pytestmark = pytest.mark.usefixtures("fewer_queries")

METRIC = "ndcg@10"


def make_run(folder, answer, *settings, shop=None, untrained=None):
    """A run's folder with ``answer(env, query number)`` for a policy's answers; (recipe, env, answers).

    untrained: the completions of the untrained policy. None = it was not evaluated.
    """
    given = [] if shop is None else [f"task.path={plain_folder(shop)}"]
    name = "quickstart" if shop is None else "cpu/sequential"
    recipe = config.load(name, [f"output_dir={folder}", "evaluation.metrics=[ndcg@10]", *given, *settings])
    env = open_environment(recipe)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(recipe))
    split, scorer = env.task.test, metric_scorer(env.scorer, [METRIC])
    answers = [answer(env, q) for q in range(len(split))]
    save_raw(folder, "test", env, split, scorer)
    for system, written in [("trained", answers), *([("untrained", untrained)] if untrained else [])]:
        records.save(folder, "test", env, split, score_answers(written, split, scorer), system, "policy", "by hand")
    return recipe, env, answers


def cells(result):
    return {(c["system"], c["retriever"]): c for c in result["cells"]}


def target(env, q):
    return env.task.catalog.titles[env.task.test.rows[q][0]]


@pytest.fixture
def shops(tmp_path):
    """Two runs of one task: one writes queries; the other titles, which BM25 looks up, and ranks by histories."""
    shop = tmp_path / "shop"
    one = make_run(tmp_path / "one", target, shop=shop)
    two = make_run(
        tmp_path / "two",
        lambda env, q: f"more: {target(env, q)}",
        *("format.action=edit", "grounding.kind=bm25", "format.prompt=null", "task.params.fit_share=0.5"),
        "retriever={kind: ease, exclude_history: false, params: {regularization: 10.0}}",
        shop=shop,
    )
    return tmp_path, one, two


@pytest.mark.slow
def test_a_run_s_score_does_not_depend_on_the_order(shops):
    tmp_path, _, (recipe, _, answers) = shops
    runs = [tmp_path / "one", tmp_path / "two"]
    on = ["bm25", "itemknn"]
    there, back = (cells(transfer.matrix(order, on, "test")) for order in (runs, runs[::-1]))
    names = {system for system, _ in there if not system.startswith("raw query")}
    assert names == {"trained on bm25 (one)", "trained on ease (two)"}
    for key, cell in there.items():
        if key[0] in names:
            other = dict(back[key])
            assert {k: v for k, v in cell.items() if k != "p_holm"} == {k: v for k, v in other.items() if k != "p_holm"}
    for kind in on:  # what its own environment gives with nothing but the retriever replaced
        asked = dataclasses.replace(recipe, retriever=dataclasses.replace(recipe.retriever, kind=kind, params={}))
        env = open_environment(asked)
        own = score_answers(answers, env.task.test, metric_scorer(env.scorer, [METRIC])).components[METRIC].mean()
        assert there["trained on ease (two)", kind]["mean"] == pytest.approx(own, abs=1e-6)


@pytest.mark.slow
def test_each_run_is_compared_with_the_raw_query_of_its_own_settings(shops):
    """One keeps the history in its rankings and is fitted on half of the choices: its raw query finds other items."""
    tmp_path, *_ = shops
    runs = [tmp_path / "one", tmp_path / "two"]
    result = transfer.matrix(runs, ["bm25", "itemknn"], "test")
    found = cells(result)
    for kind in ("bm25", "itemknn"):
        for name, raw in (("trained on bm25 (one)", "raw query"), ("trained on ease (two)", "raw query of two")):
            mean = found[name, kind]["mean"] - found[raw, kind]["mean"]
            assert found[name, kind]["against_raw"]["mean"] == pytest.approx(mean)
    shown = transfer_text.text(result).splitlines()
    assert [line.split("  ")[0] for line in shown[2:6]] == [
        "raw query", "raw query of two", "trained on bm25 (one)", "trained on ease (two)",
    ]  # fmt: skip


@pytest.mark.slow
def test_policies_that_began_alike_share_a_row_and_each_has_its_lift(tmp_path):
    n = len(open_environment(config.load("quickstart")).task.test)
    before = ["face" if q % 3 else "animal" for q in range(n)]
    make_run(tmp_path / "one", target, untrained=before)
    make_run(tmp_path / "two", lambda env, q: "hand", "retriever.params={k1: 2.0}", untrained=before)
    make_run(tmp_path / "other", target, untrained=["car"] * n)
    on = ["bm25 {k1: 1.5}", "lucene"]
    result = transfer.matrix([tmp_path / "one", tmp_path / "two"], on, "test")
    found = cells(result)
    assert {system for system, _ in found} == {
        "raw query", "untrained", "trained on bm25 (one)", "trained on bm25 (two)"
    }  # fmt: skip
    for kind in on:
        for run in ("one", "two"):
            cell = found[f"trained on bm25 ({run})", kind]
            assert cell["lift"]["mean"] == pytest.approx(cell["mean"] - found["untrained", kind]["mean"], abs=1e-6)
            assert cell["lift"]["low"] < cell["lift"]["mean"] < cell["lift"]["high"]
        assert "lift" not in found["untrained", kind] and "against_raw" not in found["raw query", kind]
    found = cells(transfer.matrix([tmp_path / "one", tmp_path / "other"], on, "test"))
    assert {"untrained on bm25 (one)", "untrained on bm25 (other)"} < {system for system, _ in found}


def test_long_retrievers_are_numbered_above_the_columns():
    cell = {"system": "raw query", "retriever": "bm25", "mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    against = {"mean": -0.1, "low": -0.2, "high": 0.0, "p": 0.01, "p_holm": 0.04}
    lift = {"mean": 0.2, "low": 0.1, "high": 0.3}
    long = "postgres {url: postgresql://user@host/database, mode: vector}"
    trained = {**cell, "system": "trained on bm25", "mean": 0.4, "against_raw": against, "lift": lift}
    result = {"metric": METRIC, "part": "test", "n": 9, "retrievers": ["bm25", long], "cells": [cell, trained]}
    shown = transfer_text.text(result).splitlines()
    assert shown[0].split() == ["ndcg@10", "on", "test", "(n=9)", "[1]", "[2]"]
    assert shown[-2:] == ["[1] bm25", f"[2] {long}"]
    assert [title for title, _ in transfer_text.blocks(result)][1:] == [
        "difference from the raw query", "difference from the untrained policy",
    ]  # fmt: skip
    assert ("trained on bm25", ["−0.100 [−0.200, +0.000]*", ""]) in transfer_text.blocks(result)[1].rows
    short = transfer_text.text({**result, "retrievers": ["bm25", "lucene"], "cells": [cell]})
    assert "[1]" not in short and "untrained" not in short and short.startswith("ndcg@10 on test (n=9)  bm25")
    earlier = {**cell, "system": "trained on bm25", "difference": -0.1, "p": 0.01, "p_holm": 0.04}
    lines = transfer_text.text({**result, "retrievers": ["bm25"], "cells": [cell, earlier]}).splitlines()
    assert len(lines) == 4 and lines[-1].split(" [")[0].split() == ["trained", "on", "bm25", "0.500"]


@pytest.mark.slow
def test_folders_of_one_name_stay_apart(tmp_path):
    make_run(tmp_path / "a" / "run", lambda env, q: "rain")
    make_run(tmp_path / "b" / "run", target)
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    found = cells(transfer.matrix(runs, ["bm25"], "test"))
    assert set(found) == {
        ("raw query", "bm25"), *((f"trained on bm25 ({run})", "bm25") for run in runs)
    }  # fmt: skip
    kept = json.loads((runs[0] / "evaluation/test/transfer.json").read_text())
    assert len(kept["cells"]) == 3
    for given, on, message in (
        ([runs[0], runs[1], runs[0]], ["bm25"], "is given twice"),
        ([runs[0], tmp_path / "b" / ".." / "a" / "run"], ["bm25"], "is given twice"),
        (runs, ["bm25", "lucene", "bm25 {}"], r"--on: bm25 \{\} is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            transfer.matrix(given, on, "test")


@pytest.mark.slow
def test_runs_of_other_queries_are_refused(tmp_path):
    shop = tmp_path / "shop"
    make_run(tmp_path / "one", target, shop=shop)
    make_run(tmp_path / "two", target, "task.params.raw_titles=2", shop=shop)  # the same ids, another raw query
    make_run(tmp_path / "three", target)
    for other in ("two", "three"):
        with pytest.raises(UserError, match="other queries, histories or judgments than that of"):
            transfer.matrix([tmp_path / "one", tmp_path / other], ["bm25"], "test")
    with pytest.raises(UserError, match=r"run rec-r1 eval \S+ --split validation first"):
        transfer.matrix([tmp_path / "one"], ["bm25"], "validation")


def test_completions_for_queries_that_were_edited_since_are_refused(tmp_path, beir_folder):
    given = ["task.name=beir", f"task.path={beir_folder}", f"output_dir={tmp_path / 'run'}"]
    recipe = config.load("quickstart", [*given, "evaluation.metrics=[ndcg@10]"])
    env = open_environment(recipe)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.dump(recipe))
    split = env.task.test
    scored = score_answers(["shoes"] * len(split), split, metric_scorer(env.scorer, [METRIC]))
    records.save(tmp_path / "run", "test", env, split, scored, "trained", "policy", "by hand")
    assert transfer.matrix([tmp_path / "run"], ["bm25"], "test")["n"] == len(split)
    file = beir_folder / "queries.jsonl"
    file.write_text(file.read_text().replace(split.queries[0], "something else"))
    with pytest.raises(UserError, match="trained was evaluated on other queries than those of its config"):
        transfer.matrix([tmp_path / "run"], ["bm25"], "test")


@pytest.mark.slow
def test_one_column_is_one_retriever(tmp_path):
    make_run(tmp_path / "one", lambda env, q: "rain", "retriever.params.k1=2.0")
    make_run(tmp_path / "two", target, "retriever.kind=lucene", "retriever.params={}")
    make_run(tmp_path / "three", target, "retriever.params.k1=0.5")
    both = [tmp_path / "one", tmp_path / "two"]
    there, back = (cells(transfer.matrix(order, ["bm25"], "test")) for order in (both, both[::-1]))
    assert there["raw query", "bm25"] == back["raw query", "bm25"]  # k1 of the run that was trained on it
    with pytest.raises(UserError, match="write out the parameters"):
        transfer.matrix([tmp_path / "one", tmp_path / "three"], ["bm25"], "test")
    transfer.matrix([tmp_path / "one", tmp_path / "three"], ["bm25 {k1: 1.0}"], "test")


def test_parameters_are_read_as_a_recipe_s():
    recipe = transfer.with_retriever(config.load("quickstart"), "ease {regularization: 1e3}")
    assert recipe.retriever.params == {"regularization": 1000.0}


@pytest.mark.slow
def test_the_queries_of_a_user_count_together(tmp_path):
    # With the history in the rankings not every answer is perfect, so that intervals are not a point.
    settings = ["task.params.split=by_user", "task.params.test_share=0.4", "retriever.exclude_history=false"]
    _, env, _ = make_run(tmp_path / "one", target, *settings, shop=tmp_path / "shop")
    users = records.users_of(env.task.test)
    assert 1 < len(set(users)) < len(users)
    found = cells(transfer.matrix([tmp_path / "one"], ["bm25"], "test"))
    rows = records.load_all(tmp_path / "one", "test")
    trained, raw = (rows[name].scores(METRIC) for name in ("trained", "raw query"))
    cell = found["trained on bm25", "bm25"]
    assert cell["against_raw"]["p"] == randomisation(trained - raw, groups=users)
    assert cell["low"] == pytest.approx(bootstrap(trained, groups=users)["low"], abs=1e-6)
    assert not np.isclose(cell["low"], bootstrap(trained)["low"], atol=1e-6)


def test_completions_of_another_step_than_the_best_policy_s_are_not_compared(tmp_path, caplog):
    """The training was resumed, and found a better policy after the evaluation."""
    for name, answer in (("one", target), ("two", lambda env, q: "rain")):
        _, env, _ = make_run(tmp_path / name, answer)
        policy(tmp_path / name / "best", 1.0)
        (tmp_path / name / "best.json").write_text(json.dumps({"step": 20, "metric": METRIC, "value": 0.1}))
        evaluated = score_answers([answer(env, q) for q in range(len(env.task.test))], env.task.test, env.scorer)
        records.save(
            tmp_path / name, "test", env, env.task.test, evaluated, "trained", "policy", "best, step 10", step=10
        )
    folders = {name: tmp_path / name for name in ("one", "two")}
    with pytest.raises(UserError, match=r"one: no evaluation of its test split: run .*rec-r1 eval"):
        transfer.matrix(list(folders.values()), ["bm25"], "test")
    assert run_report._against(folders, "test") is None
    assert "completions are of step 10, and the best policy is of step 20" in caplog.text
