"""Index folders of tantivy: builds that are interrupted, killed or out of space, damaged files, users and processes."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lucene_like import TEXTS, make_catalog

import retrievers
from retrievers import Query, RetrieverError
from retrievers.text import tantivy as module

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tantivy") / "index"
    retrievers.open("tantivy", make_catalog(), folder)
    return folder


def test_nothing_to_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no document holds a single term"):
        retrievers.open("tantivy", make_catalog(["the", "of"]), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    real = module._documents

    def interrupted(*arguments):
        yield next(real(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("tantivy", make_catalog(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    assert ask(tmp_path / "index")[0][0] == 0


def ask(folder) -> list:
    return retrievers.open("tantivy", make_catalog(), folder).search([Query("parties")], 7).rows.tolist()


@pytest.mark.slow
def test_a_forked_process_searches_the_open_index(folder):
    retriever = retrievers.open("tantivy", make_catalog(), folder)
    queries = [Query(text) for text in TEXTS * 8]  # Enough queries for several threads.
    expected = retriever.search(queries, 5).rows.tolist()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(search_rows, (retriever, queries)) == expected


def search_rows(retriever, queries) -> list:
    return retriever.search(queries, 5).rows.tolist()


@pytest.mark.slow
def test_a_build_that_is_killed_leaves_no_index(tmp_path):
    """The process is killed when tantivy has written its files, and before the folder has its name."""
    code = (
        "import time, retrievers\n"
        "from retrievers.text import tantivy as module\n"
        "module._checksums = lambda folder: (print('written', flush=True), time.sleep(100))\n"
        f"catalog = retrievers.Catalog.from_records({[{'id': str(i), 'text': t} for i, t in enumerate(TEXTS)]})\n"
        f"retrievers.open('tantivy', catalog, {str(tmp_path / 'index')!r})\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    left = list(tmp_path.iterdir())
    assert left and not (tmp_path / "index").exists()
    assert ask(tmp_path / "index")[0][0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "truncated", "zeros", "missing", "one bit", "empty"])
def test_a_damaged_index_is_refused(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "index")
    files = sorted((copy / "tantivy").glob("*.idx"))
    if damage == "no meta":
        (copy / "index.json").unlink()
    elif damage == "bad meta":
        (copy / "index.json").write_text('{"kind": ')
    elif damage == "truncated":
        files[0].write_bytes(files[0].read_bytes()[:-1])
    elif damage == "zeros":
        files[0].write_bytes(bytes(files[0].stat().st_size))
    elif damage == "missing":
        files[0].unlink()
    elif damage == "one bit":
        content = bytearray(files[0].read_bytes())
        content[len(content) // 2] ^= 1
        files[0].write_bytes(content)
    else:
        shutil.rmtree(copy / "tantivy")
    with pytest.raises(RetrieverError, match=rf"index {copy} .*delete the folder"):
        retrievers.open("tantivy", make_catalog(), copy)


def test_an_index_of_something_else_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "index")
    with pytest.raises(RetrieverError, match="built with another params"):
        retrievers.open("tantivy", make_catalog(), copy, language="de")
    with pytest.raises(RetrieverError, match="built with another catalog"):
        retrievers.open("tantivy", make_catalog(TEXTS[::-1]), copy)
    pickled = pickle.dumps(retrievers.open("tantivy", make_catalog(), copy))
    shutil.rmtree(copy)
    retrievers.open("tantivy", make_catalog(TEXTS[::-1]), copy)
    with pytest.raises(RetrieverError, match="was replaced while it was in use: start the run again"):
        pickle.loads(pickled).search([Query("sad")], 1)
    meta = json.loads((folder / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(meta | {"tantivy": "0.1"}))
    with pytest.raises(RetrieverError, match=r"built with another tantivy \('0.1'"):
        retrievers.open("tantivy", make_catalog(), copy)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    """A limit on the size of files, which fails like a full disk."""
    catalog = make_catalog([f"party w{i}" for i in range(3_000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left") as error:
            retrievers.open("tantivy", catalog, tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "index") and list(tmp_path.iterdir()) == []


def test_all_users_may_read_an_index_that_all_may_read(folder):
    """tantivy itself writes two of its files for the owner alone."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder / "tantivy").iterdir()}
    assert set(modes.values()) == {(folder / "index.json").stat().st_mode & 0o777}, modes


def test_a_folder_that_cannot_be_written_is_opened_through_links(folder, monkeypatch):
    """As in a cache of several users. The tests may run as root, who may write everything, so the check is replaced."""
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    files = folder / "tantivy"
    with module._writable(files) as links:
        assert links != files and not list(links.glob(".*.lock"))
        expected = {path for path in files.iterdir() if path.suffix != ".lock"}
        assert {path.resolve() for path in links.iterdir()} == expected
    assert ask(folder) == [[0, 2, 3, -1, -1, -1, -1]]


@pytest.mark.slow
def test_a_catalogue_that_does_not_fit_into_a_segment_is_refused(tmp_path, monkeypatch):
    """A second segment would break the order of equal scores. With 15 MB, it is needed after some 100,000 terms."""
    monkeypatch.setattr(module, "MEMORY", 15_000_000)
    texts = [" ".join(f"t{i}x{j}" for j in range(5_000)) for i in range(40)]
    with pytest.raises(RetrieverError, match=r"made \d+ segments of the 40 documents.*choose lucene or bm25"):
        retrievers.open("tantivy", make_catalog(texts), tmp_path / "index", language=None)
    assert list(tmp_path.iterdir()) == []
