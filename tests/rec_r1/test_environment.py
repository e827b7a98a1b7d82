"""Where indexes lie in the cache, and which recipes share one."""

import pytest
from datasets_ import plain_folder

import retrievers
from rec_r1 import config, tasks
from rec_r1.config import cache_folder
from rec_r1.environment import build_index, cached_index, fit, index_folder, index_folders, open_backend

QUERIES = [retrievers.Query(text) for text in ("party", "red heart", "lecturer")]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REC_R1_CACHE", str(tmp_path / "cache"))


def recipe(kind, params="{}", *settings):
    return config.load("quickstart", [f"retriever.kind={kind}", f"retriever.params={params}", *settings])


def indexes():
    """name -> when each of its files was written, of every index in the cache."""
    folders = (cache_folder() / "indexes").glob("*")
    return {f.name: {p.name: p.stat().st_mtime_ns for p in f.rglob("*")} for f in folders if f.is_dir()}


def kinds():
    return sorted(name.split("-")[1] for name in indexes())


@pytest.mark.slow
def test_bm25_and_hybrids_of_bm25_share_one_index_and_another_parameter_has_its_own():
    alone, task = recipe("bm25"), tasks.load(recipe("bm25").task)
    open_backend(alone, task)
    (name,) = built = indexes()
    assert index_folder(alone, task).name == name
    hybrid = open_backend(recipe("hybrid", "{retrievers: [{kind: bm25}]}"), task)
    nested = "{retrievers: [{kind: bm25, weight: 2}, {kind: hybrid, params: {retrievers: [{kind: bm25, params: {}}]}}]}"
    open_backend(recipe("hybrid", nested), task)
    assert indexes() == built  # neither built again nor written again
    in_memory = retrievers.open("hybrid", task.catalog, retrievers=[{"kind": "bm25"}])
    assert hybrid.search(QUERIES, 5).rows.tolist() == in_memory.search(QUERIES, 5).rows.tolist()
    open_backend(recipe("hybrid", "{retrievers: [{kind: bm25, params: {k1: 2.0}}]}"), task)
    assert len(indexes()) == 2 and indexes()[name] == built[name]
    open_backend(recipe("bm25", "{k1: 2.0}"), task)  # the index that the hybrid has built
    assert len(indexes()) == 2


def test_an_inner_index_of_an_older_version_is_opened_where_it_is():
    given = recipe("hybrid", "{retrievers: [{kind: bm25}]}")
    task = tasks.load(given.task)
    retrievers.open("hybrid", task.catalog, index_folder(given, task), retrievers=[{"kind": "bm25"}])
    before = indexes()
    assert kinds() == ["hybrid"]
    open_backend(given, task)
    assert indexes() == before and index_folders(given, task) == [index_folder(given, task)]


@pytest.mark.slow
def test_a_folder_that_the_user_names_holds_the_inner_indexes(tmp_path):
    given = recipe("hybrid", "{retrievers: [{kind: bm25}]}", f"retriever.index={tmp_path / 'mine'}")
    open_backend(given, tasks.load(given.task))
    assert indexes() == {} and [path.name for path in (tmp_path / "mine").iterdir()] == ["0-bm25"]


@pytest.mark.slow
def test_index_says_what_it_built_and_where():
    given = recipe("hybrid", "{retrievers: [{kind: bm25}, {kind: bm25, params: {k1: 2.0}}]}")
    task = tasks.load(given.task)
    folders = [cached_index(task, "bm25", {}), cached_index(task, "bm25", {"k1": 2.0})]
    (first, _), (second, _) = build_index(given), build_index(given)
    size = f"{sum(p.stat().st_size for f in folders for p in f.rglob('*')) / 1e6:.2f} MB"
    assert "built in" in first and first.endswith(f"{size}, {folders[0]}, {folders[1]}")
    assert second.endswith(f"was there already, {size}, {folders[0]}, {folders[1]}")


@pytest.mark.slow
def test_a_recommender_is_fitted_once_for_itself_and_behind_propagate(tmp_path):
    folder = plain_folder(tmp_path / "shop")
    task = f"task.path={folder}"
    first = fit(config.load("cpu/sequential", [task, "retriever.kind=ease", "retriever.params={}"]))
    built = indexes()
    both = "retriever.params={text: {kind: bm25}, backend: {kind: ease}}"
    second = fit(config.load("cpu/sequential", [task, "retriever.kind=propagate", both]))
    assert second[:2] == first[:2] and first[-1] in second[-2:]  # the same model, in the same folder
    assert len(indexes()) == 2 and indexes().items() > built.items()  # bm25 is the new one
    apart = config.load(
        "cpu/sequential", [task, "retriever.kind=ease", "retriever.params={}", "task.params.fit_share=0.5"]
    )
    fit(apart)  # fitted on other interactions
    assert len(indexes()) == 3
