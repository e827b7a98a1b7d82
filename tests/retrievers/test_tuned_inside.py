"""An encoder that is tuned on judgments inside `rerank`, `hybrid` and `propagate`, and its folder as a model."""

import shutil

import numpy as np
import pytest
import tiny_models
from tuned_data import JUDGMENTS, N, encoder, make_catalog, make_interactions

import retrievers
from retrievers import Judgments, Query
from retrievers.text.tuning import job, train

__all__ = ["encoder"]  # A fixture.
pytestmark = pytest.mark.slow
TAUGHT = Judgments(N, JUDGMENTS.queries, JUDGMENTS.rows)  # Without validation, so that the last epoch is kept.
QUERIES = [Query(text) for text in TAUGHT.queries]  # No document has these words.


@pytest.fixture(scope="module")
def inside(encoder, tmp_path_factory):
    """A function: a kind and its parameters -> the retriever, whose inner ones have common folders. The fits are
    counted in its attribute `fits`."""
    folder = tmp_path_factory.mktemp("indexes")
    fits = []

    def run(where, device):
        fits.append(where)
        train.run(where)

    def opened(kind, **params):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "_run", run)
            data = make_interactions(), lambda inner, _: folder / inner, TAUGHT
            return retrievers.open(kind, make_catalog(), folder / kind, *data, **params)

    opened.fits = fits
    return opened


@pytest.fixture(scope="module")
def part(encoder):
    """The tuned encoder as an inner retriever."""
    tuned = {"on": "judgments", "epochs": 8, "batch_size": 8, "learning_rate": 0.05}
    return {"kind": "dense", "params": {"model": encoder, "device": "cpu", "tuned": tuned}}


@pytest.fixture(scope="module")
def alone(inside, part):
    return inside("dense", **part["params"])


def check_knows_judgments(made, report):
    assert TAUGHT.fingerprint in retrievers.fitted_on(made) and ("dense", report) in list(retrievers.fits(made))
    assert retrievers.reads_text(made)


def test_a_cross_encoder_orders_what_the_tuned_encoder_finds(inside, part, alone, tmp_path):
    cross = str(tiny_models.cross_encoder(tmp_path / "cross"))
    made = inside("rerank", retriever=part, model=cross, m=4)
    check_knows_judgments(made, alone.report)
    found, inner = made.search(QUERIES, N), alone.search(QUERIES, N)
    for q, rows in enumerate(TAUGHT.rows):
        assert sorted(found.rows[q, :4]) == sorted(inner.rows[q, :4]) and set(rows) <= set(found.rows[q, :4].tolist())
        assert found.rows[q, 4:].tolist() == inner.rows[q, 4:].tolist()
    assert len(inside.fits) == 1


def test_a_fusion_finds_what_only_the_tuned_encoder_finds(inside, part, alone):
    made = inside("hybrid", retrievers=[{"kind": "bm25"}, part])
    check_knows_judgments(made, alone.report)
    # bm25 finds nothing, so that the fused list is that of the encoder.
    assert made.search(QUERIES, N).rows.tolist() == alone.search(QUERIES, N).rows.tolist()
    both = [Query("garden hose wet")]
    lists = [retrievers.open("bm25", make_catalog()).search(both, N).rows[0], alone.search(both, N).rows[0]]
    scores = np.zeros(N)
    for rows in lists:
        for place, row in enumerate(rows[rows >= 0]):
            scores[row] += 1 / (60 + place + 1)
    assert np.allclose(np.sort(scores)[::-1], made.search(both, N).scores[0], atol=1e-6)
    assert len(inside.fits) == 1


def test_a_recommender_is_asked_with_what_the_tuned_encoder_finds(inside, part, alone):
    ease = {"kind": "ease", "params": {"regularization": 1.0}}
    made = inside("propagate", text=part, backend=ease, m=3, mix=1.0)
    check_knows_judgments(made, alone.report)
    assert retrievers.fitted_on(made) == {TAUGHT.fingerprint, make_interactions().fingerprint}
    people = retrievers.open("ease", make_catalog(), None, make_interactions(), regularization=1.0)
    hits = alone.search(QUERIES, 3)
    histories = [
        Query("", tuple(rows[::-1].tolist()), tuple((scores[::-1] / scores.sum()).tolist()))
        for rows, scores in zip(hits.rows, hits.scores, strict=True)
    ]
    ours, theirs = made.search(QUERIES, N), people.search(histories, N)
    assert ours.rows.tolist() == theirs.rows.tolist() and np.allclose(ours.scores, theirs.scores, atol=1e-5)
    assert len(inside.fits) == 1


def test_the_folder_of_a_tuned_encoder_says_what_it_was_tuned_on_wherever_it_lies(alone, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(alone.encoder.model.folder, folder)
    for kind in ("dense", "late"):
        made = retrievers.open(kind, make_catalog(), model=str(folder), device="cpu")
        assert retrievers.fitted_on(made) == {TAUGHT.fingerprint} and list(retrievers.fits(made)) == []
    again = Judgments(N, ["soft"], [(3, 4)])
    tuned = {"epochs": 1, "batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_run", lambda where, device: train.run(where))
        twice = retrievers.open("dense", make_catalog(), judgments=again, model=str(folder), device="cpu", tuned=tuned)
    assert retrievers.fitted_on(twice) == {TAUGHT.fingerprint, again.fingerprint}  # The first one is kept.
