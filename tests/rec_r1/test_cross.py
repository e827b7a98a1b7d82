"""Cross-attention behind an encoder: its numbers by brute force, and a constructed case for each verdict."""

import itertools
import json

import numpy as np
import pytest
import tiny_models
from datasets_ import plain_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import Page

from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.evaluation.significance import over_seeds, resampled_over_seeds
from rec_r1.similarity_gap import claims, cross, cross_sentences, systems, tuned_claims
from rec_r1.similarity_gap.utility import MAIN, METRICS
from retrievers.text.tuning import job, train

Q, M = 200, 10
USERS = [f"u{q // 2}" for q in range(Q)]


def values_of(probability, seed, fits=1):
    """(S, Q, M) values of queries whose target is first with a probability, and else not found."""
    first = np.random.default_rng(seed).random((fits, Q)) < probability
    return np.repeat(first[..., None].astype(float), len(METRICS), axis=2)


def measured(before, after, perfect, best, fits=3):
    """The claims where the encoder, the cross-encoder, the perfect order and EASE find these shares of the targets."""
    values = {
        key: values_of(share, 1, fits) for key, share in (("before", before), ("after", after), ("perfect", perfect))
    }
    others = {"ease": values_of(best, 1)[0], "popularity of a kind": values_of(0.05, 9)[0]}
    rows, shown = cross.tested("text", M, values, others, USERS, values["perfect"][..., 0])
    return {row["key"]: row for row in rows}, shown, values, others


@pytest.mark.parametrize(
    ("shares", "verdicts", "phrase", "limit"),
    [
        ((0.2, 0.6, 0.9, 0.5), (claims.STANDS, claims.RELAXED), "closes the rest here", "the order limits"),
        ((0.2, 0.35, 0.6, 0.8), (claims.STANDS, claims.STANDS), "closes only a part", "the list of documents limits"),
        (
            (0.2, 0.2, 0.9, 0.6),
            (claims.RELAXED, claims.STANDS),
            "does not close the rest here, and is not",
            "the order limits",
        ),
        ((0.5, 0.6, 0.7, 0.3), (claims.STANDS, claims.RELAXED), "No gap is shown to remain", "the order limits"),
    ],
)
def test_each_verdict_has_a_case(shares, verdicts, phrase, limit):
    rows, shown, _, _ = measured(*shares)
    assert (rows["cross-attention"]["verdict"], rows["the rest"]["verdict"]) == verdicts
    assert phrase in shown["sentences"][0] and limit in shown["sentences"][1]
    assert rows["the rest"]["systems"] == {"full": "ease", "reduced": "text + cross-encoder"}


def test_few_users_leave_both_undecided():
    noisy = {key: values_of(0.4, seed)[:, :20] for key, seed in (("before", 1), ("after", 2), ("perfect", 3))}
    others = {"ease": values_of(0.4, 4)[0, :20]}
    rows, shown = cross.tested("text", M, noisy, others, USERS[:20], noisy["perfect"][..., 0])
    assert [row["verdict"] for row in rows] == [claims.UNDECIDED] * 2
    assert "not shown to find more or less" in shown["sentences"][1]


@pytest.mark.parametrize(
    ("verdicts", "phrase"),
    [
        ((claims.STANDS, claims.UNDECIDED), "closes a part of the rest here, and whether it closes all of it is und"),
        ((claims.UNDECIDED, claims.UNDECIDED), "is shown neither to close the rest here nor to leave a part of it"),
        ((claims.UNDECIDED, claims.RELAXED), "Cross-attention closes the rest here"),
    ],
)
def test_a_sentence_follows_from_the_verdicts(verdicts, phrase):
    gap = {"mean": 0.2, "low": 0.1, "high": 0.3}
    said = cross_sentences.closed("full", "text", "ease", verdicts, gap, {"mean": 0.5, "low": 0.2, "high": 0.8}, 2)
    assert phrase in said and "50% [20%, 80%] of the gap between text and ease" in said


def test_shares_are_those_of_the_means_and_of_each_resample():
    _, shown, values, others = measured(0.2, 0.35, 0.6, 0.8)
    main = METRICS.index(MAIN)
    parts = [values[key][..., main] for key in ("before", "after", "perfect")]
    before, after, perfect, best = *(part.mean() for part in parts), others["ease"][:, main].mean()
    means = [row["mean"] for row in shown["systems"]]
    assert means == pytest.approx([before, after, perfect, best])
    shares = [row["share"]["mean"] for row in shown["systems"]]
    assert shares == pytest.approx([0, (after - before) / (best - before), (perfect - before) / (best - before), 1])
    stacked = np.stack([*parts, np.broadcast_to(others["ease"][:, main], parts[0].shape)], axis=-1)
    draws = resampled_over_seeds(stacked, USERS)
    each = (draws[:, 1] - draws[:, 0]) / (draws[:, 3] - draws[:, 0])
    row = shown["systems"][1]["share"]
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(each, [2.5, 97.5])))
    for place, part in enumerate(parts):
        low, high = np.percentile(draws[:, place], [2.5, 97.5])
        found = over_seeds(part, USERS)
        assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert shown["gap"]["low"] > 0 and shown["recall"]["mean"] == pytest.approx(perfect)


def test_no_gap_has_no_shares():
    _, shown, _, _ = measured(0.5, 0.6, 0.7, 0.3)
    assert all(row["share"]["mean"] is None for row in shown["systems"])
    assert "which is" not in shown["sentences"][1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=3, max_size=3, unique=True), st.integers(1, 8), st.permutations([1, 2, 3]))
