"""`rerank` with `tuned`: the negatives, and fits of a tiny cross-encoder, interrupted, damaged and used again."""

import shutil

import numpy as np
import pytest
import tiny_models
from tuned_data import JUDGMENTS, TEXTS, N, encoder, in_this_process, make_catalog, make_interactions

import retrievers
from retrievers import Interactions, Judgments, Query, RetrieverError
from retrievers.combine.rerank import Params
from retrievers.encoders.cross import PairScorer
from retrievers.encoders.sentence import Encoder
from retrievers.text.tuning import cross_fit, cross_start, job, trainer
from retrievers.text.tuning.cross_job import negatives_of
from retrievers.text.tuning.job_folder import Job
from retrievers.text.tuning.pairs import from_interactions, from_judgments

__all__ = ["encoder", "in_this_process"]  # Fixtures.
M = 10
FIT = {"epochs": 2, "batch_size": 4, "learning_rate": 0.003, "negatives": 3}


@pytest.fixture(scope="module")
def params(encoder, tmp_path_factory):
    """The parameters of `rerank` with a random cross-encoder around a random encoder, which finds all documents."""
    model = tiny_models.cross_encoder(tmp_path_factory.mktemp("cross") / "model")
    inner = {"kind": "dense", "params": {"model": encoder, "device": "cpu"}}
    return {"retriever": inner, "model": str(model), "device": "cpu", "m": M, "tuned": FIT}


# ---- Negatives


@pytest.mark.parametrize("data", [JUDGMENTS, make_interactions(6)])
def test_negatives_are_of_the_first_m_that_are_not_relevant_and_else_random(data):
    judged = isinstance(data, Judgments)
    pairs = from_judgments(data, 2, None, 0) if judged else from_interactions(data, TEXTS, 2, None, 0)
    inner = retrievers.open("bm25", make_catalog())  # It finds nothing for the queries of the judgments.
    found = negatives_of(pairs, inner, N, 3, 4, seed=0)
    assert found.shape == (len(pairs), 4)
    for pair, rows in enumerate(found.tolist()):
        known = pairs.known_of(pair).tolist()
        hits = inner.search([Query(pairs.texts[pairs.query[pair]])], N).rows[0].tolist()
        first = [row for row in hits if row >= 0 and row not in known][:3]
        assert set(first) == set(rows[: len(first)]) and not set(rows) & set(known)
        assert all(0 <= row < N for row in rows)
    assert judged or any(len(set(rows)) == 4 for rows in found.tolist())
    again = negatives_of(pairs, inner, N, 3, 4, seed=0)
    assert again.tolist() == found.tolist() != negatives_of(pairs, inner, N, 3, 4, seed=1).tolist()


def test_a_query_without_any_negative_is_refused():
    pairs = from_judgments(Judgments(N, ["all"], [tuple(range(N))]), 1, None, 0)
    with pytest.raises(ValueError, match=r"tuned: all documents are relevant to one query .*: leave tuned out"):
        negatives_of(pairs, retrievers.open("bm25", make_catalog()), N, 3, 4, seed=0)


# ---- Fits


@pytest.fixture(scope="module")
def fitted(params, tmp_path_factory):
    """A folder with an index that was tuned on interactions by a process of its own."""
    folder = tmp_path_factory.mktemp("fitted")
    return folder, retrievers.open("rerank", make_catalog(), folder, make_interactions(), **params)


@pytest.mark.slow
def test_a_fit_leaves_a_tuned_cross_encoder_and_a_report(fitted, params):
    folder, made = fitted
    report = made.report
    assert report["on"] == "interactions" and report["pairs"] == 90 and report["ran"] == len(report["ndcg@10"]) == 2
    assert (report["steps"], report["batch"]) == (22, 4)
    assert retrievers.fitted_on(made) == {make_interactions().fingerprint} and retrievers.reads_text(made)
    assert list(retrievers.fits(made)) == [("rerank", report)]
    frozen = retrievers.open("rerank", make_catalog(), **{**params, "tuned": None})
    assert retrievers.fitted_on(frozen) == set() and frozen.fingerprint != made.fingerprint
    asked = [Query("garden hose small")]
    ours, theirs = made.search(asked, N), frozen.search(asked, N)
    assert set(ours.rows[0, :M]) == set(theirs.rows[0, :M]) and ours.rows[0, M:].tolist() == theirs.rows[0, M:].tolist()
    assert report["epochs"] == 0 or not np.allclose(
        np.sort(ours.scores[0, :M]), np.sort(theirs.scores[0, :M]), atol=1e-3
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "retriever-dense",
        "retriever-dense.lock",
        "tuned",
        "tuned.lock",
    ]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
