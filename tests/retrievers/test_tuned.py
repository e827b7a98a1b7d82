"""`dense` with `tuned`: the pairs, their negatives, the loss beside brute force, and fits of a tiny encoder."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_data import dense as weights_of
from serving import serve
from tiny_encoder import tiny_encoder

import retrievers
from retrievers import Catalog, Interactions, Judgments, Query, RetrieverError
from retrievers.encoders.sentence import Encoder
from retrievers.interactions import raw_query
from retrievers.text.dense import Params
from retrievers.text.tuning import job, negatives, train
from retrievers.text.tuning.job_folder import ERROR
from retrievers.text.tuning.loss import Objective, as_module, correction_of
from retrievers.text.tuning.pairs import from_interactions, from_judgments

THINGS = ["garden hose", "garden spade", "kitchen knife", "kitchen pan", "office chair", "office lamp"]
TEXTS = [f"{thing} {kind}" for thing in THINGS for kind in ("small", "large", "cheap", "steel")]
N = len(TEXTS)


def make_catalog() -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))


def make_interactions(users: int = 30, seed: int = 0, held: int = 10, raw_titles: int = 1) -> Interactions:
    """Users who choose items of two things, such as hoses and pans, whose texts have little in common."""
    rng = np.random.default_rng(seed)
    both = np.concatenate([np.arange(4), np.arange(12, 16)])
    sequences = [rng.permutation(both)[:5] + 4 * rng.integers(3) for _ in range(users + held)]
    held_out = [tuple(map(int, s[:-1])) for s in sequences[users:]], [int(s[-1]) for s in sequences[users:]]
    return Interactions.from_sequences(N, sequences[:users], held_out, raw_titles)


JUDGMENTS = Judgments(N, ["wet", "sharp", "bright"], [(0, 1, 2), (8, 9), (20, 21, 22, 23)], ["seat"], [(16, 17)])


# ---- Pairs


@given(st.integers(1, 4), st.none() | st.integers(1, 7), st.integers(0, 99), st.integers(1, 3))
def test_pairs_are_next_items_and_the_raw_queries_of_what_came_before(epochs, positives, seed, raw_titles):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, N, rng.integers(0, 8)).tolist() for _ in range(6)]
    given_ = Interactions.from_sequences(N, sequences, raw_titles=raw_titles)
    pairs = from_interactions(given_, TEXTS, epochs, positives, seed)
    size = len(pairs) // epochs
    # Every first occurrence after the first item is a candidate.
    possible = {
        (user, place): (raw_query(TEXTS, s[:place], raw_titles), s[place], tuple(s[:place]))
        for user, s in enumerate(sequences)
        for place in range(1, len(s))
        if s[place] not in s[:place]
    }
    users = sorted({user for user, _ in possible})
    most = {u: sum(user == u for user, _ in possible) for u in users}
    assert size == sum(count if positives is None else min(positives, count) for count in most.values())
    drawn: dict[tuple, int] = {}
    for x in range(len(pairs)):
        found = (pairs.texts[pairs.query[x]], int(pairs.row[x]), pairs.histories[x])
        assert (users[pairs.group[x]], *found) in {(user, *value) for (user, _), value in possible.items()}
        assert pairs.known_of(x).tolist() == sorted(set(sequences[users[pairs.group[x]]]))
        drawn[(users[pairs.group[x]], *found)] = drawn.get((users[pairs.group[x]], *found), 0) + 1
    for user in users:  # None is drawn again before all were.
        counts = [drawn.get((user, *value), 0) for (own, _), value in possible.items() if own == user]
        assert max(counts) - min(counts) <= 1


def test_pairs_of_judgments():
    pairs = from_judgments(JUDGMENTS, 2, 2, seed=0)
    assert len(pairs) == 2 * 6 and pairs.histories == ()
    for x in range(len(pairs)):
        relevant = JUDGMENTS.rows[JUDGMENTS.queries.index(pairs.texts[pairs.query[x]])]
        assert pairs.row[x] in relevant and pairs.known_of(x).tolist() == list(relevant)
    assert pairs.held_out.texts == ["seat"] and pairs.held_out.rows == [(16, 17)]
    assert np.array_equal(pairs.row, from_judgments(JUDGMENTS, 2, 2, seed=0).row)
    assert not np.array_equal(pairs.row, from_judgments(JUDGMENTS, 2, 2, seed=1).row)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ((["a"], [(1,), (2,)]), "1 queries with 2 lists of rows"),
        ((["a"], [()]), "no relevant document"),
        ((["a"], [(N,)]), f"rows must lie in 0 to {N - 1}"),
        ((["a"], [(0,)], ["b"], [(-1,)]), "rows must lie in 0"),
    ],
)
def test_wrong_judgments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Judgments(N, *wrong)


def test_the_fingerprint_of_judgments_follows_their_content():
    others = [
        Judgments(N, ["wet"], [(0,)]), Judgments(N, ["wet"], [(0, 1)]), Judgments(N, ["web"], [(0,)]),
        Judgments(N, ["wet"], [(0,)], ["wet"], [(0,)]), Judgments(N + 1, ["wet"], [(0,)]),
        Judgments(N, ["wet", "wet"], [(0,), (0,)]),
    ]  # fmt: skip
    assert len({one.fingerprint for one in others}) == len(others)
    assert Judgments(N, ("wet",), [(np.int32(0),)]).fingerprint == others[0].fingerprint


def test_interactions_keep_their_fingerprint_and_how_histories_are_written(tmp_path):
    two = make_interactions(raw_titles=2)
    assert two.fingerprint != make_interactions().fingerprint
    two.save(tmp_path)
    assert Interactions.load(tmp_path).raw_titles == 2 and Interactions.load(tmp_path).fingerprint == two.fingerprint


# ---- Negatives


def test_anti_affinity_finds_the_items_with_the_most_negative_weights(monkeypatch):
    monkeypatch.setattr(negatives, "POOL", 3)
    given_ = make_interactions(40)
    ease = retrievers.open("ease", make_catalog(), None, given_, regularization=1.0)
    pairs = from_interactions(given_, TEXTS, 1, None, 0)
    found = negatives.anti_affinity(pairs, ease, N, 2, seed=0)
    b = weights_of(ease)
    assert found.shape == (len(pairs), 2) and (found >= 0).any()
    for x in range(len(pairs)):
        total = b[list(pairs.histories[x])].sum(0)
        ordered = [row for row in np.argsort(total, kind="stable") if total[row] < 0 and row not in pairs.known_of(x)]
        real = found[x][found[x] >= 0].tolist()
        assert set(real) <= set(ordered[:3]) and len(set(real)) == len(real) == min(2, len(ordered))


def test_hard_negatives_are_text_neighbours_that_are_not_relevant(monkeypatch):
    from retrievers.text.exact_search import Exact

    monkeypatch.setattr(negatives, "POOL", 4)
    pairs = from_judgments(JUDGMENTS, 1, None, 0)
    rng = np.random.default_rng(0)
    documents, queries = rng.normal(size=(N, 8)).astype(np.float16), rng.normal(size=(3, 8)).astype(np.float32)
    found = negatives.text_neighbours(pairs, queries, Exact(documents, "cpu"), 5, seed=0)
    for x in range(len(pairs)):
        scores = documents.astype(np.float32) @ queries[pairs.query[x]]
        ordered = [row for row in np.argsort(-scores) if row not in pairs.known_of(x)]
        assert sorted(found[x].tolist()) == sorted([-1, *ordered[:4]])  # There are four candidates for five places.


# ---- The loss


def brute_force(columns, labels, objective) -> float:
    """The loss by the formula at the head of loss.py, one pair after another, in float64."""

    def cosine(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    size, m = len(labels), labels.shape[1] - 3
    documents = [(columns[1][i], labels[i, 2], True) for i in range(size)]
    documents += [(columns[2 + k][i], labels[i, 3 + k], False) for k in range(m) for i in range(size)]
    losses, divergences = [], []
    for i in range(size):
        known = set(objective.known[objective.offsets[labels[i, 0]] : objective.offsets[labels[i, 0] + 1]].tolist())
        terms, before, now = [], [], []
        for j, (vector, row, drawn) in enumerate(documents):
            if row < 0:
                continue
            score = objective.scale * cosine(columns[0][i], vector)
            now.append(score)
            if objective.frozen is not None:
                before.append(objective.scale * cosine(objective.frozen[0][labels[i, 1]], objective.frozen[1][row]))
            correction = objective.correction[row] if drawn and objective.correction is not None else 0.0
            if j == i:
                own = score - correction
            if j == i or row not in known:
                terms.append(score - correction)
        losses.append(np.log(np.exp(np.array(terms)).sum()) - own)
        if before:
            p = np.exp(np.array(before) - np.logaddexp.reduce(before))
            divergences.append((p * (np.log(p) - (np.array(now) - np.logaddexp.reduce(now)))).sum())
    loss = float(np.mean(losses))
    return loss if not objective.keep else (1 - objective.keep) * loss + objective.keep * float(np.mean(divergences))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 0.3]), st.integers(0, 999))
def test_the_loss_is_the_brute_force(size, m, log_q, keep, seed):
    import torch

    rng = np.random.default_rng(seed)
    n, d, groups = 9, 4, 3
    known = [np.sort(rng.choice(n, rng.integers(1, 4), replace=False)) for _ in range(groups)]
    group = rng.integers(0, groups, size)
    positive = np.array([rng.choice(known[g]) for g in group])
    others = rng.integers(-1, n, (size, m))
    for i in range(size):
        others[i][np.isin(others[i], known[group[i]])] = -1
    labels = np.column_stack([group, rng.integers(0, 5, size), positive, others])
    objective = Objective(
        7.0,
        correction_of(np.concatenate([positive, positive[:1]]), n) if log_q else None,
        np.concatenate([[0], np.cumsum([len(k) for k in known])]),
        np.concatenate(known),
        keep,
        (rng.normal(size=(5, d)).astype(np.float32), rng.normal(size=(n, d)).astype(np.float16)) if keep else None,
    )
    columns = [rng.normal(size=(size, d)) for _ in range(2 + m)]
    found = objective.of_embeddings([torch.from_numpy(c) for c in columns], torch.from_numpy(labels))
    assert float(found) == pytest.approx(brute_force(columns, labels, objective), abs=1e-5)


@pytest.mark.slow
def test_without_correction_it_is_the_library_s_loss():
    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch import nn

    rng = np.random.default_rng(0)
    columns = [torch.from_numpy(rng.normal(size=(5, 8))) for _ in range(3)]
    labels = torch.from_numpy(np.column_stack([np.arange(5), np.arange(5), np.arange(5), np.arange(5) + 5]))
    objective = Objective(20.0, None, np.arange(6), np.arange(5))
    theirs = MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings(columns, labels)
    assert float(objective.of_embeddings(columns, labels)) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.slow
def test_gradient_caching_changes_no_gradient():
    import torch
    from torch import nn

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inside = nn.Linear(6, 4)

        def forward(self, features):
            return {"sentence_embedding": self.inside(features["input_ids"])}

    rng = np.random.default_rng(0)
    features = [{"input_ids": torch.from_numpy(rng.normal(size=(7, 6)).astype(np.float32))} for _ in range(3)]
    labels = torch.from_numpy(np.column_stack([np.arange(7), np.arange(7), np.arange(7), [-1, *range(7, 13)]]))
    objective = Objective(20.0, correction_of(np.array([0, 1, 1, 2, 3, 4, 5, 6]), 13), np.arange(8), np.arange(7))
    found = []
    for mini_batch in (None, 3):
        model = Linear()
        loss = as_module(model, objective, mini_batch)(features, labels)
        loss.backward()
        found.append((float(loss), model.inside.weight.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5) and found[0][1].abs().max() > 0.01


def test_the_correction_is_the_log_of_the_frequency_beside_the_mean():
    found = correction_of(np.array([3, 3, 3, 0]), 5)  # The frequencies are 3 and 1, and 2 on average.
    assert found == pytest.approx([np.log(0.5), 0, 0, np.log(1.5), 0])


# ---- Fits


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny encoder of the catalogue's words."""
    return str(tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", [*TEXTS, *JUDGMENTS.queries, "seat"]))


FIT = {"epochs": 2, "batch_size": 16, "learning_rate": 0.01}


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs what the process of a fit runs in the process of the test, which has imported everything already."""
    monkeypatch.setattr(job, "_run", lambda folder, device: train.run(folder))


@pytest.fixture(scope="module")
def fitted(encoder, tmp_path_factory):
    """A folder with an index that was tuned on interactions by a process of its own, with all kinds of negatives."""
    folder = tmp_path_factory.mktemp("fitted")
    more = {"hard": 1, "anti_affinity": 1, "keep": 0.1, "affinity": {"kind": "ease", "params": {"regularization": 1.0}}}
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, **more}}
    made = retrievers.open("dense", make_catalog(), folder / "index", make_interactions(), **params)
    return folder, params, made


@pytest.mark.slow
def test_a_fit_leaves_a_tuned_encoder_and_a_report(fitted, encoder):
    folder, _, made = fitted
    report = made.report
    assert report["on"] == "interactions" and report["pairs"] == 120 and report["ran"] == len(report["ndcg@10"]) == 2
    assert (report["steps"], report["batch"]) == (8, 15)
    metrics = [report["before"], *report["ndcg@10"]]
    assert report["epochs"] == int(np.argmax(metrics)) > 0 and all(0 <= metric <= 1 for metric in metrics)
    assert retrievers.fitted_on(made) == {make_interactions().fingerprint} and retrievers.reads_text(made)
    assert list(retrievers.fits(made)) == [("dense", report)]
    client = retrievers.open("remote", make_catalog(), url=serve(made, make_catalog()))
    assert retrievers.fitted_on(client) == retrievers.fitted_on(made) and client.fingerprint == made.fingerprint
    own = Encoder(str(folder / "index" / "encoder"))
    assert own._model.max_seq_length == 64
    assert np.allclose(own.documents(TEXTS), made.embeddings, atol=1e-3)
    frozen = retrievers.open("dense", make_catalog(), model=encoder, device="cpu")
    assert not np.allclose(frozen.embeddings, made.embeddings, atol=1e-2) and retrievers.fitted_on(frozen) == set()
    assert sorted(path.name for path in folder.iterdir()) == ["index", "index.lock"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
def test_the_metric_of_the_report_is_that_of_the_retriever(fitted):
    _, _, made = fitted
    data = make_interactions()
    texts = [raw_query(TEXTS, history, 1) for history in data.validation_histories]
    asked = [Query(text, history) for text, history in zip(texts, data.validation_histories, strict=True)]
    ranks = retrievers.Unseen(made, N).ranks(asked, np.array(data.validation_targets)[:, None])[:, 0]
    expected = np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
    assert made.report["ndcg@10"][made.report["epochs"] - 1] == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_another_engine_uses_the_tuned_encoder_again(fitted, monkeypatch):
    folder, params, made = fitted
    monkeypatch.setattr(job, "tune", lambda *_: pytest.fail("tuned again"))
    again = retrievers.open("dense", make_catalog(), folder / "index", make_interactions(), **params)
    assert again.fingerprint == made.fingerprint
    faiss = retrievers.open("dense", make_catalog(), folder / "faiss", make_interactions(), **params, engine="faiss")
    queries = [Query("garden"), Query("lamp")]
    assert faiss.search(queries, 5).rows.tolist() == made.search(queries, 5).rows.tolist()
    assert faiss.report == made.report and faiss.fingerprint != made.fingerprint
    shutil.rmtree(folder / "faiss")


@pytest.mark.slow
def test_a_folder_of_other_data_or_a_damaged_encoder_is_refused(fitted, tmp_path, monkeypatch):
    folder, params, _ = fitted
    with pytest.raises(RetrieverError, match="built with another encoder"):
        retrievers.open("dense", make_catalog(), folder / "index", make_interactions(seed=1), **params)
    shutil.copytree(folder / "index", tmp_path / "index")
    weights = tmp_path / "index" / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(RetrieverError, match=r"is damaged .*tuned encoder.*delete the folder"):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("tuned again, as the damaged encoder is not taken"))
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        retrievers.open("dense", make_catalog(), tmp_path / "other", make_interactions(), engine="faiss", **params)
    shutil.rmtree(tmp_path / "index" / "encoder")
    with pytest.raises(RetrieverError, match=r"is damaged .*tuned encoder.*delete the folder"):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_interrupted_fit_continues_and_ends_the_same(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STEPS_BETWEEN_CHECKPOINTS", 3)  # Eight steps in an epoch, so that one is in the middle.
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "epochs": 3}}
    whole = retrievers.open("dense", make_catalog(), tmp_path / "whole" / "index", make_interactions(), **params)
    real, calls = train.measure, []

    def interrupted(*given_):
        calls.append(1)
        if len(calls) == 3:  # At the end of the second epoch.
            raise KeyboardInterrupt
        return real(*given_)

    folder = tmp_path / "cut" / "index"
    with monkeypatch.context() as patch:
        patch.setattr(train, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("dense", make_catalog(), folder, make_interactions(), **params)
    assert not folder.exists()
    assert train.last_checkpoint(folder.parent / ".index.tuning" / "checkpoints").name == "checkpoint-15"
    measured = []
    monkeypatch.setattr(train, "measure", lambda *given_: measured.append(1) or real(*given_))
    again = retrievers.open("dense", make_catalog(), folder, make_interactions(), **params)
    assert len(measured) == 2 and again.report == whole.report and again.fingerprint == whole.fingerprint
    assert sorted(path.name for path in folder.parent.iterdir()) == ["index", "index.lock"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_lora_is_merged_and_the_seed_decides(encoder, tmp_path):
    lora = {"r": 2, "target_modules": ["query", "value", "dense"]}
    made = {}
    for name, seed, held in (("a", 0, 0), ("b", 0, 0), ("c", 1, 0)):
        params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "epochs": 1, "lora": lora, "seed": seed}}
        data = make_interactions(held=held)
        made[name] = retrievers.open("dense", make_catalog(), tmp_path / name / "index", data, **params)
    assert made["a"].report["epochs"] == 1 and made["a"].report["ndcg@10"] == [None]  # There is no validation split.
    assert made["a"].fingerprint == made["b"].fingerprint != made["c"].fingerprint
    assert not list(tmp_path.rglob("adapter*"))
    frozen = retrievers.open("dense", make_catalog(), model=encoder, device="cpu", tuned=None)
    assert not np.allclose(frozen.embeddings, made["a"].embeddings, atol=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_judgments_teach_words_that_no_document_has(encoder):
    tuned = {**FIT, "epochs": 8, "batch_size": 8, "learning_rate": 0.05}
    made = retrievers.open("dense", make_catalog(), None, judgments=JUDGMENTS, model=encoder, device="cpu", tuned=tuned)
    assert made.report["on"] == "judgments" and retrievers.fitted_on(made) == {JUDGMENTS.fingerprint}
    no_validation = Judgments(N, JUDGMENTS.queries, JUDGMENTS.rows)
    made = retrievers.open("dense", make_catalog(), judgments=no_validation, model=encoder, device="cpu", tuned=tuned)
    found = made.search([Query(text) for text in JUDGMENTS.queries], 5).rows
    assert all(set(rows) <= set(top.tolist()) for rows, top in zip(JUDGMENTS.rows, found, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_loss_that_is_not_finite_ends_the_fit(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "of_embeddings", lambda self, columns, labels: columns[0].sum() * float("nan"))
    params = {"model": encoder, "device": "cpu", "tuned": FIT}
    with pytest.raises(
        ValueError, match=r"tuned\.learning_rate: the loss is nan after 8 steps: lower it, 0\.01 is too"
    ):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(held=0), **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_mistake_that_only_the_fit_sees_is_one_line(encoder, tmp_path):
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "lora": {"r": 2, "target_modules": ["nowhere"]}}}
    message = r"retriever\.params\.tuned\.lora: .*nowhere.*: change its options"
    with pytest.raises(ValueError, match=message):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)
    assert train.main([str(tmp_path / ".index.tuning")]) == 2
    assert re.match(message, (tmp_path / ".index.tuning" / ERROR).read_text())


# ---- What is refused, and what depends on data


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (3, "tuned must be null or a mapping, got 3: write {}"),
        ({"epoch": 3}, r"tuned\.epoch: unknown key: did you mean 'epochs'\? Choose from on, epochs"),
        ({"epochs": 0}, r"tuned\.epochs must be an integer from 1, got 0: the default is 3"),
        ({"epochs": True}, r"tuned\.epochs must be an integer from 1, got True"),
        ({"positives": 0.5}, r"tuned\.positives must be null or an integer from 1, got 0\.5: the default is 5"),
        ({"batch_size": 1}, r"tuned\.batch_size must be an integer from 2, got 1"),
        ({"learning_rate": 0}, r"tuned\.learning_rate must be a number above 0 to below 1, got 0"),
        ({"learning_rate": "1e-5"}, r"tuned\.learning_rate must be a number above 0 to below 1, got '1e-5'"),
        ({"keep": 1.0}, r"tuned\.keep must be a number from 0 to below 1, got 1\.0: the default is 0"),
        ({"warmup": float("nan")}, r"tuned\.warmup must be a number from 0 to below 1, got nan"),
        ({"log_q": 1}, r"tuned\.log_q must be true or false, got 1: the default is true"),
        ({"on": "clicks"}, r"tuned\.on: unknown 'clicks': choose interactions, judgments or null"),
        ({"affinity": "ease"}, r"tuned\.affinity must be a mapping with a kind, such as {kind: ease}, got 'ease'"),
        ({"affinity": {"kind": "ease", "top": 1}}, r"tuned\.affinity: unknown key 'top': choose from kind, params"),
        ({"affinity": {"kind": "sansa"}}, r"tuned\.affinity: nothing reads it without anti_affinity: set that"),
        ({"lora": True}, r"tuned\.lora must be null, or a mapping of peft's options"),
        ({"lora": {"rank": 2}}, r"tuned\.lora: unknown option 'rank': see peft's LoraConfig"),
    ],
)
def test_a_wrong_value_is_named(tuned, message):
    with pytest.raises(ValueError, match=message):
        Params(tuned=tuned)
    with pytest.raises(ValueError, match=message):
        retrievers.check_parameters("hybrid", {"retrievers": [{"kind": "dense", "params": {"tuned": tuned}}]})


def test_cosines_need_normalised_embeddings():
    with pytest.raises(ValueError, match=r"params\.tuned: needs normalize: true"):
        Params(tuned={}, normalize=False)


def test_only_a_tuned_encoder_is_fitted():
    assert retrievers.fit_data("dense", {}) == set() and not retrievers.takes_interactions("dense", {"tuned": None})
    assert retrievers.fit_data("dense", {"tuned": {}}) == {"interactions", "judgments"}
    assert retrievers.fit_data("dense", {"tuned": {"on": "judgments"}}) == {"judgments"}
    nested = {"retrievers": [{"kind": "bm25"}, {"kind": "dense", "params": {"tuned": {"on": "interactions"}}}]}
    assert retrievers.fit_data("hybrid", nested) == {"interactions"} and retrievers.takes_interactions("hybrid", nested)
    assert retrievers.fit_data("ease", {}) == {"interactions"} and retrievers.fit_data("bm25", {}) == set()


@pytest.mark.parametrize(
    ("tuned", "data", "message"),
    [
        ({}, {}, "the encoder is tuned on interactions or judgments, but there are none"),
        ({"on": "judgments"}, {"interactions": make_interactions()}, "tuned on judgments, but there are none"),
        ({}, {"interactions": make_interactions(), "judgments": JUDGMENTS}, "choose one of them"),
        ({}, {"judgments": Judgments(3, ["a"], [(0,)])}, f"3 documents for a catalogue of {N}"),
        ({"anti_affinity": 1}, {"judgments": JUDGMENTS}, "anti_affinity: 1 needs histories, and judgments have none"),
        ({}, {"judgments": Judgments(N, ["a"], [(0,)])}, "an epoch has 1 pairs"),
        ({"anti_affinity": 1, "affinity": {"kind": "eas"}}, {"interactions": make_interactions()},
         r"tuned\.affinity: retriever\.kind: unknown 'eas': did you mean 'ease'"),
        ({"anti_affinity": 1, "affinity": {"kind": "ease", "params": {"top": 0}}},
         {"interactions": make_interactions()}, r"tuned\.affinity: retriever\.params\.top"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_is_tuned(tuned, data, message, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        retrievers.open("dense", make_catalog(), tmp_path / "index", tuned=tuned, device="cpu", **data)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("exit 1", RetrieverError, "ended with exit code 1 .*start it again.*continues from the last checkpoint in"),
        ("kill -9 $$", RetrieverError, "ended with signal 9, which is often a lack of memory: lower tuned.batch_size"),
        (
            "echo 'retriever.params.tuned.lora: no' > $3/error.txt; exit 2",
            ValueError,
            "^retriever.params.tuned.lora: no$",
        ),
        ("exit 0", RetrieverError, "ended with exit code 0"),
    ],
)
def test_a_process_that_ends_without_a_result_says_why_and_how_to_go_on(script, error, message, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(job.sys, "executable", str(program))
    with pytest.raises(error, match=message):
        job._run(tmp_path, "cpu")


def test_the_process_has_no_launcher_and_one_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = job._environment("cuda:3")
    assert env["CUDA_VISIBLE_DEVICES"] == "3" and not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"} & set(env)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [job._environment(device)["CUDA_VISIBLE_DEVICES"] for device in (None, "cuda:1", "cuda")] == ["4", "6", "4"]


def test_a_checkpoint_that_was_cut_off_is_not_taken(tmp_path):
    assert train.last_checkpoint(tmp_path) is None
    for step, text in ((5, json.dumps({"global_step": 5})), (10, '{"global_st'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert train.last_checkpoint(tmp_path).name == "checkpoint-5"
