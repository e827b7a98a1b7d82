"""Index folders: an index that is incomplete, damaged or built for something else never opens, and every other does."""

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrievers import Catalog, Query, RetrieverError
from retrievers.core import index_folder
from retrievers.core.index_folder import new_folder
from retrievers.text.bm25 import build, open_index

RECORDS = [{"id": f"d{i}", "text": text} for i, text in enumerate(["party popper", "sad face", "party face face"])]
INDEX_FILES = [
    "index.json",
    "params.index.json",
    "vocab.index.json",
    "data.csc.index.npy",
    "indices.csc.index.npy",
    "indptr.csc.index.npy",
]


@pytest.fixture
def catalog():
    return Catalog.from_records(RECORDS)


@pytest.fixture
def index(catalog, tmp_path):
    build(catalog, tmp_path / "index")
    return tmp_path / "index"


def refused(catalog, index) -> str:
    """The one-line message with which both functions that open an index refuse it."""
    with pytest.raises(RetrieverError) as by_build:
        build(catalog, index)
    with pytest.raises(RetrieverError) as by_open:
        open_index(catalog, index)
    for error in (by_build, by_open):
        message = str(error.value)
        assert message.startswith(f"index {index} ") and "delete the folder" in message and "\n" not in message
    return str(by_open.value)


def test_the_list_of_index_files_is_complete(index):
    assert sorted(path.name for path in index.iterdir()) == sorted(INDEX_FILES)


@pytest.mark.parametrize("name", INDEX_FILES)
@pytest.mark.parametrize("keep", [None, 0.0, 0.5, -1])
def test_a_missing_or_truncated_file_is_refused(catalog, index, name, keep):
    content = (index / name).read_bytes()
    if keep is None:
        (index / name).unlink()
    else:
        (index / name).write_bytes(content[: int(len(content) * keep) if keep >= 0 else keep])
    refused(catalog, index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "built with another format (0 instead of 3)"),
        ({"bm25s": "0.0.1"}, "built with another bm25s ('0.0.1'"),
        ({"kind": "dense"}, "built with another kind"),
        ({"catalog": "f" * 64}, "built with another catalog"),
        ({"documents": 4}, ""),
    ],
)
def test_an_index_of_something_else_is_refused(catalog, index, change, message):
    meta = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(meta | change))
    assert message in refused(catalog, index)


@pytest.mark.parametrize("text", ["[1]", '"bm25"', "{}", '{"kind": "bm25"}'])
def test_json_that_is_no_description_of_an_index_is_refused(catalog, index, text):
    (index / "index.json").write_text(text)
    assert "does not open" in refused(catalog, index)


@pytest.mark.parametrize("params", [{"k9": 1}, {"k1": -1.0}, {"k1": "1.2"}, {"stopwords": "xx"}])
def test_parameters_that_are_none_are_refused(catalog, index, params):
    meta = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(meta | {"params": params}))
    assert "built with another params" in refused(catalog, index)


def test_another_ranking_formula_is_refused(catalog, index):
    params = json.loads((index / "params.index.json").read_text())
    (index / "params.index.json").write_text(json.dumps(params | {"method": "robertson"}))
    assert "is damaged" in refused(catalog, index)


def test_a_vocabulary_of_another_index_is_refused(catalog, index):
    (index / "vocab.index.json").write_text('{"parti": 0, "": 1}')
    assert "is damaged" in refused(catalog, index)


def test_an_index_opens_for_its_catalogue_and_parameters_alone(catalog, tmp_path):
    params = {"k1": 0.9, "stemmer": None}
    built = build(catalog, tmp_path / "index", **params)
    for folder in (tmp_path / "index", str(tmp_path / "index")):
        opened = open_index(catalog, folder, **params)
        assert opened.params == built.params and opened.params.k1 == 0.9
        assert opened.fingerprint == built.fingerprint == build(catalog, None, **params).fingerprint
    with pytest.raises(RetrieverError, match="built with another catalog"):
        open_index(Catalog.from_records(RECORDS[::-1]), tmp_path / "index", **params)
    with pytest.raises(RetrieverError, match="does not open"):
        open_index(catalog, tmp_path / "nowhere", **params)


def test_a_saved_retriever_pickles_as_its_folder_and_notices_another_one_there(catalog, index):
    pickled = pickle.dumps(build(catalog, index))
    assert len(pickled) < 1_000 < len(pickle.dumps(build(catalog)))
    child = pickle.loads(pickled)
    assert child.search([Query("sad")], 1).rows.tolist() == [[1]]
    for path in index.iterdir():
        path.unlink()
    build(Catalog.from_records(RECORDS[::-1]), index)
    with pytest.raises(RetrieverError, match=f"index {index} was replaced"):
        pickle.loads(pickled).search([Query("sad")], 1)


