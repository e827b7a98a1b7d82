"""Personas: scores compared with the formula, rankings with brute force, and results that do not depend on a batch."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Interactions, Query, RetrieverError
from retrievers.recommenders.personas.backend import explain

N, COLD = 60, 57  # the last three documents nobody chose
SMALL = {"dim": 8, "epochs": 10, "learning_rate": 0.1, "personas": 3}


@pytest.fixture(scope="module")
def catalog():
    return Catalog.from_records({"id": f"d{i}", "text": f"thing {i}"} for i in range(N))


@pytest.fixture(scope="module")
def interactions():
    """There are three kinds of items, 19 each. A user likes two of the kinds."""
    rng, sequences = np.random.default_rng(0), []
    for _ in range(150):
        kinds = rng.permutation(3)[:2]
        pool = np.concatenate([np.arange(k * 19, k * 19 + 19) for k in kinds])
        sequences.append(rng.permutation(pool)[:12].tolist())
    sequences.append(list(range(COLD)))
    held = ([tuple(s[:8]) for s in sequences[:50]], [s[8] for s in sequences[:50]])
    return Interactions.from_sequences(N, [*(s[:8] for s in sequences[:50]), *sequences[50:]], held)


@pytest.fixture(scope="module")
def fitted(catalog, interactions, tmp_path_factory):
    return retrievers.open("personas", catalog, tmp_path_factory.mktemp("p") / "index", interactions, **SMALL)


histories = st.lists(st.integers(0, N - 1), min_size=1, max_size=8).map(tuple)
signed = histories.flatmap(lambda h: st.tuples(st.just(h), st.tuples(*[st.sampled_from([-1.0, 0.5, 1.0])] * len(h))))
queries = st.one_of(histories.map(lambda h: Query(history=h)), signed.map(lambda x: Query("", *x)))


@pytest.mark.slow
def test_the_score_is_the_formula(fitted):
    model, query = fitted.model, Query(history=(1, 2, 20, 21, 40))
    personas, keys = model.personas(query)
    assert len(personas) == 3
    vectors, bias = model.vectors[:, :-1].astype(float), model.vectors[:, -1]
    projected = vectors @ model._shared["item_key"].T
    logits = keys @ (projected / np.linalg.norm(projected, axis=1, keepdims=True)).T
    attention = np.exp(logits) / np.exp(logits).sum(0)
    expected = (attention * (personas[:, :-1] @ vectors.T)).sum(0) + bias
    assert np.allclose(model.scores([query])[0, :COLD], expected, atol=1e-4)


@pytest.mark.slow
def test_training_and_query_are_one_arithmetic(fitted):
    import torch

    from retrievers.recommenders.personas.model import scores

    user, keys = fitted.model.personas(Query(history=(1, 2, 20, 21, 40)))
    p = {name: torch.from_numpy(array) for name, array in fitted.model._shared.items()}
    alive = torch.ones(1, len(user), dtype=torch.bool)
    theirs = scores(p, torch.from_numpy(user[None, :, :-1]), alive, torch.from_numpy(fitted.model.vectors))
    assert np.allclose(theirs[0].numpy(), fitted.model.blocks.scores(user, keys), atol=1e-4)


@pytest.mark.slow
@given(asked=st.lists(queries, min_size=1, max_size=4), k=st.integers(1, N))
def test_search_agrees_with_ranks(fitted, asked, k):
    hits = fitted.search(asked, k)
    ranks = fitted.ranks(asked, np.tile(np.arange(N), (len(asked), 1)))
    for q in range(len(asked)):
        expected = np.full(k, -1)
        for row, rank in enumerate(ranks[q]):
            if 0 < rank <= k:
                expected[rank - 1] = row
        assert hits.rows[q].tolist() == expected.tolist()


@pytest.mark.slow
@given(asked=st.lists(queries, min_size=2, max_size=6))
def test_a_row_does_not_depend_on_the_batch(fitted, asked):
    together = fitted.model.scores(asked)
    for q, query in enumerate(asked):
        assert (fitted.model.scores([query])[0] == together[q]).all()


@pytest.mark.slow
def test_cold_items_are_not_retrieved_and_say_nothing(fitted):
    scores = fitted.model.scores([Query(history=(1, 20)), Query(history=(1, COLD, 20)), Query(history=(COLD, 58))])
    assert np.isneginf(scores[:, COLD:]).all() and np.isneginf(scores[2]).all()
    assert (scores[0] == scores[1]).all() and np.isfinite(scores[0, :COLD]).all()
    assert (fitted.search([Query("words"), Query(history=(COLD,))], 5).rows == -1).all()
    with pytest.raises(ValueError, match="outside 0 to 59"):
        fitted.search([Query(history=(N,))], 5)
    with pytest.raises(ValueError, match="give one weight per item"):
        fitted.search([Query("", (1, 2), (1.0,))], 5)


@pytest.mark.slow
def test_it_learns_the_kinds_and_a_negative_weight_leads_away(fitted):
    liked = fitted.model.scores([Query(history=(1, 2, 3, 20, 21, 22))])[0, :COLD].reshape(3, 19).mean(1)
    assert min(liked[:2]) > liked[2]
    plain, not_this = fitted.model.scores([Query("", (1, 2, 3), (1, 1, 1)), Query("", (1, 2, 3, 40), (1, 1, 1, -1))])
    assert not_this[40] < plain[40]
    only = fitted.model.scores([Query("", (40,), (-1.0,))])[0]
    assert np.isfinite(only[:COLD]).all()


@pytest.mark.slow
def test_an_explanation_names_items_of_the_history(fitted):
    query = Query("", (1, 2, 20, 21, COLD, 5), (1, 1, 1, 1, 1, -1))
    personas, _ = fitted.model.personas(query)
    scores = fitted.model.scores([query])[0]
    for row in (3, 22, 40):
        found = explain(fitted, query, row)
        assert found.persona == int(np.argmax(found.attention)) and abs(sum(found.attention) - 1) < 1e-5
        assert len(found.attention) == len(personas) and set(found.rows) <= {1, 2, 20, 21} and len(found.rows) == 3
        assert list(found.cosines) == sorted(found.cosines, reverse=True) and found.score == scores[row]
    assert explain(fitted, query, COLD) is None
    with pytest.raises(ValueError, match="outside the catalogue"):
        explain(fitted, query, N)


def child(pickled, asked):
    return pickle.loads(pickled).model.scores(asked)


@pytest.mark.slow
def test_pickles_into_a_spawned_process(fitted, spawned):
    asked = [Query(history=(1, 20, 40)), Query(history=(7,))]
    theirs = spawned.apply(child, (pickle.dumps(fitted), asked))
    assert (theirs == fitted.model.scores(asked)).all()
    assert pickle.loads(pickle.dumps(fitted)).fingerprint == fitted.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
def test_the_same_seed_gives_the_same_scores(catalog, interactions, tmp_path, bits):
    asked = [Query(history=(1, 20, 40))]
    made = [
        retrievers.open("personas", catalog, tmp_path / f"{i}", interactions, **SMALL, seed=seed, hash_bits=bits)
        for i, seed in enumerate((0, 0, 1))
    ]
    scores = [one.model.scores(asked) for one in made]
    assert (scores[0] == scores[1]).all() and (scores[0] != scores[2]).any()
    again = retrievers.open("personas", catalog, tmp_path / "0", interactions, **SMALL, hash_bits=bits)
    assert (again.model.scores(asked) == scores[0]).all() and again.fingerprint == made[0].fingerprint
    if bits:
        assert len(np.unique(made[0].model.vectors, axis=0)) <= 16
    assert {"epoch", "ndcg@10", "loss"} <= set(made[0].report) and made[0].report["items"] == COLD


@pytest.mark.slow
def test_one_persona_is_a_plain_vector(catalog, interactions):
    one = retrievers.open("personas", catalog, None, interactions, dim=8, epochs=1, personas=1)
    user, _ = one.model.personas(Query(history=(1, 20, 40)))
    assert np.allclose(one.model.scores([Query(history=(1, 20, 40))])[0, :COLD], one.model.vectors @ user[0], atol=1e-5)


@pytest.mark.slow
def test_without_validation_and_by_sampled_items_it_trains(catalog, interactions, monkeypatch):
    monkeypatch.setattr("retrievers.recommenders.personas.train.SOFTMAX_ITEMS", 10)
    monkeypatch.setattr("retrievers.recommenders.personas.train.BACKGROUND_ITEMS", 10)
    bare = Interactions(N, interactions.offsets, interactions.rows)
    made = retrievers.open("personas", catalog, None, bare, **SMALL)
    assert made.report["epoch"] == 10 and made.report["ndcg@10"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("personas", 0), ("personas", 2.5), ("personas", True), ("dim", 1), ("steps", -1), ("epochs", 0)),
        *(("hash_bits", 31), ("seed", -1), ("learning_rate", 0), ("learning_rate", "fast")),
    ],
)
def test_bad_parameters_are_named(catalog, interactions, name, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{name} must be .*(from|above).* is usual"):
        retrievers.open("personas", catalog, None, interactions, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table.npz", "model.npz"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_a_damaged_folder_is_refused(catalog, interactions, tmp_path, name, how):
    settings_ = SMALL | {"epochs": 1}
    retrievers.open("personas", catalog, tmp_path / "index", interactions, **settings_)
    path = tmp_path / "index" / name
    whole = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(whole[:200] if how == "cut" else b"")
    with pytest.raises(RetrieverError, match="is damaged"):
        retrievers.open("personas", catalog, tmp_path / "index", interactions, **settings_)


def test_counting_leaves_the_order_of_the_choices_alone():
    made = Interactions.from_sequences(6, [[5, 1, 5, 3], [4, 0]])
    assert made.counts.tolist() == [1, 1, 0, 1, 1, 1]
    assert made.rows.tolist() == [5, 1, 5, 3, 4, 0] and made.offsets.tolist() == [0, 4, 6]
    assert made.fingerprint == Interactions.from_sequences(6, [[5, 1, 5, 3], [4, 0]]).fingerprint
