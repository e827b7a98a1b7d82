"""VQ-Rec: its codes and its network, with a stub as the encoder. test_vqrec_encoder.py tests it with a real encoder."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from vq_data import COLD, DIMENSIONS, EACH, SMALL, TOPICS, Stub, make_catalog, make_interactions, some_queries, stub  # noqa: F401

import retrievers
from retrievers import Interactions, Query, RetrieverError
from retrievers.recommenders.next_item import Batch, Windows, seeded
from retrievers.recommenders.transformer import encode
from retrievers.recommenders.vqrec import backend
from retrievers.recommenders.vqrec import codes as vq_codes


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """A model with the parameters of most tests, fitted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Encoder", Stub)
        folder = tmp_path_factory.mktemp("vqrec") / "index"
        return retrievers.open("vqrec", make_catalog(), folder, make_interactions(), **SMALL)


@pytest.mark.slow
def test_codes_are_deterministic_and_near_texts_share_them():
    vectors = Stub().documents(make_catalog().texts).astype(np.float32)
    book = vq_codes.learn(vectors, 4, 3)
    again = vq_codes.learn(vectors, 4, 3)
    assert np.array_equal(book.rotation, again.rotation) and np.array_equal(book.centroids, again.centroids)
    assert np.allclose(book.rotation @ book.rotation.T, np.eye(DIMENSIONS), atol=1e-5)
    codes = vq_codes.assign(book, vectors)
    assert codes.shape == (len(vectors), 4) and codes.dtype == np.uint8 and codes.max() < 8
    assert np.array_equal(vq_codes.assign(book, vectors[5:50]), codes[5:50])
    # The nearest centroid, by brute force.
    pieces = (vectors @ book.rotation.T).reshape(-1, 4, 1, 4)
    assert (((pieces - book.centroids) ** 2).sum(3).argmin(2) == codes).mean() > 0.99
    agree = (codes[:, None] == codes[None]).mean(2)
    same = np.arange(len(codes)) // EACH
    assert agree[same[:, None] == same].mean() > 2 * agree[same[:, None] != same].mean()


@pytest.mark.slow
def test_fewer_documents_than_centroids_or_dimensions():
    vectors = np.random.default_rng(0).normal(size=(3, DIMENSIONS)).astype(np.float32)
    assert vq_codes.learn(vectors, 4, 3).centroids.shape == (4, 8, 4)
    assert [vq_codes.bits_for(n) for n in (1, 39 * 32, 39 * 256, 10**7)] == [2, 5, 8, 8]


@pytest.mark.slow
def test_cold_documents_are_encoded_with_the_codebook_of_the_others_and_found(fit):
    vectors = Stub().documents(make_catalog().texts)
    warm = np.flatnonzero(make_interactions().counts > 0)
    assert not np.isin(COLD, warm).any() and len(warm) > 80
    codes = vq_codes.assign(vq_codes.learn(vectors[warm], 4, 3), vectors)
    assert np.array_equal(codes, np.load(fit._folder / "codes.npy"))
    # For two items of a topic, its cold item ranks better than at random.
    queries = [Query(history=(t * EACH, t * EACH + 1)) for t in range(TOPICS)]
    ranks = fit.ranks(queries, np.array(COLD)[:, None])
    assert (ranks > 0).all() and np.median(ranks) < TOPICS * EACH / 3


@pytest.mark.slow
def test_it_learns(fit):
    report = fit.report
    assert 1.2 * report["before"] < max(report["ndcg@10"]) and report["epochs"] >= 1 and report["cold"] >= len(COLD)


@pytest.mark.slow
def test_the_table_does_not_grow_with_the_catalogue(fit, tmp_path):
    larger = retrievers.open(
        "vqrec", make_catalog(40), tmp_path / "i", make_interactions(each=40), **SMALL | {"epochs": 0}
    )
    sizes = [sum(p.numel() for p in r.model.net.parameters()) for r in (fit, larger)]
    assert sizes[0] == sizes[1] and larger.model.net["content"].weight.shape == (4 * 8, 16)