def test_the_metric_of_the_report_is_that_of_the_retriever(fitted, params):
    _, made = fitted
    data = make_interactions()
    texts = [retrievers.interactions.raw_query(TEXTS, h, data.raw_titles) for h in data.validation_histories]
    asked = [Query(text, history) for text, history in zip(texts, data.validation_histories, strict=True)]
    inner = retrievers.open("dense", make_catalog(), **params["retriever"]["params"])
    figures = [made.report["before"], *made.report["ndcg@10"]]
    total = 0.0
    for query, target in zip(asked, data.validation_targets, strict=True):
        rows = [row for row in inner.search([query], N).rows[0].tolist() if row not in query.history][:M]
        scores = made._scorer.scores([(query.text, TEXTS[row]) for row in rows])
        order = [rows[place] for place in np.lexsort((rows, -scores))]
        total += 1 / np.log2(2 + order.index(target)) if target in order[:10] else 0
    assert figures[made.report["epochs"]] == pytest.approx(total / len(asked), abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_it_is_opened_again_and_other_data_and_damage_are_refused(fitted, params, tmp_path, monkeypatch):
    folder, made = fitted
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("tuned again"))
    again = retrievers.open("rerank", make_catalog(), folder, make_interactions(), **params)
    assert again.fingerprint == made.fingerprint and again.report == made.report
    with pytest.raises(RetrieverError, match="was built with another encoder"):
        retrievers.open("rerank", make_catalog(), folder, make_interactions(seed=1), **params)
    with pytest.raises(RetrieverError, match="was built with another m"):
        retrievers.open("rerank", make_catalog(), folder, make_interactions(), **{**params, "m": 3})
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tuned" / "encoder" / "tuned_on.json").unlink()
    with pytest.raises(RetrieverError, match=r"is damaged .*tuned encoder.*delete the folder"):
        retrievers.open("rerank", make_catalog(), tmp_path / "copy", make_interactions(), **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_interrupted_fit_continues_and_ends_the_same(params, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "STEPS_BETWEEN_CHECKPOINTS", 7)  # Of 22 steps in an epoch.
    data = make_interactions()
    whole = retrievers.open("rerank", make_catalog(), tmp_path / "whole", data, **params)
    real, calls = cross_fit.measure, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:  # At the end of the second epoch.
            raise KeyboardInterrupt
        return real(*given)

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(cross_fit, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("rerank", make_catalog(), folder, data, **params)
    assert not (folder / "tuned").exists()
    assert trainer.last_checkpoint(folder / ".tuned.tuning" / "checkpoints").name == "checkpoint-42"
    again = retrievers.open("rerank", make_catalog(), folder, data, **params)
    assert again.report == whole.report and again.fingerprint == whole.fingerprint


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_judgments_teach_an_order_and_texts_and_labels_are_those_of_the_pairs(params, tmp_path, monkeypatch):
    seen = []
    real = cross_fit.columns

    def columns(given: Job, places):
        out = real(given, places)
        seen.extend(zip(out["query"], out["document"], out["label"], strict=True))
        return out

    monkeypatch.setattr(cross_fit, "columns", columns)
    taught = Judgments(N, JUDGMENTS.queries, JUDGMENTS.rows)
    tuned = {"epochs": 20, "batch_size": 4, "learning_rate": 0.01, "negatives": 4, "positives": None}
    made = retrievers.open(
        "rerank", make_catalog(), tmp_path / "i", judgments=taught, **{**params, "m": N, "tuned": tuned}
    )
    assert made.report["before"] is None and retrievers.fitted_on(made) == {taught.fingerprint}
    relevant = {(q, TEXTS[row]) for q, rows in zip(taught.queries, taught.rows, strict=True) for row in rows}
    assert len(seen) == 20 * 9 * 5 and {label for *_, label in seen} == {0.0, 1.0}
    assert all(((query, document) in relevant) == (label == 1.0) for query, document, label in seen)
    ranks = made.ranks([Query(q) for q in taught.queries], np.tile(np.arange(N), (3, 1)))
    for rows, own in zip(taught.rows, ranks, strict=True):
        others = np.delete(own, list(rows))
        assert own[list(rows)].mean() < others.mean() - N / 4  # Random orders differ by 0 on average.


# ---- What is refused


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (3, "tuned must be a mapping or null, got 3: write {} for the defaults"),
        ({"hard": 3}, r"tuned\.hard: unknown key: choose from on, epochs, positives, negatives"),
        ({"pairs": 1}, r"tuned\.pairs must be null or an integer >= 2, got 1"),
        ({"negatives": 0}, r"tuned\.negatives must be an integer >= 1, got 0: 4 is usual"),
        (
            {"learning_rate": 0},
            r"tuned\.learning_rate must be a number above 0 and below 1, got 0: 2e-05 is usual",
        ),
        ({"on": "clicks"}, r"tuned\.on: unknown 'clicks': choose interactions, judgments or null"),
    ],
)
def test_a_wrong_value_is_named_with_all_others(tuned, message):
    with pytest.raises(ValueError, match=message) as error:
        Params(tuned=tuned, m=0)
    assert "retriever.params.m must be" in str(error.value)
    with pytest.raises(ValueError, match=message):
        retrievers.check_parameters("hybrid", {"retrievers": [{"kind": "rerank", "params": {"tuned": tuned}}]})


