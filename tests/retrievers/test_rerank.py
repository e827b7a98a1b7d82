"""Reranking by a cross-encoder: compared with the cross-encoder's score of every pair, and with an inner retriever that
fails."""

import pickle
from functools import cache

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Hits, Interactions, Query, RetrieverError, no_hits
from retrievers.combine.rerank import Params, Rerank
from retrievers.encoders.cross import PairScorer

WORDS = ["party", "face", "sad", "tada", "castle", "runs", "red", "shoe"]
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS[:4]] + ["party face", "", "party"]  # One twice, and one empty.
CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))
N = len(TEXTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.cross_encoder(tmp_path_factory.mktemp("cross") / "model"))


@pytest.fixture(scope="module")
def library(model):
    """A function: a query's text -> the library's own score of each document."""
    from sentence_transformers import CrossEncoder
    from torch.nn import Identity

    encoder = CrossEncoder(model, device="cpu")
    return cache(lambda query: encoder.predict([(query, text) for text in TEXTS], activation_fn=Identity()))


@pytest.fixture(scope="module")
def scorer(model):
    return PairScorer(model, device="cpu")


class Everything:
    """Every document matches. The order is another one for each text, and documents have equal scores."""

    fingerprint = "everything"

    def scores(self, query):
        return np.random.default_rng(len(query.text)).integers(-3, 3, N).astype(np.float32)

    def search(self, queries, k):
        found = [retrievers.top(self.scores(query), k, -np.inf) for query in queries]
        return Hits(*map(np.stack, zip(*found, strict=True))) if found else no_hits(0, min(k, N))

    def ranks(self, queries, targets):
        return np.stack([
            retrievers.rank(self.scores(query), rows, -np.inf) for query, rows in zip(queries, targets, strict=True)
        ])  # fmt: skip


INNER = [Everything(), retrievers.open("bm25", CATALOG)]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join), min_size=1, max_size=4),
    st.integers(1, N + 3), st.integers(1, N), st.sampled_from(INNER),
)  # fmt: skip
def test_the_order_is_that_of_brute_force(library, scorer, texts, m, k, inner):
    queries = [Query(text) for text in texts]
    made = Rerank(inner, CATALOG, scorer, m)
    whole, part = made.search(queries, N), made.search(queries, k)
    assert part.rows.tolist() == whole.rows[:, :k].tolist() and part.scores.tolist() == whole.scores[:, :k].tolist()
    ranks = made.ranks(queries, np.tile(np.arange(-1, N), (len(queries), 1)))
    assert (ranks[:, 0] == 0).all()
    theirs = inner.search(queries, N).rows
    for q, text in enumerate(texts):
        found = theirs[q][theirs[q] >= 0].tolist()
        head, tail = found[:m], found[m:]
        order = whole.rows[q].tolist()
        assert order[len(head) :] == tail + [-1] * (N - len(found))
        assert sorted(order[: len(head)]) == sorted(head)
        if not text:
            assert order == theirs[q].tolist()  # Without a text, the inner order stays.
        else:
            scores = library(text)[order[: len(head)]]
            assert np.allclose(whole.scores[q, : len(head)], scores, atol=1e-4)
            assert (np.diff(scores) < 1e-4).all()
        own = whole.scores[q, : len(found)]
        pairs = list(zip((-own).tolist(), order, strict=False))
        assert pairs == sorted(pairs)  # Of equal scores, the smaller row comes first.
        assert ranks[q, 1:].tolist() == [order.index(row) + 1 if row in order else 0 for row in range(N)]