def test_an_index_that_is_there_is_not_computed_again(catalog, index, monkeypatch):
    # The files alone would not show it, because a second build does all the work and is then discarded.
    monkeypatch.setattr("bm25s.BM25.index", lambda *_, **__: pytest.fail("indexed again"))
    assert build(catalog, index).search([Query("sad")], 1).rows.tolist() == [[1]]


def test_a_build_interrupted_at_its_last_file_leaves_nothing(catalog, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", stop)
        for start in (lambda: build(catalog, tmp_path / "index"), lambda: catalog.save(tmp_path / "catalog")):
            with pytest.raises(KeyboardInterrupt):
                start()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(catalog, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "catalog").mkdir()
    assert build(catalog, tmp_path / "index").search([Query("sad")], 1).rows.tolist() == [[1]]
    assert list(catalog.save(tmp_path / "catalog").ids) == ["d0", "d1", "d2"]


def test_a_folder_of_something_else_is_never_written_into(catalog, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    for write in (lambda: build(catalog, tmp_path / "home"), lambda: catalog.save(tmp_path / "home")):
        with pytest.raises(RetrieverError, match="does not open"):
            write()
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_a_catalogue_is_never_taken_for_another(catalog, tmp_path):
    first = catalog.save(tmp_path / "catalog")
    assert catalog.save(tmp_path / "catalog").fingerprint == first.fingerprint
    with pytest.raises(RetrieverError, match="holds 3 other documents"):
        Catalog.from_records(RECORDS[:2]).save(tmp_path / "catalog")
    assert len(Catalog.load(tmp_path / "catalog")) == 3


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_truncated_catalogue_is_refused(catalog, tmp_path, keep):
    catalog.save(tmp_path / "catalog")
    (arrow,) = (tmp_path / "catalog" / "table").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[: int(arrow.stat().st_size * keep)])
    with pytest.raises(RetrieverError, match="does not open"):
        Catalog.load(tmp_path / "catalog")


def test_a_catalogue_that_lost_documents_is_refused(catalog, tmp_path):
    catalog.save(tmp_path / "catalog")
    (tmp_path / "other").mkdir()
    shorter = Catalog.from_records(RECORDS[:2]).save(tmp_path / "shorter")
    (tmp_path / "catalog" / "table").rename(tmp_path / "other" / "table")
    (shorter.folder / "table").rename(tmp_path / "catalog" / "table")
    with pytest.raises(RetrieverError, match="2 documents instead of 3"):
        Catalog.load(tmp_path / "catalog")


def test_other_users_of_a_node_can_read_what_was_saved(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "made") as temporary:
        (temporary / "file").write_text("x")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_when_two_build_at_once_the_first_one_wins(tmp_path):
    with new_folder(tmp_path / "made") as slower:
        (slower / "file").write_text("second")
        with new_folder(tmp_path / "made") as faster:
            (faster / "file").write_text("first")
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_saved_arrays_are_mapped_and_read_only(catalog, index):
    impacts = open_index(catalog, index)._model[1]
    for array in (impacts.data, impacts.rows, impacts.starts):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


BUILDER = """
import sys, time
from retrievers.core.index_folder import new_folder
with new_folder(sys.argv[1]) as temporary:
    (temporary / "half").write_text("built")
    print(temporary, flush=True)
    time.sleep(120)
"""


@pytest.mark.slow
def test_what_killed_builds_left_is_removed_and_running_ones_stay(tmp_path):
    builds = [
        subprocess.Popen([sys.executable, "-c", BUILDER, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("running", "killed")
    ]
    try:
        running, killed = (Path(build.stdout.readline().strip()) for build in builds)
        mine = tmp_path / f".a-file-of-mine.{'0' * 32}"
        mine.mkdir()
        builds[1].kill()
        builds[1].wait()
        with new_folder(tmp_path / "another"):
            assert (running / "half").is_file() and not killed.exists() and mine.is_dir()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"another", running.name, f"{running.name}.lock", mine.name}
    finally:
        for build in builds:
            build.kill()
            build.communicate()


def test_a_leftover_of_an_older_version_is_removed_after_a_day(tmp_path):
    old, young = (tmp_path / f".index.{digit * 32}" for digit in "ab")
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    with new_folder(tmp_path / "index"):
        pass
    assert not old.exists() and young.is_dir()


def test_a_build_that_ends_while_another_looks_for_leftovers_disturbs_nobody(tmp_path, monkeypatch):
    ending = tmp_path / f".index.{'a' * 32}"
    ending.mkdir()
    lock_of = index_folder._lock_of

    def ends(temporary):
        if temporary == ending and ending.exists():
            ending.rmdir()
        return lock_of(temporary)

    monkeypatch.setattr(index_folder, "_lock_of", ends)
    with new_folder(tmp_path / "index") as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "index" / "file").is_file()
