"""Where a task never asks for an item of the history, nothing ranks one: retrievers, lists, candidates, baselines."""

import dataclasses
import sys
import types

import numpy as np
import pytest
from datasets_ import plain_folder

import retrievers
import rewards
from rec_r1 import cli, config, tasks
from rec_r1.config import FormatConfig
from rec_r1.environment import excludes_history, open_environment, open_retriever
from rec_r1.evaluation import records
from rec_r1.prompts import Format
from rec_r1.scoring import Scorer
from rec_r1.tasks.types import Split, Task
from retrievers import Catalog, Hits


def recipe_of(tmp_path, *more, name="cpu/sequential"):
    return config.load(name, [f"task.path={plain_folder(tmp_path / 'shop')}", f"output_dir={tmp_path / 'out'}", *more])


RETRIEVERS = [
    "{}",
    "{kind: popularity}",
    "{kind: ease, params: {regularization: 10.0}}",
    "{kind: propagate, params: {backend: {kind: itemknn}}}",
    "{kind: hybrid, params: {retrievers: [{kind: bm25}, {kind: itemknn}]}}",
]


@pytest.mark.slow
@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_no_ranking_holds_the_history(tmp_path, retriever):
    env = open_environment(recipe_of(tmp_path, f"retriever={retriever}"))
    for split in env.task.splits.values():
        for rows, history in zip(env.retriever.search(split.raw(), 30).rows, split.histories, strict=True):
            assert not set(rows.tolist()) & set(history)


@pytest.mark.slow
def test_the_recipe_overrules_the_task(tmp_path):
    kept = open_environment(recipe_of(tmp_path, "retriever.exclude_history=false"))
    first = kept.retriever.search(kept.task.test.raw(), 1).rows[:, 0]
    assert all(row in history for row, history in zip(first, kept.task.test.histories, strict=True))  # its own title
    assert not kept.scorer.exclude_history and open_environment(recipe_of(tmp_path)).scorer.exclude_history


def test_a_search_task_is_ranked_as_before(beir_folder):
    recipe = config.load("beir_bm25", [f"task.path={beir_folder}"])
    task = tasks.load(recipe.task)
    bare = dataclasses.replace(recipe, retriever=dataclasses.replace(recipe.retriever, exclude_history=False))
    assert not excludes_history(recipe, task)
    assert open_retriever(recipe, task).fingerprint == open_retriever(bare, task).fingerprint


def test_old_recipes_load():
    for given, expected in (("true", True), ("false", False), ("null", None)):
        assert config.load("quickstart", [f"retriever.exclude_history={given}"]).retriever.exclude_history is expected


@pytest.mark.slow
def test_baselines_and_the_gap_rank_the_same(tmp_path, capsys):
    """`baseline history` and `similarity-gap` print one EASE; popularity leaves the history out, or keeps it."""
    from rec_r1.similarity_gap.measure import measure

    fitted = "retriever={kind: ease, params: {regularization: 10.0}}"
    recipe = recipe_of(tmp_path, fitted, "evaluation.metrics=[ndcg@10]")
    settings = [
        f"task.path={recipe.task.path}",
        f"output_dir={recipe.output_dir}",
        fitted,
        "evaluation.metrics=[ndcg@10]",
    ]
    for name in ("history", "popularity"):
        assert cli.main(["baseline", "cpu/sequential", name, *settings]) == 0
    kept = records.load_all(tmp_path / "out", "test")
    names = {"history": "ease {regularization: 10.0}", "popularity": "popularity"}
    gap = measure(recipe, "test", list(names.values()), ["lsa"])
    rows = {row["system"]: row["metrics"]["ndcg@10"]["mean"] for row in gap["utility"][0]["rows"]}
    for baseline, system in names.items():
        assert kept[baseline].scores("ndcg@10").mean() == pytest.approx(rows[system], abs=1e-6)
    capsys.readouterr()


