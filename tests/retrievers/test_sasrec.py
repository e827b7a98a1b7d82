"""SASRec: its network beside a forward pass in numpy, its losses, its fit, and what it does not rank."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf, log_softmax, softmax

import retrievers
from retrievers import Catalog, Interactions, Query, RetrieverError, Unseen
from retrievers.recommenders import sasrec
from retrievers.recommenders.next_item import seeded
from retrievers.recommenders.sasrec import Negatives, Params, SASRec, binary_loss, softmax_loss
from retrievers.recommenders.transformer import encode

N, COLD = 30, (11, 29)  # Nobody chooses the cold items.
SMALL = {"dim": 16, "heads": 2, "max_history": 8, "dropout": 0.1, "learning_rate": 0.01, "epochs": 10}
WARM = np.setdiff1d(np.arange(N), COLD)


def make_catalog() -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": f"item {i}"} for i in range(N))


def follower(item: int) -> int:
    """The item that always follows an item: the next but four of the warm ones."""
    return int(WARM[(np.searchsorted(WARM, item) + 5) % len(WARM)])


def chain(start: int, length: int) -> list[int]:
    rows = [start]
    while len(rows) < length:
        rows.append(follower(rows[-1]))
    return rows


def make_interactions(users=90, validation=True) -> Interactions:
    """Each user starts at a random item and then takes what follows. The last item is the validation target."""
    rng = np.random.default_rng(0)
    sequences = [chain(int(rng.choice(WARM)), int(rng.integers(4, 13))) for _ in range(users)]
    held = [tuple(s[:-1]) for s in sequences], [s[-1] for s in sequences]
    return Interactions.from_sequences(N, [s[:-1] for s in sequences], held if validation else ((), ()))


def fit(folder, given=None, **params):
    return retrievers.open("sasrec", make_catalog(), folder, given or make_interactions(), **SMALL | params)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("sasrec") / "index")


def untrained(**params) -> SASRec:
    """A model with random weights that are large enough for every part of the network to matter."""
    import torch

    settings = Params(**SMALL | {"layers": 2, "inner_dim": 24} | params)
    with seeded(3):
        net = settings.network(len(WARM))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return SASRec(net, settings.heads, WARM, N)


def normalised(x, layer):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-12) * layer["weight"] + layer["bias"]


def by_numpy(model: SASRec, rows, weights) -> np.ndarray:
    """The output of the network for one history of items with positive weights: (h,)."""
    state = {name: value.double().numpy() for name, value in model.net.state_dict().items()}

    def part(name):
        return {each: state[f"{name}.{each}"] for each in ("weight", "bias")}

    def linear(x, name):
        return x @ part(name)["weight"].T + part(name)["bias"]

    x = state["content.weight"][np.searchsorted(WARM, rows)] + state["positions.weight"][: len(rows)]
    x = normalised(x, part("norm"))
    length, dim = x.shape
    for number in range(len(model.net["layers"])):
        at = f"layers.{number}"
        q, k, v = (each.reshape(length, model.heads, -1).swapaxes(0, 1)
                   for each in np.split(linear(x, f"{at}.queries_keys_values"), 3, 1))  # fmt: skip
        logits = q @ k.swapaxes(1, 2) / np.sqrt(dim / model.heads) + np.log(weights)
        logits[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        found = (softmax(logits, 2) @ v).swapaxes(0, 1).reshape(length, dim)
        x = normalised(x + linear(found, f"{at}.out"), part(f"{at}.norm"))
        up = linear(x, f"{at}.up")
        x = normalised(x + linear(up * (1 + erf(up / np.sqrt(2))) / 2, f"{at}.down"), part(f"{at}.norm_after"))
    return x[-1]


@pytest.mark.parametrize("layers", [1, 2])
def test_scores_are_those_of_a_forward_pass_in_numpy(layers):
    model = untrained(layers=layers)
    items = model.net["content"].weight.detach().double().numpy()
    histories = [((3,), ()), ((3, 7, 3), ()), ((0, 5, 9), (2.0, 0.5, 1.0)), (tuple(WARM[:20].tolist()), ())]
    found = model.scores([Query(history=rows, weights=weights) for rows, weights in histories])
    for scores, (rows, weights) in zip(found, histories, strict=True):
        newest = rows[-SMALL["max_history"] :]
        assert np.allclose(scores[WARM], items @ by_numpy(model, newest, weights or (1.0,) * len(newest)), atol=1e-4)
        assert np.isneginf(scores[list(COLD)]).all()


def test_disliked_items_are_not_read_and_their_mean_direction_is_subtracted():
    model = untrained()
    items = model.net["content"].weight.detach().double().numpy()
    one, other = (
        items[np.searchsorted(WARM, row)] / np.linalg.norm(items[np.searchsorted(WARM, row)]) for row in (4, 8)
    )
    away = (0.5 * one + 1.0 * other) / 2
    u = by_numpy(model, (3, 7), (1.0, 1.0))
    queries = [
        Query(history=(3, 4, 7, 8), weights=(1.0, -0.5, 1.0, -1.0)),
        Query(history=(4, 8), weights=(-0.5, -1.0)),
        Query(history=(3, 4, 7), weights=(1.0, 0.0, 1.0)),
        Query(history=(3, 7)),
    ]
    both, disliked, left_out, liked = model.scores(queries)[:, WARM]
    assert np.allclose(both, items @ (u - np.linalg.norm(u) * away), atol=1e-4)
    assert np.allclose(disliked, items @ -away, atol=1e-4)
    assert np.array_equal(left_out, liked)
    assert both[np.searchsorted(WARM, 8)] < liked[np.searchsorted(WARM, 8)]


def test_later_items_and_padding_change_nothing_before_them():
    import torch

    model = untrained()
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(0, len(WARM), (3, 8)))
    with torch.no_grad():
        whole = encode(model.net, model.net["content"](rows), model.heads)
        changed = rows.clone()
        changed[:, 5:] = (rows[:, 5:] + 1) % len(WARM)
        other = encode(model.net, model.net["content"](changed), model.heads)
        short = encode(model.net, model.net["content"](rows[:, :5]), model.heads)
    assert torch.allclose(other[:, :5], whole[:, :5], atol=1e-5) and torch.allclose(short, whole[:, :5], atol=1e-5)
    assert not torch.allclose(other[:, 5:], whole[:, 5:], atol=1e-2)


def test_a_history_scores_the_same_in_every_batch():
    model = untrained()
    rng = np.random.default_rng(1)
    queries = [Query(history=tuple(rng.integers(0, N, rng.integers(1, 12)).tolist())) for _ in range(40)]
    whole = model.scores(queries)
    order = rng.permutation(40)
    assert np.array_equal(model.scores([queries[q] for q in order]), whole[order])
    assert np.array_equal(model.scores(queries[7:8])[0], whole[7])


def test_losses():
    import torch

    rng = np.random.default_rng(0)
    outputs, weight = rng.normal(size=(5, 4)), rng.normal(size=(9, 4))
    targets, negatives = rng.integers(0, 9, 5), rng.integers(0, 9, (5, 3))
    o, w = torch.from_numpy(outputs), torch.from_numpy(weight)
    logits = outputs @ weight.T
    expected = -log_softmax(logits, 1)[np.arange(5), targets].mean()
    assert np.isclose(float(softmax_loss(o, w, targets, np.arange(9))), expected)
    rows = np.union1d(targets, [1, 2])
    expected = -log_softmax(logits[:, rows], 1)[np.arange(5), np.searchsorted(rows, targets)].mean()
    assert np.isclose(float(softmax_loss(o, w, targets, np.array([1, 2]))), expected)
    right, wrong = (1 / (1 + np.exp(-logits[np.arange(5)[:, None], rows])) for rows in (targets[:, None], negatives))
    expected = -np.log(right).mean() - np.log(1 - wrong).mean()
    assert np.isclose(float(binary_loss(o, w, targets, negatives)), expected)


def test_negatives_are_what_the_user_did_not_choose():
    sequences = [np.array([0, 1, 2]), np.array([3]), np.arange(6)]
    drawn = Negatives(sequences, 6, seed=0).draw(np.repeat([0, 1, 2], 600), 2)
    assert drawn.shape == (1800, 2)
    for user, allowed in ((0, [3, 4, 5]), (1, [0, 1, 2, 4, 5]), (2, range(6))):  # The last one chose everything.
        rows, counts = np.unique(drawn[600 * user : 600 * (user + 1)], return_counts=True)
        assert rows.tolist() == list(allowed)
        assert abs(counts / 1200 - 1 / len(rows)).max() < 0.06


def hits(retriever) -> float:
    """The share of new histories whose follower is ranked first."""
    histories = [chain(int(start), 4) for start in WARM]
    targets = np.array([[follower(history[-1])] for history in histories])
    ranks = Unseen(retriever, N).ranks([Query(history=tuple(history)) for history in histories], targets)
    return float((ranks == 1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"loss": "bce", "epochs": 25}, {"negatives": 8}], ids=["ce", "bce", "sampled"])
def test_it_learns_what_follows_an_item(fitted, tmp_path, params):
    made = fit(tmp_path / "index", **params) if params else fitted
    assert hits(made) > 0.9 and made.report["before"] < 0.5 < max(made.report["ndcg@10"])


@pytest.mark.slow
def test_the_best_epoch_is_kept(fitted):
    from retrievers.recommenders.next_item import ndcg_at_10

    report = fitted.report
    assert report["ndcg@10"][report["epochs"] - 1] == max(report["ndcg@10"]) and report["ran"] == len(report["ndcg@10"])
    assert round(ndcg_at_10(fitted.model, make_interactions()), 6) == max(report["ndcg@10"])
    assert (report["warm"], report["cold"]) == (len(WARM), len(COLD))


@pytest.mark.slow
def test_patience_ends_a_fit_and_without_validation_all_epochs_run(tmp_path):
    report = fit(tmp_path / "a", epochs=6, patience=1, learning_rate=1e-30).report  # Nothing changes.
    assert (report["epochs"], report["ran"]) == (0, 1)
    report = fit(tmp_path / "b", make_interactions(validation=False), epochs=2, patience=1).report
    assert (report["epochs"], report["ran"]) == (2, 2)


@pytest.mark.slow
def test_same_seed_same_scores_and_no_other_random_numbers_change(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (
        fit(tmp_path / name, epochs=2, loss="bce", seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.rand(3), expected)
    queries = [Query(history=tuple(chain(3, 4))), Query(history=(2, 9))]
    assert np.array_equal(one.model.scores(queries), again.model.scores(queries)) and one.report == again.report
    assert not np.array_equal(one.model.scores(queries), other.model.scores(queries))


@pytest.mark.slow
def test_items_without_a_training_choice_are_neither_ranked_nor_read(fitted):
    history = tuple(chain(3, 3))
    queries = [Query(history=(COLD[0], *history)), Query(history=history), Query(history=COLD)]
    found = fitted.search(queries, N)
    assert not np.isin(COLD, found.rows).any() and (found.rows[0] >= 0).sum() == len(WARM)
    assert np.array_equal(found.scores[0], found.scores[1])
    assert (found.rows[2] == -1).all()
    assert (fitted.ranks(queries, np.tile(COLD, (3, 1))) == 0).all()
    weighted = [Query(history=(COLD[0], *history), weights=(-1.0, 1.0, 1.0, 1.0))]
    assert np.array_equal(fitted.search(weighted, N).scores[0], found.scores[1])


@pytest.mark.slow
def test_every_parameter_but_the_device_is_in_the_fingerprint(tmp_path):
    changes = {
        "loss": "bce", "negatives": 5, "dim": 8, "inner_dim": 8, "layers": 1, "heads": 1, "dropout": 0.2,
        "max_history": 4, "learning_rate": 0.1, "train_batch": 8, "epochs": 1, "patience": 2, "seed": 1,
    }  # fmt: skip
    assert {*changes, "device"} == set(Params.__dataclass_fields__)
    usual = SMALL | {"epochs": 0}
    made = [fit(tmp_path / "usual", **usual)]
    made += [fit(tmp_path / name, **usual | {name: value}) for name, value in changes.items()]
    assert len({each.fingerprint for each in made}) == len(changes) + 1
    assert fit(tmp_path / "usual", **usual, device="cpu").fingerprint == made[0].fingerprint


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"los": "ce"}, r"params\.los: unknown parameter of 'sasrec': did you mean 'loss'"),
        ({"loss": "bpr"}, r"params\.loss: unknown 'bpr': choose ce or bce"),
        ({"negatives": 0}, r"params\.negatives must be null or an integer >= 1, got 0: null is usual"),
        ({"inner_dim": 1.5}, r"params\.inner_dim must be null or an integer from 1 to 16384, got 1\.5: null is usual"),
        ({"dim": True}, r"params\.dim must be an integer from 1 to 4096, got True: 64 is usual"),
        ({"heads": 3}, r"params\.heads: 3 does not divide dim 16"),
        ({"dropout": 1}, r"params\.dropout must be a number from 0 to below 1, got 1: 0\.5 is usual"),
        ({"learning_rate": float("nan")}, r"params\.learning_rate must be a number above 0 and below 1, got nan"),
        ({"learning_rate": 1e38}, r"params\.learning_rate must be a number above 0 and below 1, got 1e\+38"),
        ({"epochs": -1}, r"params\.epochs must be an integer >= 0, got -1: 200 is usual"),
        ({"device": "tpu9"}, r"params\.device: 'tpu9' is not available on this machine"),
        ({"seed": 2**32}, r"params\.seed must be an integer from 0 to 4294967295"),
    ],
)
def test_bad_parameters_are_named(tmp_path, params, message):
    with pytest.raises(ValueError, match=r"retriever\." + message):
        fit(tmp_path / "index", **params)
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
@pytest.mark.parametrize("validation", [True, False])
def test_a_loss_that_is_not_finite_ends_the_fit(tmp_path, validation, monkeypatch):
    monkeypatch.setattr(sasrec, "softmax_loss", lambda outputs, *_: outputs.sum() * float("nan"))
    message = r"params\.learning_rate: the loss is nan in epoch 1: lower it, 0\.01 is too high"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "index", make_interactions(validation=validation))
    assert not (tmp_path / "index").exists()


def test_nothing_to_learn_from(tmp_path):
    with pytest.raises(ValueError, match="sasrec needs a user who chose at least two items"):
        fit(tmp_path / "index", Interactions.from_sequences(N, [[1], [2]]))


@pytest.mark.parametrize("how", ["cut", "gone", "rows", "sizes", "pickle"])
def test_a_damaged_folder_is_refused(tmp_path, how):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "index"
    fit(folder, epochs=0)
    path = folder / sasrec.FILE
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "gone":
        path.unlink()
    elif how == "rows":
        save_file(tensors | {"rows": tensors["rows"] + 5}, path)
    elif how == "sizes":
        save_file(tensors | {"positions.weight": torch.zeros(3, 16)}, path)
    else:
        torch.save(tensors, path)
    with pytest.raises(RetrieverError, match="is damaged"):
        fit(folder, epochs=0)


def test_importing_loads_no_torch():
    code = "import sys, retrievers.recommenders.sasrec; print([n for n in ('torch', 'scipy') if n in sys.modules])"
    root = Path(retrievers.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