@pytest.mark.slow
def test_search_and_ranks_agree_and_every_document_is_a_hit(fit):
    queries = [*some_queries(12), Query()]
    n = len(fit)
    hits = fit.search(queries, n)
    ranks = fit.ranks(queries, np.broadcast_to(np.arange(n), (len(queries), n)))
    for q, query in enumerate(queries):
        if not any(query.weights or query.history):
            assert (hits.rows[q] == -1).all() and (ranks[q] == 0).all()
        else:
            assert sorted(hits.rows[q].tolist()) == list(range(n))
            assert np.array_equal(ranks[q][hits.rows[q]], np.arange(1, n + 1))


@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(fit):
    queries = some_queries()
    whole = fit.model.scores(queries)
    assert whole.shape == (70, len(fit)) and whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(70)
    assert np.array_equal(fit.model.scores([queries[q] for q in order]), whole[order])
    for q in range(0, 70, 7):
        assert np.array_equal(fit.model.scores([queries[q]])[0], whole[q])


@pytest.mark.slow
def test_weights(fit):
    def scores(history, weights=()):
        return fit.model.scores([Query(history=history, weights=weights)])[0]

    assert np.array_equal(scores((1, 20)), scores((1, 20), (1.0, 1.0)))
    assert np.array_equal(scores((1, 20, 50), (1.0, 1.0, 0.0)), scores((1, 20)))
    unit = fit.model._unit.numpy()[: len(fit)]
    less = scores((1, 20, 50, 60), (1.0, 1.0, -0.5, -1.0))
    assert np.allclose(less, scores((1, 20)) - (0.5 * unit @ unit[50] + unit @ unit[60]) / 2, atol=1e-5)
    assert np.allclose(scores((50,), (-1.0,)), -unit @ unit[50], atol=1e-6)
    assert not np.array_equal(scores((1, 20), (3.0, 1.0)), scores((1, 20)))
    assert np.array_equal(scores(tuple(range(20))), scores(tuple(range(12, 20))))  # The last max_history.
    with pytest.raises(ValueError, match="2 weights for a history of 1"):
        scores((1,), (1.0, 2.0))
    with pytest.raises(ValueError, match="outside 0 to 95"):
        scores((96,))


@pytest.mark.slow
def test_an_empty_batch(fit):
    assert fit.model.scores([]).shape == (0, len(fit)) and fit.search([], 3).rows.shape == (0, 3)


@pytest.mark.slow
def test_a_later_item_changes_nothing_before_it(fit):
    import torch

    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[:, 4:] = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    a, b = encode(fit.model.net, x, 2), encode(fit.model.net, y, 2)
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8])
def test_every_prefix_is_foretold_from_once(length):
    sequences = [
        np.arange(start, start + size) for start, size in ((0, 1), (1, 2), (10, 5), (20, 30), (60, 0), (70, 9))
    ]
    seen = []
    for inputs, targets, users in Windows(sequences, length).batches(3, np.random.default_rng(0)):
        assert inputs.shape == targets.shape and inputs.shape[1] <= length
        for b, place in zip(*np.nonzero(targets >= 0), strict=True):
            assert targets[b, place] == inputs[b, place] + 1  # These sequences are consecutive numbers.
            assert targets[b, place] in sequences[users[b]]
            seen.append(int(targets[b, place]))
    assert sorted(seen) == sorted(int(row) for s in sequences for row in s[1:])