class Titles:
    """Finds the document that a text names: "thing 3" is row 3."""

    fingerprint = "titles"

    def search(self, queries, k):
        rows = np.array([[int(query.text.split()[1])] for query in queries], np.int32)
        return Hits(rows, np.ones(rows.shape, np.float32))

    def ranks(self, queries, targets):
        raise AssertionError("lists are not searched for")


@pytest.mark.parametrize(("leave_out", "expected", "rank"), [(True, [4, 3], 2), (False, [1, 4, 0, 3], 4)])
def test_a_list_of_titles_leaves_out_the_history_and_moves_up(leave_out, expected, rank):
    parse, reward = Format(FormatConfig(action="items")).parse, rewards.from_spec({"mrr@10": 1.0})
    scorer = Scorer(parse, Titles(), reward, exclude_history=leave_out)
    answer = "\n".join(f"- thing {row}" for row in (1, 4, 0, 3, 4))
    scored = scorer.score([answer], [""], [[3]], [[1.0]], histories=[[0, 1]])
    assert scored.lists == [expected] and scored.outcome.ranks.tolist() == [[rank]]
    assert scorer.score(["- thing 1"], [""], [[3]], [[1.0]], histories=[[0, 1]]).rewards.tolist() == [0.0]


@pytest.mark.slow
def test_candidates_are_none_of_the_history(tmp_path):
    for kind in ("bm25", "itemknn"):
        recipe = recipe_of(tmp_path, f"retriever.kind={kind}", "task.candidates=8", "format.action=ranking")
        task = open_environment(dataclasses.replace(recipe, format=FormatConfig(action="ranking", chat=False))).task
        for split in task.splits.values():
            assert not any(set(c) & set(h) for c, h in zip(split.candidates, split.histories, strict=True))


@pytest.mark.parametrize(("settings", "shown"), [([], (3, 5)), (["retriever.exclude_history=false"], (1, 3, 0, 5))])
def test_a_task_s_own_candidates_are_none_of_the_history(monkeypatch, settings, shown):
    catalog = Catalog.from_records({"id": f"d{n}", "text": f"thing {n}"} for n in range(6))
    one = {"histories": [(0, 1)], "candidates": [(1, 3, 0, 5)]}
    own = types.ModuleType("own_task")
    own.load = lambda _: Task("own", catalog, *(Split([p], ["thing"], [(3,)], [(1.0,)], **one) for p in "abc"))
    monkeypatch.setitem(sys.modules, "own_task", own)
    monkeypatch.setattr(tasks, "find_spec", lambda name: own)
    bare = ["task.name=own_task", "task.params={}", "retriever={kind: bm25}", "format.examples=0", *settings]
    task = open_environment(config.load("cpu/sequential", bare)).task
    assert [split.candidates[0] for split in task.splits.values()] == [shown] * 3
    first = tasks.prompts(task.train, catalog, Format(FormatConfig(action="ranking", chat=False)))[0]
    assert f"1. thing {shown[0]}\n2. thing {shown[1]}\n" in first


def test_a_task_whose_users_choose_twice_says_so(tmp_path, monkeypatch):
    catalog = Catalog.from_records({"id": f"d{n}", "text": f"thing {n}"} for n in range(6))
    split = {
        part: Split([part], ["thing 1"], [(1,)], [(1.0,)], histories=[(0, 1)])
        for part in ("train", "validation", "test")
    }
    module = types.ModuleType("own_task")
    module.load = lambda config: Task("own", catalog, **split, repeats=True)
    monkeypatch.setitem(sys.modules, "own_task", module)
    monkeypatch.setattr(tasks, "find_spec", lambda name: module)
    env = open_environment(config.load("cpu/sequential", ["task.name=own_task", "format.examples=0", "task.params={}"]))
    assert env.retriever.ranks(env.task.test.raw(), np.array([[1]])).tolist() == [[1]]
    assert not isinstance(env.retriever, retrievers.Unseen) and not env.scorer.exclude_history
