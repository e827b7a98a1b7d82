"""VQ-Rec: codes, the network's promises, transfer. A stub encodes here; the real encoder is in the slow test."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, Interactions, Query, RetrieverError, vq_codes, vqrec
from retrievers.vq_train import Windows

pytestmark = pytest.mark.slow  # torch and an encoder or a network: with the real trainings

TOPICS, EACH, DIMENSIONS = 8, 12, 16
SMALL = {"codes": 4, "bits": 3, "dim": 16, "max_history": 8, "epochs": 4, "train_batch": 16, "learning_rate": 0.01}


class Stub:
    """An encoder whose embedding is its topic's vector and a little of the document's own."""

    dimension = DIMENSIONS

    def __init__(self, **settings):
        self.settings = settings

    def describe(self):
        return {"model": "stub"}

    def documents(self, texts, progress=False):
        out = np.zeros((len(texts), DIMENSIONS), np.float16)
        for i, text in enumerate(texts):
            topic, own = map(int, text.split())
            out[i] = (np.random.default_rng(topic).normal(size=DIMENSIONS)
                      + 0.3 * np.random.default_rng(1000 + own).normal(size=DIMENSIONS))  # fmt: skip
        return out


@pytest.fixture(autouse=True)
def stub(request, monkeypatch):
    if "slow" not in request.keywords:
        monkeypatch.setattr(vqrec, "Encoder", Stub)


def make_catalog(each=EACH) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": f"{i // each} {i}"} for i in range(TOPICS * each))


COLD = [EACH - 1 + topic * EACH for topic in range(TOPICS)]  # the last document of every topic


def make_interactions(users=120, seed=0, each=EACH) -> Interactions:
    """From a topic to one of two others, the likelier one with 0.8, or on in it; no two topics are alike in this.
    Validation is the last of each."""
    rng = np.random.default_rng(seed)
    after = np.random.default_rng(7).integers(0, TOPICS, (TOPICS, 2))
    sequences = []
    for _ in range(users):
        topic = int(rng.geometric(0.25)) % TOPICS
        sequence = []
        for _ in range(rng.integers(5, 10)):
            sequence.append(int(topic * each + rng.integers(each - 1)))
            topic = topic if rng.random() < 0.3 else int(after[topic, int(rng.random() < 0.2)])
        sequences.append(sequence)
    return Interactions.from_sequences(
        TOPICS * each, [s[:-1] for s in sequences], ([tuple(s[:-1]) for s in sequences], [s[-1] for s in sequences])
    )


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """The usual model, fitted once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqrec, "Encoder", Stub)
        folder = tmp_path_factory.mktemp("vqrec") / "index"
        return retrievers.open("vqrec", make_catalog(), folder, make_interactions(), **SMALL)


def some_queries(count=70, seed=1) -> list[Query]:
    rng = np.random.default_rng(seed)
    histories = [tuple(rng.integers(0, TOPICS * EACH, rng.integers(1, 12)).tolist()) for _ in range(count)]
    return [
        Query(history=h, weights=tuple(rng.choice([-1.0, -0.5, 0.0, 1.0, 2.0], len(h)).tolist()) if q % 2 else ())
        for q, h in enumerate(histories)
    ]


def test_codes_are_deterministic_and_near_texts_share_them():
    vectors = Stub().documents(make_catalog().texts).astype(np.float32)
    book = vq_codes.learn(vectors, 4, 3)
    again = vq_codes.learn(vectors, 4, 3)
    assert np.array_equal(book.rotation, again.rotation) and np.array_equal(book.centroids, again.centroids)
    assert np.allclose(book.rotation @ book.rotation.T, np.eye(DIMENSIONS), atol=1e-5)
    codes = vq_codes.assign(book, vectors)
    assert codes.shape == (len(vectors), 4) and codes.dtype == np.uint8 and codes.max() < 8
    assert np.array_equal(vq_codes.assign(book, vectors[5:50]), codes[5:50])
    # the nearest centroid, in the plainest way
    pieces = (vectors @ book.rotation.T).reshape(-1, 4, 1, 4)
    assert (((pieces - book.centroids) ** 2).sum(3).argmin(2) == codes).mean() > 0.99
    agree = (codes[:, None] == codes[None]).mean(2)
    same = np.arange(len(codes)) // EACH
    assert agree[same[:, None] == same].mean() > 2 * agree[same[:, None] != same].mean()