@pytest.mark.slow
def test_same_seed_same_scores_and_nobody_elses_draws_change(fit, tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = retrievers.open("vqrec", make_catalog(), tmp_path / "a", make_interactions(), **SMALL)
    assert torch.equal(torch.rand(3), expected)
    queries = some_queries(8)
    assert np.array_equal(again.model.scores(queries), fit.model.scores(queries)) and again.report == fit.report
    other = retrievers.open("vqrec", make_catalog(), tmp_path / "b", make_interactions(), **SMALL, seed=1)
    assert not np.array_equal(other.model.scores(queries), fit.model.scores(queries))
    assert other.fingerprint != fit.fingerprint == again.fingerprint


@pytest.mark.slow
def test_the_same_gradient_every_time():
    """This fit is large enough for several threads, with which the gradient of indexing would depend on their order."""
    import torch

    from retrievers.recommenders.vqrec.model import Shape, network
    from retrievers.recommenders.vqrec.train import next_item_loss

    rng = np.random.default_rng(0)
    with seeded(0):
        net = network(Shape(32, 16, 64, 256, 2, 2, 50, 0.0))
    features = torch.from_numpy(rng.integers(0, 16, (40, 32)).astype(np.uint8))
    batch = Batch(*rng.integers(0, 40, (2, 32, 50)), np.arange(32))
    found = []
    for _ in range(6):
        net.zero_grad()
        next_item_loss(net, 2, features, batch, None).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.slow
def test_it_opens_without_fitting_and_pickles_into_a_spawned_process(fit, spawned):
    queries = some_queries(4)
    hits = spawned.apply(fit.search, (queries, 5))
    assert np.array_equal(hits.rows, fit.search(queries, 5).rows)
    opened = retrievers.open("vqrec", make_catalog(), fit._folder, make_interactions(), **SMALL)
    assert opened.fingerprint == fit.fingerprint


@pytest.mark.slow
def test_sampled_competitors_and_continuous(tmp_path):
    for name, params in {"sampled": {"negatives": 20}, "continuous": {"continuous": True}}.items():
        made = retrievers.open("vqrec", make_catalog(), tmp_path / name, make_interactions(), **SMALL | params)
        assert max(made.report["ndcg@10"]) > made.report["before"]
    assert made.report["codes"] == 0 and not (tmp_path / "continuous" / "codes.npy").exists()
    assert (
        retrievers.open("vqrec", make_catalog(), None, make_interactions(), **SMALL | {"epochs": 1}).report["ran"] == 1
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"code": 3}, r"params\.code: unknown parameter of 'vqrec': did you mean 'codes'"),
        ({"codes": 5}, r"params\.codes: 5 does not divide the 16 dimensions .* choose from 1, 2, 4, 8, 16"),
        ({"codes": True}, r"params\.codes must be an integer from 1 to 1024, got True: 32 is usual"),
        ({"bits": 9}, r"params\.bits must be null or an integer from 1 to 8, got 9"),
        ({"dropout": 1.0}, r"params\.dropout must be a number from 0 to below 1, got 1\.0: 0\.2 is usual"),
        ({"learning_rate": "1e-3"}, r"params\.learning_rate must be a number"),
        ({"heads": 3}, r"params\.heads: 3 does not divide dim 16"),
        ({"seed": 2**64}, r"params\.seed must be an integer from 0 to 4294967295"),
        ({"freeze": 1}, r"params\.freeze must be true or false, got 1"),
        ({"pretrained": "nowhere"}, r"params\.pretrained: nowhere holds no network .*vqrec\.backend\.pretrain"),
    ],
)
def test_bad_parameters_are_named(tmp_path, params, message):
    with pytest.raises(ValueError, match=r"retriever\." + message):
        retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **SMALL | params)
    assert not (tmp_path / "i").exists()


@pytest.mark.slow
def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="needs a user who chose at least two items"):
        retrievers.open("vqrec", make_catalog(), tmp_path / "i", Interactions.from_sequences(96, [[1], [2]]), **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["codes.npy", "weights.npz", "shape.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "another"])
def test_a_damaged_folder_is_refused(fit, tmp_path, name, how):
    folder = tmp_path / "index"
    folder.mkdir()
    for file in fit._folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[:30])
    elif how == "gone":
        path.unlink()
    elif name == "codes.npy":
        np.save(path, np.zeros((95, 4), np.uint8))
    elif name == "weights.npz":
        np.savez(path, content=np.zeros(3))
    else:
        path.write_text(json.dumps({"codes": 3}))
    with pytest.raises(RetrieverError, match="is damaged"):
        retrievers.open("vqrec", make_catalog(), folder, make_interactions(), **SMALL)


def test_importing_loads_neither_torch_nor_faiss():
    heavy = ("torch", "faiss", "scipy")
    code = f"import sys, retrievers.recommenders.vqrec.backend; print([n for n in {heavy} if n in sys.modules])"
    root = Path(retrievers.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