def test_it_is_fitted_itself_and_around_what_is_fitted():
    part = {"kind": "rerank", "params": {"tuned": {}}}
    assert retrievers.fit_data("rerank", {}) == set() and retrievers.index_backends("rerank", {}) == [("bm25", {})]
    assert retrievers.fit_data("rerank", {"tuned": {"on": "judgments"}}) == {"judgments"}
    assert retrievers.fit_data("hybrid", {"retrievers": [part]}) == {"interactions", "judgments"}
    assert retrievers.index_backends("hybrid", {"retrievers": [part]}) == [("rerank", {"tuned": {}}), ("bm25", {})]
    around = {"tuned": {"on": "judgments"}, "retriever": {"kind": "ease"}}
    assert retrievers.fit_data("rerank", around) == {"judgments", "interactions"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "the model is tuned on interactions or judgments, but there are none"),
        ({"interactions": make_interactions(), "judgments": JUDGMENTS}, "choose one of them"),
        ({"judgments": Judgments(N, ["a"], [(0,)])}, "an epoch has 1 pairs"),
        ({"interactions": Interactions.from_sequences(3, [[0, 1]])}, f"3 documents for a catalogue of {N}"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_tuned(data, message, params, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        retrievers.open("rerank", make_catalog(), tmp_path / "index", **data, **params)
    assert not (tmp_path / "index" / "tuned").exists()


@pytest.mark.slow
def test_a_cross_encoder_begins_with_the_weights_of_an_encoder(encoder, tmp_path):
    import torch
    from safetensors.torch import load_file

    given = Encoder(encoder, device="cpu")
    paths = {name: cross_start.save(given, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))}
    a, b, c = (load_file(path / "model.safetensors") for path in paths.values())
    body = given.model.loaded.transformers_model.state_dict()
    for name, value in body.items():
        if "pooler" not in name:
            assert torch.equal(a[f"bert.{name}"], value)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["classifier.weight"], c["classifier.weight"])
    scores = PairScorer(str(paths["a"]), device="cpu").scores([("red shoes", "garden hose"), ("red", "blue")])
    assert np.isfinite(scores).all() and scores[0] != scores[1]
    before = (paths["a"] / "model.safetensors").stat().st_mtime_ns
    assert cross_start.save(given, paths["a"], 5) == paths["a"]
    assert (paths["a"] / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_same_cross_encoder_around_another_retriever(params):
    catalog = make_catalog()
    made = retrievers.open("rerank", catalog, **{**params, "tuned": None})
    inner = {"kind": "bm25"}
    other = retrievers.open("rerank", catalog, **{**params, "tuned": None, "m": 3, "retriever": inner})
    moved = made.around(retrievers.open("bm25", catalog), 3)
    asked = [Query("garden hose small"), Query("red")]
    assert moved.fingerprint == other.fingerprint != made.fingerprint
    assert moved.search(asked, N).rows.tolist() == other.search(asked, N).rows.tolist()