def test_fewer_documents_than_centroids_or_dimensions():
    vectors = np.random.default_rng(0).normal(size=(3, DIMENSIONS)).astype(np.float32)
    assert vq_codes.learn(vectors, 4, 3).centroids.shape == (4, 8, 4)
    assert [vq_codes.bits_for(n) for n in (1, 39 * 32, 39 * 256, 10**7)] == [2, 5, 8, 8]


def test_cold_documents_are_encoded_with_the_codebook_of_the_others_and_found(fit):
    vectors = Stub().documents(make_catalog().texts)
    warm = np.flatnonzero(make_interactions().counts > 0)
    assert not np.isin(COLD, warm).any() and len(warm) > 80
    codes = vq_codes.assign(vq_codes.learn(vectors[warm], 4, 3), vectors)
    assert np.array_equal(codes, np.load(fit._folder / "codes.npy"))
    # two documents of a topic: its cold one stands above a chance place
    queries = [Query(history=(t * EACH, t * EACH + 1)) for t in range(TOPICS)]
    ranks = fit.ranks(queries, np.array(COLD)[:, None])
    assert (ranks > 0).all() and np.median(ranks) < TOPICS * EACH / 3


def test_it_learns(fit):
    report = fit.report
    assert 1.2 * report["before"] < max(report["ndcg@10"]) and report["epochs"] >= 1 and report["cold"] >= len(COLD)


def test_the_table_does_not_grow_with_the_catalogue(fit, tmp_path):
    larger = retrievers.open(
        "vqrec", make_catalog(40), tmp_path / "i", make_interactions(each=40), **SMALL | {"epochs": 0}
    )
    sizes = [sum(p.numel() for p in r.model.net.parameters()) for r in (fit, larger)]
    assert sizes[0] == sizes[1] and larger.model.net["content"].weight.shape == (4 * 8, 16)


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


def test_a_row_does_not_depend_on_its_batch(fit):
    queries = some_queries()
    whole = fit.model.scores(queries)
    assert whole.shape == (70, len(fit)) and whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(70)
    assert np.array_equal(fit.model.scores([queries[q] for q in order]), whole[order])
    for q in range(0, 70, 7):
        assert np.array_equal(fit.model.scores([queries[q]])[0], whole[q])


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
    assert np.array_equal(scores(tuple(range(20))), scores(tuple(range(12, 20))))  # the last max_history
    with pytest.raises(ValueError, match="2 weights for a history of 1"):
        scores((1,), (1.0, 2.0))
    with pytest.raises(ValueError, match="outside 0 to 95"):
        scores((96,))


def test_an_empty_batch(fit):
    assert fit.model.scores([]).shape == (0, len(fit)) and fit.search([], 3).rows.shape == (0, 3)


def test_a_later_item_changes_nothing_before_it(fit):
    import torch

    from retrievers.vq_model import encode

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
    for inputs, targets in Windows(sequences, length).batches(3, np.random.default_rng(0)):
        assert inputs.shape == targets.shape and inputs.shape[1] <= length
        for b, place in zip(*np.nonzero(targets >= 0), strict=True):
            assert targets[b, place] == inputs[b, place] + 1  # these sequences count upwards
            seen.append(int(targets[b, place]))
    assert sorted(seen) == sorted(int(row) for s in sequences for row in s[1:])


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