def test_the_perfect_order_is_the_best_of_all(ranks, m, grades):
    """Against all orders of the first m documents, by the discounted gain of the targets' grades."""
    given_, graded = np.array([ranks], np.int32), np.array([grades], np.float32)

    def gain(found):
        return sum(g / np.log2(1 + r) for r, g in zip(found, grades, strict=True) if r > 0)

    found = cross.perfect(given_, graded, m)[0].tolist()
    inside = [0 < rank <= m for rank in ranks]
    assert all(new == old for new, old, moved in zip(found, ranks, inside, strict=True) if not moved)
    count = sum(inside)
    best = max(
        gain([order[sum(inside[:t])] if moved else ranks[t] for t, moved in enumerate(inside)])
        for order in itertools.permutations(range(1, m + 1), count)
    )
    assert gain(found) == pytest.approx(best)
    assert cross.listed(given_, np.array([[1, 2, 3]]), m).tolist() == [count / 3]


def test_whole_users_are_drawn():
    places = cross.drawn(USERS, 50)
    assert len(places) == 50 and np.array_equal(places, cross.drawn(USERS, 50))
    names = [USERS[place] for place in places]
    assert all(names.count(name) == 2 for name in names)
    assert cross.drawn(USERS, Q).tolist() == list(range(Q)) == cross.drawn(USERS, 10 * Q).tolist()
    assert len({USERS[place] for place in cross.drawn(USERS, 1)}) == 10  # The fewest that an interval needs.


def recipe_of(folder, kind="rerank", params="{}"):
    return config.load(
        "cpu/sequential", [f"task.path={folder}", f"retriever.kind={kind}", f"retriever.params={params}"]
    )


def test_the_recipe_says_how_a_cross_encoder_is_made(tmp_path):
    folder = plain_folder(tmp_path / "shop")
    assert cross.settings_of(recipe_of(folder, "dense")) == (None, cross.TUNED, cross.DEPTHS, {})
    assert cross.settings_of(recipe_of(folder)) == (None, cross.TUNED, cross.DEPTHS, {})
    named = recipe_of(folder, params="{model: cross, m: 7, batch_size: 8, retriever: {kind: dense}}")
    assert cross.settings_of(named) == ("cross", None, (7,), {"batch_size": 8})
    with pytest.raises(UserError, match=r"retriever\.params\.m must be"):
        tuned_claims.settings_of(recipe_of(folder, params="{m: 0}"))


# ---- The page


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_models.encoder(folder / "encoder"), tiny_models.cross_encoder(folder / "cross")


def call(folder, out, encoder, params, *more):
    return cli.main(
        [
            "similarity-gap", "cpu/sequential", f"task.path={folder}", "retriever.kind=rerank",
            f"retriever.params={json.dumps(params)}", "--encoder", str(encoder), "--on", "ease {regularization: 10}",
            "-o", str(out), *more,
        ]
    )  # fmt: skip


@pytest.mark.slow
def test_the_page_has_a_tuned_cross_encoder_and_a_second_call_fits_nothing(tmp_path, models, monkeypatch):
    fits = []

    def run(where, _device):
        fits.append(json.loads((where / "job.json").read_text())["tuned"])
        return train.run(where)

    monkeypatch.setattr(job, "_run", run)
    folder, out = plain_folder(tmp_path / "shop"), tmp_path / "out"
    tuned = {"epochs": 1, "positives": 1, "batch_size": 16, "learning_rate": 0.01}
    params = {
        "tuned": {"epochs": 1, "batch_size": 4, "learning_rate": 0.003, "pairs": 8},
        "retriever": {"kind": "dense", "params": {"tuned": tuned}},
    }
    assert call(folder, out, models[0], params, "--seeds", "2") == 0
    assert [each["seed"] for each in fits] == [0, 1, 0, 1] and [each.get("pairs") for each in fits[2:]] == [8, 8]
    found = json.loads((out / "similarity-gap.json").read_text())
    section, rows = found["claims"]["cross"], {row["key"]: row for row in found["claims"]["rows"]}
    page = Page(out / "similarity-gap.html")
    assert section["fits"] == 2 and section["queries"] == section["of"] == 12 and len(section["epochs"]) == 2
    assert set(section["depths"]) == {"10", "20", "40"} and str(section["m"]) in section["depths"]
    assert section["depths"][str(section["m"])] == max(section["depths"].values())
    assert all(sentence in page.text for sentence in section["sentences"]) and len(section["sentences"]) == 2
    before, after, perfect, _ = (row["mean"] for row in section["systems"])
    assert before == pytest.approx(rows["tuning"]["full"]) and perfect >= max(before, after)
    assert rows["cross-attention"]["lead"]["mean"] == pytest.approx(after - before)
    assert rows["cross-attention"]["sentence"] in page.text and rows["the rest"]["sentence"] in page.text
    fits.clear()
    monkeypatch.setattr(systems, "_ranks", lambda *_: pytest.fail("ranked again"))
    assert call(folder, out, models[0], params, "--seeds", "2") == 0 and not fits


@pytest.mark.slow
def test_quick_takes_a_cross_encoder_that_the_recipe_names(tmp_path, models):
    folder, out = plain_folder(tmp_path / "shop"), tmp_path / "out"
    assert call(folder, out, models[0], {}, "--quick") == 0
    rows = {row["key"]: row for row in json.loads((out / "similarity-gap.json").read_text())["claims"]["rows"]}
    assert rows["the rest"]["sentence"] == f"Not measured: {cross.QUICK}."
    assert call(folder, out, models[0], {"model": str(models[1]), "m": 5}, "--quick") == 0
    section = json.loads((out / "similarity-gap.json").read_text())["claims"]["cross"]
    assert section["m"] == 5 and section["epochs"] == [None] and section["encoder"] == f"text: {models[0]}"
    assert "is not tuned" in Page(out / "similarity-gap.html").text
