"""What a tuned encoder forgets: the general set, and verdicts where it is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets_ import plain_folder, write_jsonl, write_lines

from rec_r1 import cli, config, tasks
from rec_r1.config import TaskConfig, UserError
from rec_r1.similarity_gap import claims, general
from retrievers.encoders import lsa
from retrievers.encoders.sentence import Encoder

RECIPE = config.load("cpu/sequential", ["task.path=nowhere"])


def opened(folder, **settings):
    """An open `dense`, as far as it is read here."""
    return SimpleNamespace(encoder=Encoder(str(folder), device="cpu", **settings))


def beir(folder, *names, documents=60):
    write_jsonl(folder / "corpus.jsonl", ({"_id": f"d{n}", "text": f"word{n} thing{n}"} for n in range(documents)))
    write_jsonl(folder / "queries.jsonl", ({"_id": f"q{n}", "text": f"thing{n}"} for n in range(documents)))
    for place, name in enumerate(names):
        own = range(place * 20, place * 20 + 20)
        write_lines(folder / "qrels" / f"{name}.tsv", [f"q{n}\td{n}\t1" for n in own])
    return folder


# ---- The set


def test_the_bundled_set_has_the_queries_of_all_splits():
    found, task = general.load(None), tasks.load(TaskConfig())
    assert found.task.name == "emoji" and len(found.held_out.queries) == sum(map(len, task.splits.values()))
    pairs = zip(found.held_out.queries, found.held_out.targets, strict=True)
    by_text = {query.text: set(targets[targets >= 0].tolist()) for query, targets in pairs}
    for split in task.splits.values():
        assert all(by_text[text] == set(rows) for text, rows in zip(split.queries, split.rows, strict=True))


def test_a_folder_gives_its_test_queries_or_those_of_its_only_file(tmp_path):
    several, one = beir(tmp_path / "a", "dev", "test", "train"), beir(tmp_path / "b", "all")
    assert sorted(general.load(several).held_out.users) == [f"q{n}" for n in range(20, 40)]
    assert sorted(general.load(one).held_out.users) == sorted(f"q{n}" for n in range(20))
    for folder, there in ((beir(tmp_path / "c", "dev", "train"), "dev, train"), (tmp_path / "nothing", "none")):
        with pytest.raises(UserError, match=rf"--general: .*\(there: {there}\).*BEIR's format"):
            general.load(folder)


def test_a_set_that_cannot_be_used_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rec_r1.similarity_gap.measure.open_systems", lambda *_: pytest.fail("opened"))
    folder = plain_folder(tmp_path / "shop")
    arguments = ["similarity-gap", "cpu/sequential", f"task.path={folder}", "-o", str(tmp_path / "out"), "--general"]
    for more, message in (([str(tmp_path)], "needs qrels/test.tsv"), ([str(tmp_path), "--quick"], "leave one of them")):
        assert cli.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


# ---- Before and after


def test_recall_is_that_of_the_embeddings(tmp_path):
    found = general.load(None)
    encoder = opened(lsa.fit(found.task.catalog.texts, tmp_path / "lsa"))
    before, after = general.measure(RECIPE, found, encoder, [encoder])
    assert before.shape == after.shape == (1, 644) and np.array_equal(before, after)
    documents = encoder.encoder.documents(found.task.catalog.texts).astype(np.float32)
    expected = []
    for query, targets in zip(found.held_out.queries, found.held_out.targets, strict=True):
        scores = documents @ encoder.encoder.queries([query.text])[0]
        best, wanted = set(np.argsort(-scores, kind="stable")[:10].tolist()), set(targets[targets >= 0].tolist())
        expected.append(len(best & wanted) / len(wanted) if scores.any() else 0.0)
    # Embeddings that are almost equal may change places.
    assert before.mean() == pytest.approx(np.mean(expected), abs=0.005)


def test_an_encoder_that_forgets_is_found_out(tmp_path):
    found = general.load(beir(tmp_path / "set", "all", "test"))
    knows = opened(lsa.fit(found.task.catalog.texts, tmp_path / "knows"))
    forgot = opened(lsa.fit([f"another thing{n % 3} here" for n in range(30)], tmp_path / "forgot"))
    names = ("e", "e, tuned")
    row, shown = general.tested(found, names, *general.measure(RECIPE, found, knows, [forgot, forgot]), [1, 2])
    assert row["verdict"] == claims.STANDS and row["full"] == 1 and row["reduced"] < 0.5
    assert row["sentence"].startswith("Stands: e, before tuning is ahead of e, tuned in recall@10")
    assert row["sentence"].endswith("on set (20 queries, 2 fits).")
    assert [fit["epochs"] for fit in shown["after"]] == [1, 2] and shown["before"]["mean"] == 1
    same, _ = general.tested(found, names, *general.measure(RECIPE, found, knows, [knows, knows]), [1, 1])
    assert same["verdict"] == claims.RELAXED
    none, shown = general.tested(found, names, *general.measure(RECIPE, found, knows, [knows, knows]), [0, 0])
    assert none["verdict"] == claims.NOT_MEASURED and general.UNCHANGED in none["sentence"] and len(shown["after"]) == 2


def test_a_fit_that_kept_no_epoch_does_not_count(tmp_path):
    found = general.load(beir(tmp_path / "set", "test"))
    before, after = np.ones((1, 20)), np.stack([np.zeros(20), np.ones(20)])
    row, shown = general.tested(found, ("e", "e, tuned"), before, after, [2, 0])
    assert (row["reduced"], row["lead"]["mean"], row["seeds"]) == (0, 1, 1)
    assert [fit["mean"] for fit in shown["after"]] == [0, 1]