def test_it_opens_without_fitting_and_pickles_into_a_spawned_process(fit):
    queries = some_queries(4)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        hits = pool.apply(fit.search, (queries, 5))
    assert np.array_equal(hits.rows, fit.search(queries, 5).rows)
    opened = retrievers.open("vqrec", make_catalog(), fit._folder, make_interactions(), **SMALL)
    assert opened.fingerprint == fit.fingerprint


def test_sampled_competitors_and_continuous(tmp_path):
    for name, params in {"sampled": {"negatives": 20}, "continuous": {"continuous": True}}.items():
        made = retrievers.open("vqrec", make_catalog(), tmp_path / name, make_interactions(), **SMALL | params)
        assert max(made.report["ndcg@10"]) > made.report["before"]
    assert made.report["codes"] == 0 and not (tmp_path / "continuous" / "codes.npy").exists()
    assert (
        retrievers.open("vqrec", make_catalog(), None, make_interactions(), **SMALL | {"epochs": 1}).report["ran"] == 1
    )


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"code": 3}, r"params\.code: unknown parameter of 'vqrec': did you mean 'codes'"),
        ({"codes": 5}, r"params\.codes: 5 does not divide the 16 dimensions .* choose from 1, 2, 4, 8, 16"),
        ({"codes": True}, r"params\.codes must be an integer from 1, got True: the default is 32"),
        ({"bits": 9}, r"params\.bits must be an integer from 1 to 8, got 9"),
        ({"dropout": 1.0}, r"params\.dropout must be a number from 0 to below 1, got 1\.0: the default is 0\.2"),
        ({"learning_rate": "1e-3"}, r"params\.learning_rate must be a number"),
        ({"heads": 3}, r"params\.heads: 3 does not divide dim 16"),
        ({"freeze": 1}, r"params\.freeze must be true or false, got 1"),
        ({"pretrained": "nowhere"}, r"params\.pretrained: nowhere holds no network .* retrievers\.vqrec\.pretrain"),
    ],
)
def test_bad_parameters_are_named(tmp_path, params, message):
    with pytest.raises(ValueError, match=r"retriever\." + message):
        retrievers.open("vqrec", make_catalog(), tmp_path / "i", make_interactions(), **SMALL | params)
    assert not (tmp_path / "i").exists()


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="no user of these interactions chose two documents"):
        retrievers.open("vqrec", make_catalog(), tmp_path / "i", Interactions.from_sequences(96, [[1], [2]]), **SMALL)


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
    code = "import sys, retrievers.vqrec; print([n for n in ('torch', 'faiss', 'scipy') if n in sys.modules])"
    root = Path(retrievers.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_semi_synthetic_negatives_swap_three_codes_of_four():
    import torch

    from retrievers.vq_transfer import semi_synthetic

    torch.manual_seed(0)
    codes = torch.randint(0, 16, (2000, 8), dtype=torch.uint8)
    made = semi_synthetic(codes, 16)
    assert made.dtype == torch.uint8 and int(made.max()) < 16
    changed, expected = (made != codes).double().mean(0), 0.75 * 15 / 16  # one in 16 is drawn as it was
    assert (abs(changed - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5).all()


def test_sinkhorn_is_doubly_stochastic_and_the_hard_choice_a_permutation():
    import torch

    from retrievers.vq_transfer import gumbel_sinkhorn, harden, sinkhorn

    torch.manual_seed(0)
    for matrix in (sinkhorn(torch.randn(5, 8, 8)), gumbel_sinkhorn(torch.randn(5, 8, 8), 0.5, 0.5)):
        assert (matrix > 0).all()
        assert torch.allclose(matrix.sum(1), torch.ones(5, 8), atol=1e-4)
        assert torch.allclose(matrix.sum(2), torch.ones(5, 8), atol=0.05)
    hidden = torch.stack([torch.randperm(8) for _ in range(5)])
    logits = 5 * torch.nn.functional.one_hot(hidden, 8) + torch.rand(5, 8, 8)
    assert np.array_equal(harden(logits.numpy()), hidden.numpy())
    chosen = harden(torch.randn(5, 8, 8).numpy())
    assert np.array_equal(np.sort(chosen, 1), np.tile(np.arange(8), (5, 1)))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A network pre-trained on two domains, the second of which is much like the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqrec, "Encoder", Stub)
        domains = [(make_catalog(), make_interactions(seed=0)), (make_catalog(9), make_interactions(seed=5, each=9))]
        return vqrec.pretrain(domains, tmp_path_factory.mktemp("taught") / "net", **SMALL | {"epochs": 12})


def test_pretraining_goes_over_several_domains(taught, tmp_path):
    meta = json.loads((taught / "index.json").read_text())
    assert len(meta["domains"]) == 2 and TOPICS * (11 + 8) - 30 < meta["fit"]["warm"] <= TOPICS * (11 + 8)
    assert max(meta["fit"]["ndcg@10"]) > 2 * meta["fit"]["before"]
    with pytest.raises(ValueError, match="at least one domain"):
        vqrec.pretrain([], tmp_path / "none")
    with pytest.raises(ValueError, match=r"params\.pretrained: pre-training starts from nothing"):
        vqrec.pretrain([(make_catalog(), make_interactions())], tmp_path / "none", pretrained=str(taught))
    with pytest.raises(RetrieverError, match="was built with another domains"):
        vqrec.pretrain([(make_catalog(), make_interactions())], taught, **SMALL | {"epochs": 12})


def relabelled(monkeypatch, book, permutation):
    """Whoever learns a codebook gets ``book`` with other numbers: code c of piece m was permutation[m, c]."""
    moved = np.take_along_axis(book.centroids, permutation[:, :, None], 1)
    monkeypatch.setattr(vq_codes, "learn", lambda *_: vq_codes.Codebook(book.rotation, moved))


def test_a_permuted_copy_of_a_domain_is_recovered(taught, tmp_path, monkeypatch):
    from retrievers.vq_transfer import alike, harden

    rng = np.random.default_rng(3)
    permutation = np.stack([rng.permutation(8) for _ in range(4)])
    book = vq_codes.Codebook.load(taught)
    catalog, given = make_catalog(), make_interactions()
    usual = {"pretrained": str(taught), "epochs": 0}
    relabelled(monkeypatch, book, np.tile(np.arange(8), (4, 1)))
    oracle = retrievers.open("vqrec", catalog, tmp_path / "oracle", given, **usual, align_epochs=0)
    relabelled(monkeypatch, book, permutation)
    assert np.array_equal(harden(alike(vq_codes.learn(), book)), permutation)  # by the text of the centroids
    kept = retrievers.open("vqrec", catalog, tmp_path / "kept", given, **usual, align_epochs=0)
    made = retrievers.open("vqrec", catalog, tmp_path / "made", given, **usual, align_epochs=3)
    # learning moves a few more, to what foretells better
    assert kept.report["before"] < 0.8 * oracle.report["before"] <= 0.8 * made.report["before"]
    found, old = np.load(tmp_path / "made" / "weights.npz"), np.load(taught / "weights.npz")
    new, content = (weights["content.weight"].reshape(4, 8, 16) for weights in (found, old))
    assert (new == np.take_along_axis(content, permutation[:, :, None], 1)).all(2).mean() >= 0.75
    assert np.array_equal(np.sort(new, axis=1), np.sort(content, axis=1))  # the same embeddings in another order
    for part in ("positions.weight", "layers.0.up.weight"):  # nothing else moved
        assert np.array_equal(old[part], found[part])


def test_a_permutation_is_learned_from_a_loss_alone():
    import torch

    from retrievers.vq_model import Shape, network
    from retrievers.vq_train import Schedule, seeded
    from retrievers.vq_transfer import align

    with seeded(0):
        net = network(Shape(4, 8, 16, 16, 1, 2, 8, 0.0))
        old = net["content"].weight.detach().clone().view(4, 8, 16)
        hidden = torch.stack([torch.randperm(8) for _ in range(4)])
        right = old.gather(1, hidden[..., None].expand(-1, -1, 16)).reshape(32, 16)
        windows = Windows([np.arange(9)] * 10, 8)
        found, report = align(
            net,
            8,
            lambda inputs, targets, table: ((table - right) ** 2).sum(),
            windows,
            Schedule(30, 30, 0.1, 1, 0),
            lambda: -float(((net["content"].weight - right) ** 2).sum()),
        )
    assert np.array_equal(found, hidden.numpy()) and torch.equal(net["content"].weight, right)
    assert report["epochs"] >= 1


def test_frozen_or_not(taught, tmp_path):
    catalog, given = make_catalog(), make_interactions(seed=9)
    usual = {"pretrained": str(taught), "epochs": 2, "align_epochs": 2, "learning_rate": 0.01}
    before = np.load(taught / "weights.npz")
    for freeze in (True, False):
        made = retrievers.open("vqrec", catalog, tmp_path / str(freeze), given, **usual, freeze=freeze, patience=9)
        assert made.report["align"]["ran"] == 2 and made.report["ran"] == 2
        after = np.load(tmp_path / str(freeze) / "weights.npz")
        same = np.array_equal(before["layers.1.down.weight"], after["layers.1.down.weight"])
        assert same or not freeze
    assert made.report["epochs"] == 0 or not same
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in taught.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 100 if file.name == "weights.npz" else None])
    with pytest.raises(RetrieverError, match="broken is damaged"):
        retrievers.open("vqrec", catalog, tmp_path / "x", given, **usual | {"pretrained": str(broken)})
    with pytest.raises(ValueError, match=r"params\.dim: 32, and the pre-trained network has 16: leave it out"):
        retrievers.open("vqrec", catalog, tmp_path / "x", given, **usual, dim=32)
    with pytest.raises(ValueError, match=r"params\.continuous: True, and the pre-trained network has False"):
        retrievers.open("vqrec", catalog, tmp_path / "x", given, **usual, continuous=True)