@pytest.mark.slow
def test_a_target_behind_the_first_m_keeps_its_inner_rank(scorer):
    made = Rerank(INNER[0], CATALOG, scorer, 4)
    queries = [Query("red shoe"), Query("sad")]
    before = INNER[0].ranks(queries, np.tile(np.arange(N), (2, 1)))
    after = made.ranks(queries, np.tile(np.arange(N), (2, 1)))
    assert (after[before > 4] == before[before > 4]).all()
    assert sorted(after[before <= 4].tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert (after != before).any()
    assert made.ranks(queries, np.tile(np.arange(N, dtype=np.uint16), (2, 1))).tolist() == after.tolist()


@pytest.mark.slow
def test_documents_with_the_same_text_tie_and_are_ordered_by_row(scorer):
    same = [row for row, text in enumerate(TEXTS) if text == "party face"]
    assert len(same) == 2
    hits = Rerank(INNER[0], CATALOG, scorer, N).search([Query("castle")], N)
    places = [hits.rows[0].tolist().index(row) for row in same]
    assert places[1] == places[0] + 1 and hits.scores[0, places[0]] == hits.scores[0, places[1]]


@pytest.mark.slow
def test_a_pair_is_scored_once(model, monkeypatch):
    scorer = PairScorer(model, device="cpu")
    scorer.load()
    predict, asked = scorer.model.loaded.predict, []
    monkeypatch.setattr(
        scorer.model.loaded, "predict", lambda pairs, **how: asked.append(pairs) or predict(pairs, **how)
    )
    made = Rerank(INNER[0], CATALOG, scorer, 5)
    queries = [Query("red"), Query("sad face"), Query("red"), Query("")]
    first = made.search(queries, 9)
    assert len(asked) == 1 and len(asked[0]) == len(set(asked[0])) <= 10  # One call for all queries.
    assert made.search(queries[::-1], 9).scores[::-1].tolist() == first.scores.tolist() and len(asked) == 1
    made.ranks(queries[:1], np.array([[0]]))
    assert len(asked) == 1
    made.search([Query("another")], 1)
    assert len(asked) == 2


class Failing(Everything):
    """A server that is down for all queries, or for those with the word sad."""

    def __init__(self, where):
        self.where = where

    def search(self, queries, k):
        if self.where == "search":
            raise ConnectionError("refused")
        return super().search(queries, k)

    def ranks(self, queries, targets):
        if self.where == "ranks":
            raise TimeoutError("too slow")
        ranks = super().ranks(queries, targets)
        ranks[["sad" in query.text for query in queries]] = -1
        return ranks


@pytest.mark.slow
def test_an_outage_of_the_inner_retriever_stays_one(scorer):
    queries, targets = [Query("sad"), Query("red")], np.tile(np.arange(N), (2, 1))
    for where, error in (("search", ConnectionError), ("ranks", TimeoutError)):
        with pytest.raises(error):
            Rerank(Failing(where), CATALOG, scorer, 3).ranks(queries, targets)
    ranks = Rerank(Failing("some"), CATALOG, scorer, 3).ranks(queries, targets)
    assert (ranks[0] == -1).all()  # Also of targets within the first m, as the contract says.
    assert ranks[1].tolist() == Rerank(INNER[0], CATALOG, scorer, 3).ranks(queries, targets)[1].tolist()


@pytest.mark.slow
def test_a_target_that_an_approximate_search_misses_comes_behind_the_first_m(scorer):
    class Approximate(Everything):
        def search(self, queries, k):
            hits = super().search(queries, min(k + 1, N))
            return Hits(hits.rows[:, 1:], hits.scores[:, 1:])  # It misses the best document.

    query = [Query("red")]
    best = int(Everything().search(query, 1).rows[0, 0])
    assert Rerank(Approximate(), CATALOG, scorer, 3).ranks(query, np.array([[best]])).tolist() == [[4]]


class Missing(Everything):
    """A search that is approximate misses some documents, which are others for each text. Its ranks are exact."""

    def search(self, queries, k):
        hits = super().search(queries, N)
        out = no_hits(len(queries), min(k, N))
        for q, query in enumerate(queries):
            rng = np.random.default_rng(len(query.text))
            kept = np.sort(rng.choice(N, N - int(rng.integers(1, 9)), replace=False))[: out.rows.shape[1]]
            out.rows[q, : len(kept)], out.scores[q, : len(kept)] = hits.rows[q, kept], hits.scores[q, kept]
        return out


@pytest.mark.slow
def test_behind_the_first_m_of_an_approximate_search_is_the_exact_order_of_all_others(scorer):
    queries, inner = [Query(text) for text in ("red", "sad face", "tada", "a castle runs", "shoe")], Missing()
    whole = Everything().search(queries, N).rows.tolist()
    moved = 0
    for m in (1, 4, 11, N - 2, N):
        made = Rerank(inner, CATALOG, scorer, m)
        heads = made.search(queries, m).rows.tolist()
        ranks = made.ranks(queries, np.tile(np.arange(N), (len(queries), 1)))
        for head, others, found in zip(heads, whole, ranks.tolist(), strict=True):
            order = [row for row in head if row >= 0]
            order += [row for row in others if row not in order]
            assert found == [order.index(row) + 1 for row in range(N)]
            moved += order[m:] != others[m:]
    assert moved > 5


@pytest.mark.slow
def test_it_reads_the_text_also_around_a_recommender(model):
    choices = Interactions.from_sequences(N, [[0, 1, 2], [1, 2, 3], [2, 5]])
    part = {"kind": "ease", "params": {"regularization": 1.0}}
    made = retrievers.open("rerank", CATALOG, None, choices, retriever=part, model=model, m=3)
    ease = retrievers.open("ease", CATALOG, None, choices, regularization=1.0)
    assert retrievers.reads_text(made) and not retrievers.reads_text(ease)
    assert retrievers.fitted_on(made) == {choices.fingerprint} and len(list(retrievers.fits(made))) == 1
    assert retrievers.takes_interactions("rerank", {"retriever": part})
    asked = [Query("", (1,)), Query("red shoe", (1,))]
    ours, theirs = made.search(asked, 4), ease.search(asked, 4)
    assert ours.rows[0].tolist() == theirs.rows[0].tolist() and ours.scores[0].tolist() == theirs.scores[0].tolist()
    assert set(ours.rows[1, :3]) == set(theirs.rows[1, :3]) and ours.scores[1].tolist() != theirs.scores[1].tolist()


@pytest.mark.slow
def test_it_nests(model):
    inner = {"kind": "rerank", "params": {"model": model, "m": 8}}
    cascade = retrievers.open("rerank", CATALOG, retriever=inner, model=model, m=2)
    fused = retrievers.open("hybrid", CATALOG, retrievers=[inner, {"kind": "bm25"}])
    for made in (cascade, fused):
        hits = made.search([Query("party face")], 5)
        assert made.ranks([Query("party face")], hits.rows)[0].tolist() == [1, 2, 3, 4, 5]
    assert retrievers.index_backends("rerank", {"retriever": inner}) == [("bm25", {})]


@pytest.mark.slow
def test_the_fingerprint_follows_the_inner_retriever_the_model_and_m(model, tmp_path):
    other = str(tiny_models.cross_encoder(tmp_path / "model", seed=1))
    several = [
        {}, {"m": 3}, {"model": other}, {"max_length": 16}, {"retriever": {"kind": "bm25", "params": {"k1": 2.0}}},
    ]  # fmt: skip
    made = [retrievers.open("rerank", CATALOG, **{"model": model} | params) for params in several]
    assert len({one.fingerprint for one in made}) == len(several)
    assert pickle.loads(pickle.dumps(made[0])).fingerprint == made[0].fingerprint
    same = retrievers.open("rerank", CATALOG, model=model, batch_size=2, device="cpu")
    assert same.fingerprint == made[0].fingerprint


@pytest.mark.slow
def test_other_files_in_the_same_folder_are_another_model(tmp_path):
    folder = str(tiny_models.cross_encoder(tmp_path / "model"))
    before = retrievers.open("rerank", CATALOG, model=folder).search([Query("party face")], 3)
    tiny_models.cross_encoder(tmp_path / "model", seed=1)
    after = retrievers.open("rerank", CATALOG, model=folder).search([Query("party face")], 3)
    assert before.scores.tolist() != after.scores.tolist()


def test_all_mistakes_are_named_at_once():
    wrong = {"retriever": "bm25", "m": 0, "model": "", "batch_size": 0, "max_length": 2, "device": "gpu"}
    with pytest.raises(ValueError, match="must be a mapping with a kind") as error:
        Params(**wrong)
    assert all(f"retriever.params.{name}" in str(error.value) for name in wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"retriever": {"kind": "bm52"}}, ValueError, "did you mean 'bm25'"),
        ({"retriever": {"kind": "bm25", "params": {"k2": 1}}}, ValueError, "choose from k1, b"),
        ({"retriever": {"kind": "bm25", "k1": 1}}, ValueError, r"params\.retriever: unknown key 'k1'"),
        ({"max_length": 4_000}, ValueError, r"max_length: 4000: .* reads at most 128 tokens: set 128 or less"),
        ({"model": "nobody/no-such-model"}, RetrieverError, "neither a folder nor found on the hub"),
        ({"model": "all-minilm-l6-v2"}, RetrieverError, r"no cross-encoder \(BertModel\): take one, such as cross-enc"),
    ],
)
def test_mistakes_are_named(model, params, error, message):
    with pytest.raises(error, match=message):
        retrievers.open("rerank", CATALOG, **{"model": model} | params)


