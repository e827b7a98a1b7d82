"""The similarity gap: every figure against brute force or scipy, sentences in both directions, the page as a whole."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from datasets_ import plain_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from test_report import Page

import retrievers
from rec_r1 import claims, cli, config, divergence, gap_page, gap_systems, utility
from rec_r1.config import UserError
from rec_r1.gap import measure
from rec_r1.significance import bootstrap, resampled
from rec_r1.tasks import Split
from retrievers import lsa

pytestmark = pytest.mark.slow  # fits of several recommenders, and LSA: with the real trainings

SEED = np.random.default_rng


def matrix(seed=0, users=40, items=15, share=0.25):
    return csr_matrix((SEED(seed).random((users, items)) < share).astype(np.float32))


def vectors(seed=0, items=15, d=4):
    found = SEED(seed).normal(size=(items, d)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


# ---- divergence


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=3, max_size=40))
def test_spearman_is_scipy_s(pairs):
    one, two = map(np.array, zip(*pairs, strict=True))
    mine = divergence.spearman(one, two)
    if len(set(one)) == 1 or len(set(two)) == 1:
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(scipy.stats.spearmanr(one, two).statistic)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_auc_counts_pairs_and_ties_by_half(positive, negative):
    by_hand = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert divergence.auc(np.array(positive), np.array(negative)) == pytest.approx(by_hand)


def test_auc_by_hand_and_of_nothing():
    assert divergence.auc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == pytest.approx(3.5 / 4)
    assert math.isnan(divergence.auc(np.array([]), np.array([1.0])))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_cosines_and_neighbours_are_brute_force_s(seed):
    x = matrix(seed)
    dense = x.toarray()
    counts = divergence.cooccurrence(x)
    expected = dense.T @ dense
    np.fill_diagonal(expected, 0)
    assert (counts.toarray() == expected).all()
    norms = np.linalg.norm(dense, axis=0)
    cosine = divergence.cosines(counts, dense.sum(axis=0))
    wanted = expected / np.maximum(np.outer(norms, norms), 1e-9)
    np.testing.assert_allclose(cosine.toarray(), wanted, rtol=1e-5)
    for i, found in enumerate(divergence.top_together(cosine, 4)):
        row = cosine.toarray()[i]
        order = sorted((j for j in range(15) if row[j] > 0), key=lambda j: (-row[j], j))
        assert found.tolist() == order[:4]
    e = vectors(seed)
    products = e @ e.T
    for i, found in enumerate(divergence.top_text(e, 4, block=6)):
        assert i not in found
        others = np.delete(products[i], i)
        np.testing.assert_allclose(products[i][found], np.sort(others)[::-1][:4], rtol=1e-5)


def test_overlap_and_apart_are_brute_force_s_under_any_labels():
    x, e, rng = matrix(3, share=0.08), vectors(3), SEED(5)
    counts = divergence.cooccurrence(x)
    lists = divergence.top_together(divergence.cosines(counts, x.toarray().sum(axis=0)), 4)
    text, met = divergence.top_text(e, 4), divergence.together(counts)
    for labels in (np.arange(15), rng.permutation(15)):
        by_hand, alone = [], []
        for a in range(15):
            near = {int(labels[b]) for b in text[a]}
            item = int(labels[a])
            alone += [counts[item, b] == 0 for b in near]
            if len(lists[item]):
                by_hand.append(len(near & set(lists[item].tolist())) / len(lists[item]))
        assert divergence.overlap(text, lists)(labels) == pytest.approx(np.mean(by_hand))
        assert divergence.apart(text, met)(labels) == pytest.approx(np.mean(alone))


def test_the_null_is_of_relabelled_texts():
    e, rng = vectors(1), SEED(0)
    i, j = divergence.any_pairs(15, rng)
    assert len(i) == 105 and (i < j).all()
    values = SEED(9).random(105)
    statistic = divergence.of_pairs(divergence.similarity(e), i, j, values)
    labels = rng.permutation(15)
    renamed = [float(e[labels[a]] @ e[labels[b]]) for a, b in zip(i, j, strict=True)]
    assert statistic(labels) == pytest.approx(scipy.stats.spearmanr(renamed, values).statistic, abs=1e-4)
    found = divergence.null(statistic, 15, SEED(0), 300)
    assert found["null_low"] < found["null_mean"] < found["null_high"] and abs(found["null_mean"]) < 0.05
    assert found["value"] == statistic(np.arange(15))


def test_a_planted_relation_is_found_and_none_is_not():
    blocks = np.repeat(np.arange(6), 5)  # items of six topics; users stay within one
    rng = SEED(0)
    topical = csr_matrix(np.stack([(blocks == u % 6) & (rng.random(30) < 0.7) for u in range(80)]).astype(np.float32))
    e = np.eye(6, dtype=np.float32)[blocks] + 0.1 * rng.normal(size=(30, 6)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    related = divergence.measure(e, topical)["measures"]
    for name, sign in (("overlap", 1), ("apart", -1), ("auc", 1), ("cosine_any", 1)):
        assert claims.place(related[name]) == sign, name
    assert related["auc"]["value"] > 0.95
    unrelated = divergence.measure(e[rng.permutation(30)], topical)["measures"]
    assert abs(unrelated["auc"]["value"] - 0.5) < 0.1 and abs(unrelated["cosine_any"]["value"]) < 0.15


def test_negatives_never_met_and_are_as_popular():
    x = matrix(2, users=60, items=80, share=0.05)
    popularity, counts = x.toarray().sum(axis=0).astype(int), divergence.cooccurrence(x)
    met, rng = divergence.together(counts), SEED(0)
    i, j = divergence.met_pairs(counts, rng)
    assert len(i) == counts.nnz // 2
    kept, other, found = divergence.matched_negatives(i, j, popularity, met, rng)
    assert found.mean() > 0.9
    replaced = np.where(kept == i, j, i)
    classes = np.floor(np.log2(np.maximum(popularity, 1)))
    for a, b, old in zip(kept[found], other[found], replaced[found], strict=True):
        assert a != b and counts[a, b] == 0 and classes[b] == classes[old]
    few = divergence.met_pairs(counts, rng, 10)
    assert len(few[0]) == 10 and met.has(*few).all()
    everyone = divergence.cooccurrence(csr_matrix(np.ones((3, 5), np.float32)))
    i, j = divergence.met_pairs(everyone, rng)
    assert not divergence.matched_negatives(i, j, np.full(5, 3), divergence.together(everyone), rng)[2].any()


def test_ease_s_weights_are_read_by_blocks_and_items_without_choices_left_out():
    x = matrix(4).toarray()
    x[:, [2, 7]] = 0
    b = SEED(1).normal(size=(15, 15))
    e = vectors(4)
    found = divergence.measure(e, csr_matrix(x), lambda: iter([(0, b[:8]), (8, b[8:])]))
    assert found["items"] == 13
    known = [k for k in range(15) if k not in (2, 7)]
    pairs = [(i, j) for n, i in enumerate(known) for j in known[n + 1 :]]
    expected = scipy.stats.spearmanr(
        [float(e[i] @ e[j]) for i, j in pairs], [(b[i, j] + b[j, i]) / 2 for i, j in pairs]
    ).statistic
    assert found["measures"]["ease_any"]["value"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="no two items"):
        divergence.measure(vectors(), csr_matrix(np.eye(15, dtype=np.float32)))


# ---- utility


def test_resampling_groups_is_the_bootstrap_and_wider_where_users_repeat():
    values = SEED(0).random((200, 2))
    draws = resampled(values, [f"u{q}" for q in range(200)])
    plain = bootstrap(values[:, 0])
    low, high = np.percentile(draws[:, 0], [2.5, 97.5])
    assert (low, high) == pytest.approx((plain["low"], plain["high"]), abs=0.004)
    repeated = np.repeat(values[:20], 10, axis=0)
    users = np.repeat([f"u{q}" for q in range(20)], 10)
    alone = np.ptp(np.percentile(resampled(repeated, range(200))[:, 0], [2.5, 97.5]))
    grouped = np.ptp(np.percentile(resampled(repeated, users)[:, 0], [2.5, 97.5]))
    assert grouped > 2 * alone
    with pytest.raises(ValueError, match="without a number"):
        resampled(np.array([[np.nan]]), ["a"])


def test_metrics_are_those_of_one_target():
    split = Split(list("abc"), ["q"] * 3, [(1,), (2,), (3,)], [(1.0,)] * 3, histories=[(0,)] * 3)
    found = utility.scored(split, np.array([[3], [40], [0]]))
    column = dict(zip(utility.METRICS, found.T, strict=True))
    assert column["ndcg@10"].tolist() == pytest.approx([0.5, 0, 0])
    assert column["recall@50"].tolist() == [1, 1, 0] and column["ndcg@50"][1] == pytest.approx(1 / math.log2(41))


def test_relevant_but_not_similar_looks_at_the_whole_history_and_all_encoders():
    split = Split(list("abc"), ["q"] * 3, [(4,), (4,), (5,)], [(1.0,)] * 3, histories=[(0, 1), (2,), (3, 0)])
    one, two = np.zeros((6, 2), int), np.zeros((6, 2), int)
    one[1] = [4, 2]
    two[2] = [4, 1]
    assert utility.unlike(split, [one]).tolist() == [False, True, True]
    assert utility.unlike(split, [one, two]).tolist() == [False, False, True]


def table(**columns):
    values = {name: np.repeat(np.asarray(v, float)[:, None], len(utility.METRICS), 1) for name, v in columns.items()}
    count = len(next(iter(columns.values())))
    return utility.Table(values, [f"u{q}" for q in range(count)], np.ones(count, bool))


def test_gap_closed_with_negatives_and_where_there_is_none():
    rng = SEED(0)
    text = rng.random(300)
    found = table(text=text, best=text + 0.4, half=text + 0.2 + 0.1 * rng.normal(size=300), worse=text - 0.1)
    assert found.best(found.names) == "best"
    share = found.closed("half", "text", "best")
    assert 0.45 < share["low"] < share["mean"] < share["high"] < 0.55
    assert found.closed("worse", "text", "best")["mean"] == pytest.approx(-0.25)
    assert found.closed("best", "text", "best") == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert found.closed("half", "text", "text") == {"mean": None, "low": None, "high": None}
    unsure = table(text=text, best=text + rng.normal(0.001, 1, 300), other=text)
    assert unsure.closed("other", "text", unsure.best(["text", "best"]))["low"] is None
    lead = found.difference("half", "text")
    assert lead == pytest.approx(found.difference("half", "text")) and lead["low"] > 0


# ---- sentences


def span(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def test_sentences_of_effects_say_what_the_interval_says():
    what = "Clipping"
    assert claims.effect(what, "ndcg@10", span(0.01, 0.002, 0.02)) == (
        "Clipping raised ndcg@10: +0.0100 [+0.0020, +0.0200]."
    )
    assert "lowered ndcg@10: −0.0100" in claims.effect(what, "ndcg@10", span(-0.01, -0.02, -0.002))
    neither = claims.effect(what, "ndcg@10", span(-0.001, -0.004, 0.002))
    assert neither == "Clipping is not shown to change ndcg@10: −0.0010 [−0.0040, +0.0020]."
    assert "changed no query" in claims.effect(what, "ndcg@10", span(0, 0, 0))


def test_sentences_of_the_gap_go_all_ways():
    assert "this is the gap" in claims.gap("m", "t", "b", span(0.1, 0.05, 0.2))
    assert claims.gap("m", "t", "b", span(0.1, -0.05, 0.2)).startswith("No gap is shown")
    assert "no gap to close" in claims.gap("m", "t", "t", span(0, 0, 0))
    assert "undefined" in claims.gap("m", "t", "b", span(0, 0, 0))
    up, down, level = span(0.1, 0.05, 0.2), span(-0.1, -0.2, -0.05), span(0.0, -0.1, 0.1)
    assert claims.closes("x", span(0.5, 0.2, 0.8), up, "t") == "x closes 50% [20%, 80%] of the gap."
    assert "behind t, −50% [−80%, −20%]" in claims.closes("x", span(-0.5, -0.8, -0.2), down, "t")
    assert "not shown to close any" in claims.closes("x", span(0.1, -0.2, 0.3), level, "t")
    assert "undefined" in claims.closes("x", span(None, None, None), level, "t")


@pytest.mark.parametrize(
    ("value", "phrases"),
    [
        (0.9, ("more than chance", "more than of items", "tells items", "go with more")),
        (0.1, ("fewer than chance", "fewer than of items", "is lower for", "go with less")),
        (0.5, ("no more and no fewer", "as many as", "does not tell", "No relation")),
    ],
)
def test_sentences_of_the_divergence_go_by_the_null(value, phrases):
    found = {"value": value, "null_mean": 0.5, "null_low": 0.4, "null_high": 0.6}
    written = (
        claims.neighbours(10, found),
        claims.never_together(10, found),
        claims.tells_apart(found, 5),
        claims.correlation("co-consumption", "any two items", found),
    )
    for sentence, phrase in zip(written, phrases, strict=True):
        assert phrase in sentence
    assert "undefined" in claims.correlation("x", "y", {**found, "value": float("nan")})
    assert "No pair" in claims.tells_apart(found, 0)


@pytest.mark.parametrize(
    ("lead", "phrase"), [(0.1, "100, more than p"), (-0.1, "100, fewer than p"), (0.0, "not shown to be more")]
)
def test_sentence_of_the_targets_no_text_leads_to(lead, phrase):
    found = claims.not_similar(0.4, 12, "ease", span(0.3, 0.2, 0.4), "p", span(lead, lead - 0.05, lead + 0.05))
    assert phrase in found and found.startswith("40% of the targets (12)") and "30.0% [20.0%, 40.0%]" in found


# ---- LSA


def test_lsa_is_scikit_learn_s(tmp_path):
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["Red shoes run", "blue shoes run", "garden hose", "garden can red", "coffee mill", "coffee can"]
    catalog = retrievers.Catalog.from_records([{"id": str(n), "text": t} for n, t in enumerate(texts)])
    folder = lsa.fit(texts, tmp_path / "lsa", dimensions=3)
    dense = retrievers.open("dense", catalog, tmp_path / "index", model=str(folder))
    x = TfidfVectorizer().fit_transform(texts)
    z = TruncatedSVD(3, random_state=0).fit(x).transform(x)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    e = dense.embeddings.astype(float)
    np.testing.assert_allclose(e @ e.T, z @ z.T, atol=2e-3)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert lsa.fit(texts, folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="two different words"):
        lsa.fit(["a", "a a"], tmp_path / "none")


# ---- the verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("gap") / "shop")


ON = ["popularity", "bm25", "itemknn", "ease {regularization: 10}"]


def numbers(value):
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, float):
        yield value


def test_the_whole_verb(folder, tmp_path, capsys):
    on = [word for spec in ON for word in ("--on", spec)]
    arguments = ["similarity-gap", "cpu/sequential", f"task.path={folder}", "--encoder", "lsa", *on]
    assert cli.main([*arguments, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    page = Page(tmp_path / "out" / "similarity-gap.html")
    source = (tmp_path / "out" / "similarity-gap.html").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "out" / "similarity-gap.json").read_text())
    assert all(map(math.isfinite, numbers(found)))
    assert [each["name"] for each in found["systems"]] == ["text: lsa", *ON]
    assert found["utility"][0]["queries"] == 12 and found["about"]["split"].startswith("leave_one_out")
    assert found["gap"]["sentence"] in printed and found["gap"]["sentence"] in page.text
    (clipped,) = found["ablations"]
    assert clipped["base"] == "ease {regularization: 10}" and clipped["sentences"][0] in page.text
    assert {s["name"] for s in found["skipped"]} >= {'ablation vqrec {"continuous": true}'}
    for row in found["utility"][0]["rows"]:
        m = row["metrics"]["recall@10"]
        assert f"{m['mean']:.4f} [{m['low']:.4f}, {m['high']:.4f}]" in page.text
    for sentence in found["divergence"]["encoders"][0]["sentences"]:
        assert sentence in page.text and len(found["divergence"]["encoders"]) == 1
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert source.count("<svg") >= 4 and "#010203" not in source and "#0a0b" not in source
    markdown = (tmp_path / "out" / "similarity-gap.md").read_text(encoding="utf-8")
    assert found["gap"]["sentence"] in markdown.replace("\\", "")
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (4, 8), line


def test_numbers_are_the_retrievers_own_and_a_second_call_the_same(folder, monkeypatch):
    recipe = config.load("cpu/sequential", [f"task.path={folder}"])
    first = measure(recipe, "test", ON[:2], ["lsa"])
    monkeypatch.setattr(gap_systems, "_ranks", lambda *_: pytest.fail("ranked again"))
    second = measure(recipe, "test", ON[:2], ["lsa"])
    assert first["utility"] == second["utility"] and first["divergence"] == second["divergence"]
    from rec_r1 import tasks

    task = tasks.load(recipe.task)
    backend = retrievers.open("popularity", task.catalog, None, task.interactions)
    hits = retrievers.Unseen(backend, 30).search(task.test.raw(), 10).rows
    recall = np.mean([rows[0] in found for rows, found in zip(task.test.rows, hits, strict=True)])
    row = next(r for r in first["utility"][0]["rows"] if r["system"] == "popularity")
    assert row["metrics"]["recall@10"]["mean"] == pytest.approx(recall)


def test_a_part_takes_the_setting_that_was_just_chosen(folder):
    recipe = config.load("cpu/sequential", [f"task.path={folder}"])
    on = ["ease", "propagate {text: {kind: bm25}, backend: {kind: ease}}"]
    found = measure(recipe, "test", on, ["lsa"])
    alone, part = (
        next(each["fit"] for each in found["systems"] if each["kind"] == kind) for kind in ("ease", "propagate")
    )
    assert alone == part and alone[0].startswith("ease: regularization")


def test_what_is_not_there_is_named_and_what_is_asked_for_must_be(folder, monkeypatch):
    recipe = config.load("cpu/sequential", [f"task.path={folder}"])
    systems = [gap_systems.SYSTEMS[0], gap_systems.Wanted("magic", "nonesuch", {}, "people")]
    monkeypatch.setattr(gap_systems, "SYSTEMS", systems)
    found = measure(recipe, "test", encoders=["lsa"])
    reasons = {each["name"]: each["reason"] for each in found["skipped"]}
    assert reasons["magic"] == "this version has no kind 'nonesuch'"
    assert "no EASE among the systems" in found["divergence"]["reason"]
    context = gap_page.context(gap_page.finite(found))
    assert context["headlines"][0] == found["gap"]["sentence"]
    with pytest.raises(UserError, match="did you mean"):
        measure(recipe, "test", ["eaes"], ["lsa"])


def test_mistakes_end_in_one_line(folder, tmp_path, capsys):
    for arguments, message in (
        (["quickstart"], "take a sequential task"),
        (["cpu/sequential", f"task.path={folder}", "--on", "eaes", "--encoder", "lsa"], "did you mean 'ease'"),
        (["cpu/sequential", f"task.path={folder}", "--encoder", "nobody/nothing"], "neither a folder nor found"),
        (["cpu/sequential", f"task.path={folder}", "--on", "ease [1]"], "parameters are a mapping"),
    ):
        assert cli.main(["similarity-gap", *arguments, "-o", str(tmp_path / "o")]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert message in shown[-1] and shown[-1].startswith("rec-r1: ")
    (tmp_path / "file").write_text("")
    assert cli.main(["similarity-gap", "quickstart", "-o", str(tmp_path / "file")]) == 2
    assert "name another folder" in capsys.readouterr().err
