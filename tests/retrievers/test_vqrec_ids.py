"""VQ-Rec with embeddings by id: what they add, which items have one, and how they are saved."""

import numpy as np
import pytest
from vq_data import COLD, EACH, SMALL, TOPICS, Stub, make_catalog, make_interactions, some_queries, stub  # noqa: F401

import retrievers
from retrievers import Catalog, Interactions, Query, RetrieverError
from retrievers.recommenders.id_table import SHARED_ROW
from retrievers.recommenders.vqrec import backend

pytestmark = pytest.mark.slow  # torch and a network: with the real trainings

IDS = SMALL | {"ids": True}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Encoder", Stub)
        folder = tmp_path_factory.mktemp("ids") / "index"
        return retrievers.open("vqrec", make_catalog(), folder, make_interactions(), **IDS, admit_after=4)


def test_an_item_is_the_mean_of_its_codes_and_its_own(fit):
    net, ids = fit.model.net, fit.model.ids
    content = net["content"].weight.detach().numpy().reshape(4, 8, 16)
    codes = fit.model.features.numpy()
    raw = content[np.arange(4), codes].mean(1) + ids.table.weights[ids.rows]
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(fit.model._unit.numpy()[: len(fit)], unit, atol=1e-5)


def test_who_is_chosen_often_has_a_row_and_the_rest_share_one(fit):
    counts, rows = make_interactions().counts, fit.model.ids.rows
    assert (counts < 4).sum() - len(COLD) > 0 and (counts >= 4).any()
    assert np.array_equal(rows == SHARED_ROW, counts < 4) and len(set(rows[counts >= 4])) == (counts >= 4).sum()
    assert fit.report["ids"] == (counts >= 4).sum()
    assert fit.model.ids.table.weights[SHARED_ROW].any()  # It has learned from the rarely chosen items.


def test_cold_documents_are_ranked_by_their_codes(tmp_path):
    made = retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **IDS)
    assert not made.model.ids.vectors("cpu").numpy()[COLD].any()
    queries = [Query(history=(topic * EACH,)) for topic in range(TOPICS)]
    assert (made.ranks(queries, np.array(COLD)[:, None]) > 0).all()


def test_what_texts_do_not_tell_apart_ids_do(tmp_path):
    """All items of a topic have the same text, and all users choose the same item of a topic next."""
    catalog = Catalog.from_records({"id": str(i), "text": f"{i // EACH} 0"} for i in range(TOPICS * EACH))
    rng = np.random.default_rng(0)
    sequences = []
    for _ in range(200):
        topics = (rng.integers(TOPICS) + np.arange(4)) % TOPICS
        sequences.append([int(t * EACH + (rng.integers(EACH) if rng.random() < 0.2 else 5)) for t in topics])
    given = Interactions.from_sequences(
        len(catalog), [s[:-1] for s in sequences], ([s[:-1] for s in sequences], [s[-1] for s in sequences])
    )
    found = {
        ids: retrievers.open("vqrec", catalog, tmp_path / str(ids), given, **SMALL | {"epochs": 15, "ids": ids})
        for ids in (False, True)
    }
    queries = [Query(history=(topic * EACH + 5,)) for topic in range(TOPICS)]
    wanted = np.array([[(topic + 1) % TOPICS * EACH + 5] for topic in range(TOPICS)])
    ranks = {ids: made.ranks(queries, wanted)[:, 0] for ids, made in found.items()}
    assert (ranks[False] >= 6).all() and (ranks[True] <= 2).all(), ranks  # Equal scores are ordered by row.
    best = {ids: max(made.report["ndcg@10"]) for ids, made in found.items()}
    assert best[True] > 1.5 * best[False], best


def test_hashed_ids_share_rows(tmp_path):
    made = retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **IDS, hash_bits=4)
    assert made.report["ids"] == 16 and len(set(made.model.ids.rows)) <= 16
    opened = retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **IDS, hash_bits=4)
    assert np.array_equal(opened.model.scores(some_queries(5)), made.model.scores(some_queries(5)))


def test_the_saved_table_is_the_best_epoch_s_with_its_moments(fit):
    opened = retrievers.open("vqrec", make_catalog(), fit._folder, make_interactions(), **IDS, admit_after=4)
    assert np.array_equal(opened.model.scores(some_queries()), fit.model.scores(some_queries()))
    saved, own = opened.model.ids.table.state(), fit.model.ids.table.state()
    assert set(saved) == set(own) and all(np.array_equal(saved[name], own[name]) for name in own)
    assert saved["updates"].max() > 0 and saved["first"].any() and saved["count"].sum() == len(make_interactions().rows)


def test_two_runs_agree(fit, tmp_path):
    again = retrievers.open("vqrec", make_catalog(), tmp_path / "a", make_interactions(), **IDS, admit_after=4)
    assert np.array_equal(again.model.scores(some_queries()), fit.model.scores(some_queries()))


@pytest.mark.parametrize("how", ["cut", "gone", "another"])
def test_a_damaged_table_is_refused(fit, tmp_path, how):
    folder = tmp_path / "index"
    folder.mkdir()
    for file in fit._folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "ids.npz"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "gone":
        path.unlink()
    else:
        np.savez(path, dim=np.array(3))
    with pytest.raises(RetrieverError, match="is damaged"):
        retrievers.open("vqrec", make_catalog(), folder, make_interactions(), **IDS, admit_after=4)


def test_a_network_of_another_domain_brings_no_ids(fit, tmp_path):
    usual = {"pretrained": str(fit._folder), "epochs": 2, "align_epochs": 1, "learning_rate": 0.01}
    catalog, given = make_catalog(9), make_interactions(seed=5, each=9)
    without = retrievers.open("vqrec", catalog, tmp_path / "without", given, **usual)
    assert without.model.ids is None and not (tmp_path / "without" / "ids.npz").exists()
    own = retrievers.open("vqrec", catalog, tmp_path / "own", given, **usual, ids=True)
    assert len(own.model.ids.rows) == len(catalog) and own.report["ids"] == (given.counts > 0).sum()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"ids": 1}, r"params\.ids must be true or false, got 1"),
        ({"admit_after": 2}, r"params\.admit_after: 2 needs ids: true"),
        ({"hash_bits": 8}, r"params\.hash_bits: 8 needs ids: true"),
        ({"ids": True, "admit_after": 2, "hash_bits": 8}, r"params\.admit_after: 2 needs .* no hash_bits"),
        ({"ids": True, "hash_bits": 31}, r"params\.hash_bits must be null or an integer from 1 to 30, got 31"),
    ],
)
def test_bad_parameters_are_named(tmp_path, params, message):
    with pytest.raises(ValueError, match=r"retriever\." + message):
        retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **SMALL | params)


def test_pretraining_has_no_ids(tmp_path):
    with pytest.raises(ValueError, match=r"params\.ids: domains have no ids in common"):
        backend.pretrain([(make_catalog(), make_interactions())], tmp_path / "none", **IDS)