@pytest.mark.slow
def test_a_model_with_several_scores_or_a_pickle_is_refused(tmp_path):
    several = tiny_models.cross_encoder(tmp_path / "several", labels=3)
    with pytest.raises(RetrieverError, match="has 3 scores for each pair, and a ranking needs one"):
        retrievers.open("rerank", CATALOG, model=str(several))
    (several / "model.safetensors").rename(several / "pytorch_model.bin")
    with pytest.raises(RetrieverError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        retrievers.open("rerank", CATALOG, model=str(several))


@pytest.mark.slow
def test_damaged_weights_and_a_missing_tokenizer_are_refused(tmp_path):
    folder = tiny_models.cross_encoder(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RetrieverError, match=r"damaged does not load \(.*header.*\): check its files"):
        retrievers.open("rerank", CATALOG, model=str(folder))
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(RetrieverError, match=r"damaged has no tokenizer \(tokenizer\.json"):
        retrievers.open("rerank", CATALOG, model=str(folder))


@pytest.mark.slow
def test_scores_that_are_no_numbers_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_models.cross_encoder(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] += float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RetrieverError, match="scores that are not finite: take another model"):
        retrievers.open("rerank", CATALOG, model=str(folder)).search([Query("party")], 3)


@pytest.mark.slow
def test_a_cross_encoder_is_loaded_whole(zero3, tmp_path):
    folder = tiny_models.cross_encoder(tmp_path / "model")
    made = pickle.loads(pickle.dumps(retrievers.open("rerank", CATALOG, model=str(folder))))
    assert np.isfinite(made.search([Query("party")], 3).scores).all() and zero3()
