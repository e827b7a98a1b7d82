"""VQ-Rec on several domains: pre-training, and the permutation of codes from one domain to another."""

import json

import numpy as np
import pytest
from vq_data import SMALL, TOPICS, Stub, make_catalog, make_interactions, stub  # noqa: F401

import retrievers
from retrievers import RetrieverError
from retrievers.recommenders.next_item import Schedule, Windows, seeded
from retrievers.recommenders.vqrec import backend
from retrievers.recommenders.vqrec import codes as vq_codes


def test_semi_synthetic_negatives_swap_three_codes_of_four():
    import torch

    from retrievers.recommenders.vqrec.transfer import semi_synthetic

    torch.manual_seed(0)
    codes = torch.randint(0, 16, (2000, 8), dtype=torch.uint8)
    made = semi_synthetic(codes, 16)
    assert made.dtype == torch.uint8 and int(made.max()) < 16
    changed, expected = (made != codes).double().mean(0), 0.75 * 15 / 16  # One in 16 random codes equals the old one.
    assert (abs(changed - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5).all()


@pytest.mark.slow
def test_sinkhorn_is_doubly_stochastic_and_the_hard_choice_a_permutation():
    import torch

    from retrievers.recommenders.vqrec.transfer import best_permutation, gumbel_sinkhorn, sinkhorn

    torch.manual_seed(0)
    for matrix in (sinkhorn(torch.randn(5, 8, 8)), gumbel_sinkhorn(torch.randn(5, 8, 8), 0.5, 0.5)):
        assert (matrix > 0).all()
        assert torch.allclose(matrix.sum(1), torch.ones(5, 8), atol=1e-4)
        assert torch.allclose(matrix.sum(2), torch.ones(5, 8), atol=0.05)
    hidden = torch.stack([torch.randperm(8) for _ in range(5)])
    logits = 5 * torch.nn.functional.one_hot(hidden, 8) + torch.rand(5, 8, 8)
    assert np.array_equal(best_permutation(logits.numpy()), hidden.numpy())
    chosen = best_permutation(torch.randn(5, 8, 8).numpy())
    assert np.array_equal(np.sort(chosen, 1), np.tile(np.arange(8), (5, 1)))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A network that was pre-trained on two similar domains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Encoder", Stub)
        domains = [(make_catalog(), make_interactions(seed=0)), (make_catalog(9), make_interactions(seed=5, each=9))]
        return backend.pretrain(domains, tmp_path_factory.mktemp("taught") / "net", **SMALL | {"epochs": 12})


@pytest.mark.slow
def test_pretraining_goes_over_several_domains(taught, tmp_path):
    meta = json.loads((taught / "index.json").read_text())
    assert len(meta["domains"]) == 2 and TOPICS * (11 + 8) - 30 < meta["fit"]["warm"] <= TOPICS * (11 + 8)
    assert max(meta["fit"]["ndcg@10"]) > 2 * meta["fit"]["before"]
    with pytest.raises(ValueError, match="at least one domain"):
        backend.pretrain([], tmp_path / "none")
    with pytest.raises(ValueError, match=r"params\.pretrained: pre-training does not start from another network"):
        backend.pretrain([(make_catalog(), make_interactions())], tmp_path / "none", pretrained=str(taught))
    with pytest.raises(RetrieverError, match="was built with another domains"):
        backend.pretrain([(make_catalog(), make_interactions())], taught, **SMALL | {"epochs": 12})


def relabelled(monkeypatch, book, permutation):
    """Patch `learn` so that it returns ``book`` with permuted codes: code c of piece m was permutation[m, c]."""
    moved = np.take_along_axis(book.centroids, permutation[:, :, None], 1)
    monkeypatch.setattr(vq_codes, "learn", lambda *_: vq_codes.Codebook(book.rotation, moved))


@pytest.mark.slow
def test_a_permuted_copy_of_a_domain_is_recovered(taught, tmp_path, monkeypatch):
    from retrievers.recommenders.vqrec.transfer import best_permutation, centroid_cosines

    rng = np.random.default_rng(3)
    permutation = np.stack([rng.permutation(8) for _ in range(4)])
    book = vq_codes.Codebook.load(taught)
    catalog, given = make_catalog(), make_interactions()
    usual = {"pretrained": str(taught), "epochs": 0}
    relabelled(monkeypatch, book, np.tile(np.arange(8), (4, 1)))
    oracle = retrievers.open("vqrec", catalog, tmp_path / "oracle", given, **usual, align_epochs=0)
    relabelled(monkeypatch, book, permutation)
    assert np.array_equal(best_permutation(centroid_cosines(vq_codes.learn(), book)), permutation)  # The texts show it.
    kept = retrievers.open("vqrec", catalog, tmp_path / "kept", given, **usual, align_epochs=0)
    made = retrievers.open("vqrec", catalog, tmp_path / "made", given, **usual, align_epochs=3)
    # Learning permutes a few more codes, which then predict better.
    assert kept.report["before"] < 0.8 * oracle.report["before"] <= 0.8 * made.report["before"]
    found, old = np.load(tmp_path / "made" / "weights.npz"), np.load(taught / "weights.npz")
    new, content = (weights["content.weight"].reshape(4, 8, 16) for weights in (found, old))
    assert (new == np.take_along_axis(content, permutation[:, :, None], 1)).all(2).mean() >= 0.75
    assert np.array_equal(np.sort(new, axis=1), np.sort(content, axis=1))  # The same embeddings.
    for part in ("positions.weight", "layers.0.up.weight"):  # Nothing else changed.
        assert np.array_equal(old[part], found[part])


@pytest.mark.slow
def test_a_permutation_is_learned_from_a_loss_alone():
    import torch

    from retrievers.recommenders.vqrec.model import Shape, network
    from retrievers.recommenders.vqrec.transfer import align

    with seeded(0):
        net = network(Shape(4, 8, 16, 16, 1, 2, 8, 0.0))
        old = net["content"].weight.detach().clone().view(4, 8, 16)
        hidden = torch.stack([torch.randperm(8) for _ in range(4)])
        right = old.gather(1, hidden[..., None].expand(-1, -1, 16)).reshape(32, 16)
        windows = Windows([np.arange(9)] * 10, 8)
        found, report = align(
            net,
            8,
            lambda batch, table: ((table - right) ** 2).sum(),
            windows,
            Schedule(30, 30, 0.1, 1, 0),
            lambda: -float(((net["content"].weight - right) ** 2).sum()),
        )
    assert np.array_equal(found, hidden.numpy()) and torch.equal(net["content"].weight, right)
    assert report["epochs"] >= 1


@pytest.mark.slow
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
    with pytest.raises(ValueError, match=r"params\.dim: 32, but the pre-trained network has 16: leave it out"):
        retrievers.open("vqrec", catalog, tmp_path / "x", given, **usual, dim=32)
    with pytest.raises(ValueError, match=r"params\.continuous: True, but the pre-trained network has False"):
        retrievers.open("vqrec", catalog, tmp_path / "x", given, **usual, continuous=True)


@pytest.mark.slow
def test_the_network_s_own_shape_may_be_said_again(tmp_path):
    catalog, given = make_catalog(), make_interactions()
    odd = SMALL | {"dim": 15, "heads": 3, "epochs": 1}  # The default of two heads does not divide 15.
    taught = backend.pretrain([(catalog, given)], tmp_path / "taught", **odd)
    usual = {"pretrained": str(taught), "epochs": 0, "align_epochs": 0}
    assert retrievers.open("vqrec", catalog, tmp_path / "a", given, **usual).report["ran"] == 0
    assert retrievers.open("vqrec", catalog, tmp_path / "b", given, **usual, dim=15).report["ran"] == 0


@pytest.mark.slow
def test_a_network_that_was_pretrained_on_the_same_catalogue_says_so(tmp_path):
    catalog, whole, part = make_catalog(), make_interactions(), make_interactions(60, seed=1)
    usual = {"epochs": 0, "align_epochs": 0}
    for place, domain, known in (
        ("here", (catalog, whole), {whole.fingerprint}),
        ("elsewhere", (make_catalog(9), make_interactions(each=9)), set()),
    ):
        net = backend.pretrain([domain], tmp_path / place, **SMALL | {"epochs": 0})
        made = retrievers.open("vqrec", catalog, tmp_path / f"{place}-index", part, pretrained=str(net), **usual)
        assert retrievers.fitted_on(made) == {part.fingerprint} | known
    # An index can be the pre-trained network of another one.
    third = make_interactions(60, seed=2)
    made = retrievers.open("vqrec", catalog, None, third, pretrained=str(tmp_path / "here-index"), **usual)
    assert retrievers.fitted_on(made) == {third.fingerprint, part.fingerprint, whole.fingerprint}