def test_with_the_real_encoder_a_cold_document_is_found_by_its_text(tmp_path):
    things = ["garden hose", "garden spade", "kitchen knife", "kitchen pan", "office chair", "office lamp"]
    texts = [f"{thing}, {kind}" for thing in things for kind in ("small", "large", "cheap", "steel", "blue")]
    catalog = Catalog.from_records({"id": str(i), "text": text} for i, text in enumerate(texts))
    rng = np.random.default_rng(0)
    rooms = rng.integers(0, 3, 60)  # who buys for a room buys on for it; the blue ones nobody bought
    sequences = [[int(10 * r + rng.choice([0, 1, 2, 3, 5, 6, 7, 8])) for _ in range(5)] for r in rooms]
    given = Interactions.from_sequences(30, sequences)
    params = {"codes": 32, "dim": 32, "epochs": 20, "dropout": 0.0, "device": "cpu"}
    made = retrievers.open("vqrec", catalog, tmp_path / "index", given, **params)
    assert made.report["cold"] == 6 and made.model.features.shape == (30, 32)
    ranks = made.ranks([Query(history=(10 * r, 10 * r + 5)) for r in range(3)], np.array([[4, 9], [14, 19], [24, 29]]))
    assert (ranks <= 12).all()
    dense = retrievers.open("dense", catalog, tmp_path / "dense", device="cpu")
    assert np.array_equal(
        np.load(tmp_path / "dense" / "embeddings.npy"), np.load(tmp_path / "index" / "embeddings.npy")
    )
    assert dense is not None and (tmp_path / "index" / "embeddings.npy").stat().st_nlink in (1, 2)
