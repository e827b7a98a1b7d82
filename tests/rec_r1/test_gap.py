"""The similarity gap: every figure against brute force or scipy, sentences in both directions, the page as a whole."""

import html
import json
import math

import numpy as np
import pytest
from datasets_ import plain_folder
from test_report import Page

import retrievers
from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.evaluation.significance import bootstrap, resampled
from rec_r1.similarity_gap import page as gap_page
from rec_r1.similarity_gap import sentences, utility
from rec_r1.similarity_gap import systems as gap_systems
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.measure import measure
from rec_r1.tasks import Split
from retrievers.encoders import lsa

SEED = np.random.default_rng


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
    found = utility.scored(HeldOut.of(split), np.array([[3], [40], [0]]))
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
    assert sentences.effect(what, "ndcg@10", span(0.01, 0.002, 0.02), 5) == (
        "Clipping raised ndcg@10: +0.0100 [+0.0020, +0.0200]."
    )
    assert "lowered ndcg@10: −0.0100" in sentences.effect(what, "ndcg@10", span(-0.01, -0.02, -0.002), 5)
    neither = sentences.effect(what, "ndcg@10", span(-0.001, -0.004, 0.002), 5)
    assert neither == "Clipping is not shown to change ndcg@10: −0.0010 [−0.0040, +0.0020]."
    assert sentences.effect(what, "ndcg@10", span(0, 0, 0), 0) == "Clipping changed no query's ndcg@10."
    cancelled = sentences.effect(what, "ndcg@10", span(0, 0, 0), 2)  # a user's gain and loss
    assert cancelled.startswith("Clipping is not shown to change ndcg@10")


def test_sentences_of_the_gap_go_all_ways():
    ahead = sentences.gap("m", "t", "b", span(0.1, 0.05, 0.2), 7)
    assert "(corrected for the choice among 7 systems): this is the gap." in ahead
    assert "corrected" not in sentences.gap("m", "t", "b", span(0.1, 0.05, 0.2), 1)
    unsure = sentences.gap("m", "t", "b", span(0.1, -0.05, 0.2), 7)
    assert unsure.startswith("No gap is shown") and "is not shown to be ahead of the similarity of texts" in unsure
    for best in "tb":
        level = sentences.gap("m", "t", best, span(0, 0, 0), 7)
        assert level.startswith("No system is shown to be ahead of the similarity of texts") and "undefined" in level
    up, down, level = span(0.1, 0.05, 0.2), span(-0.1, -0.2, -0.05), span(0.0, -0.1, 0.1)
    assert sentences.closes("x", span(0.5, 0.2, 0.8), up, "t") == "x closes 50% [20%, 80%] of the gap."
    assert "behind t, −50% [−80%, −20%]" in sentences.closes("x", span(-0.5, -0.8, -0.2), down, "t")
    assert "not shown to close any" in sentences.closes("x", span(0.1, -0.2, 0.3), level, "t")
    assert "no system here has a higher mean than t" in sentences.closes("x", span(None, None, None), level, "t")
    unshown = span(0.5, None, None)
    for lead in (up, down, level):
        assert sentences.closes("x", unshown, lead, "t").endswith("no gap is shown, so there is no share of it.")
        assert "50%" not in sentences.closes("x", unshown, lead, "t")
    assert sentences.shares(unshown) == sentences.shares(span(None, None, None)) == "–"


@pytest.mark.parametrize(
    ("value", "phrases"),
    [
        (0.9, ("more than by chance", "more than of random items", "tells items", "go with more")),
        (0.1, ("fewer than by chance", "fewer than of random items", "is lower for", "go with less")),
        (
            0.5,
            (
                "not shown to be more or fewer than by chance",
                "or fewer than of random items",
                "not shown to tell",
                "are not shown to go",
            ),
        ),
    ],
)
def test_sentences_of_the_divergence_go_by_the_null(value, phrases):
    found = {"value": value, "null_mean": 0.5, "null_low": 0.4, "null_high": 0.6}
    written = (
        sentences.neighbours(10, found),
        sentences.never_together(10, found),
        sentences.tells_apart(found, 5),
        sentences.correlation("co-consumption", "any two items", found),
    )
    for sentence, phrase in zip(written, phrases, strict=True):
        assert phrase in sentence
    assert "undefined" in sentences.correlation("x", "y", {**found, "value": float("nan")})
    assert "No pair" in sentences.tells_apart(found, 0)


@pytest.mark.parametrize(
    ("lead", "phrase"), [(0.1, "100, more than p"), (-0.1, "100, fewer than p"), (0.0, "not shown to be more")]
)
def test_sentence_of_the_targets_no_text_leads_to(lead, phrase):
    found = sentences.not_similar(
        {
            "share": 0.4, "queries": 12, "best": "ease", "found": span(0.3, 0.2, 0.4), "against": "p",
            "lead": span(lead, lead - 0.05, lead + 0.05), "among": 5,
        }
    )  # fmt: skip
    assert phrase in found and found.startswith("40% of the targets (12)") and "30.0% [20.0%, 40.0%]" in found
    assert found.endswith("(corrected for the choice among 5 systems).")


# ---- LSA


@pytest.mark.slow
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


@pytest.mark.slow
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
            assert line.count("|") in (4, 9), line
    shown = {each["name"]: each["listed"] for each in found["systems"]}
    assert shown["text: lsa"] == 1 and all(0 <= share <= 1 for share in shown.values())
    assert shown == {row["system"]: row["listed"] for row in found["utility"][0]["rows"]}
    for share in shown.values():
        assert f"{100 * share:.1f}%" in page.text
    assert clipped["listed"]["before"] == shown[clipped["base"]] and clipped["differing_queries"].keys() == {
        "ndcg@10", "recall@100"
    }  # fmt: skip
    gap = found["gap"]
    assert gap["among"] == len(ON) and gap["difference"]["low"] <= gap["uncorrected"]["low"] + 1e-3


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_part_takes_the_setting_that_was_just_chosen(folder):
    recipe = config.load("cpu/sequential", [f"task.path={folder}"])
    on = ["ease", "propagate {text: {kind: bm25}, backend: {kind: ease}}"]
    found = measure(recipe, "test", on, ["lsa"])
    alone, part = (
        next(each["fit"] for each in found["systems"] if each["kind"] == kind) for kind in ("ease", "propagate")
    )
    assert alone == part and alone[0].startswith("ease: regularization")


def test_a_full_system_sets_nothing_that_a_claim_changes():
    """A system that does would be compared with itself, or with a larger one."""
    ease = gap_systems.Wanted("ease", "ease", {"regularization": 9.0}, "people")
    changed = {"nonnegative": True}
    reduced = ease._replace(params=changed)
    assert gap_systems.full_system([reduced, ease], "ease", changed) is ease
    assert gap_systems.full_system([reduced], "ease", changed) is None
    reason = gap_systems.no_full_system([reduced], "ease", changed)
    assert reason == "no ease among the systems leaves nonnegative as it is by default"
    assert gap_systems.no_full_system([ease], "personas", changed) == "personas is not among the systems"


@pytest.mark.slow
@pytest.mark.parametrize("excluded", [True, False])
def test_a_page_says_whether_rankings_leave_out_the_history(folder, tmp_path, excluded):
    settings = [f"task.path={folder}", f"retriever.exclude_history={str(excluded).lower()}"]
    on = ["popularity", "ease {nonnegative: true}"]
    result = measure(config.load("cpu/sequential", settings), on=on, encoders=["lsa"], tuned=False)
    assert result["about"]["excludes_history"] == excluded and not result["ablations"]
    gap_page.write(result, tmp_path)
    page = (tmp_path / "similarity-gap.html").read_text(encoding="utf-8")
    assert ("Every ranking leaves out the items of the history." in page) == excluded
    # Its B has no negative weights, which are what section A shows of B.
    reason = "EASE's B is not shown: no ease among the systems leaves nonnegative as it is by default."
    assert result["divergence"]["encoders"] and reason in html.unescape(page)


@pytest.mark.slow
def test_what_is_not_there_is_named_and_what_is_asked_for_must_be(folder, monkeypatch):
    recipe = config.load("cpu/sequential", [f"task.path={folder}"])
    systems = [gap_systems.SYSTEMS[0], gap_systems.Wanted("magic", "nonesuch", {}, "people")]
    monkeypatch.setattr(gap_systems, "SYSTEMS", systems)
    found = measure(recipe, "test", encoders=["lsa"])
    reasons = {each["name"]: each["reason"] for each in found["skipped"]}
    assert reasons["magic"] == "this version has no kind 'nonesuch'"
    assert found["divergence"]["reason"] == "EASE's B is not shown: ease is not among the systems."
    context = gap_page.context(gap_page.finite(found))
    assert context["headlines"][0] == found["gap"]["sentence"]
    with pytest.raises(UserError, match="did you mean"):
        measure(recipe, "test", ["eaes"], ["lsa"])


def test_the_gap_s_own_systems_have_the_recipe_s_language(folder):
    def asked(*settings):
        systems, _ = gap_systems.wanted_systems(config.load("cpu/sequential", list(settings)), [], ["lsa"])
        return {system.kind: system.params for system in systems}

    german = asked("retriever.kind=bm25", "retriever.params={language: german}")
    assert german["bm25"] == {"language": "de"} and german["ease"] == {}
    assert german["propagate"] == {"text": {"kind": "bm25", "params": {"language": "de"}}, "backend": {"kind": "ease"}}
    assert asked()["bm25"] == {} and asked()["propagate"]["text"] == {"kind": "bm25"}


@pytest.mark.slow
def test_mistakes_end_in_one_line(folder, tmp_path, capsys):
    for arguments, message in (
        (["quickstart"], "take a sequential task"),
        (["cpu/sequential", f"task.path={folder}", "--on", "eaes", "--encoder", "lsa"], "did you mean 'ease'"),
        (["cpu/sequential", f"task.path={folder}", "--encoder", "nobody/nothing"], "neither a folder nor found"),
        (["cpu/sequential", f"task.path={folder}", "--on", "ease [1]"], "the parameters are no mapping"),
        (["cpu/sequential", f"task.path={folder}", "--on", "milvus {mode: []}"], "mode"),
    ):
        assert cli.main(["similarity-gap", *arguments, "-o", str(tmp_path / "o")]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert message in shown[-1] and shown[-1].startswith("rec-r1: ")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/1"):  # the second is a folder, which only writing finds out about
        assert cli.main(["similarity-gap", "quickstart", "-o", str(place)]) == 2
        shown = capsys.readouterr().err
        assert f"--output: cannot write into {place}" in shown and "name another folder" in shown
    gap_page.prepare(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_too_few_users_are_refused_before_anything_is_fitted(folder, monkeypatch):
    monkeypatch.setattr("rec_r1.similarity_gap.measure.open_systems", lambda *_: pytest.fail("fitted"))
    recipe = config.load("cpu/sequential", [f"task.path={folder}", "task.params.limits={test: 4}"])
    with pytest.raises(UserError, match=r"the test split has 4 choices of 4 users.*at least 10 users.*another --split"):
        measure(recipe, "test", ON[:1], ["lsa"])


@pytest.mark.slow
def test_labels_are_of_what_was_fitted_on(folder):
    from rec_r1 import tasks

    for share in (0, 0.5):
        recipe = config.load("cpu/sequential", [f"task.path={folder}", f"task.params.fit_share={share}"])
        task = tasks.load(recipe.task)
        fitted = np.bincount(task.interactions.rows, minlength=30)
        labels = utility.labels(task.test, fitted, 5)
        assert labels == [
            "cold" if fitted[row] == 0 else "warm" if fitted[row] >= 5 else "tail" for (row,) in task.test.rows
        ]
        assert (labels == list(task.test.slices["target"])) == (not share)
        facts = dict(gap_page.context(gap_page.finite(measure(recipe, "test", ["popularity"], ["lsa"])))["facts"])
        assert ("fit_share=0.5: the systems are fitted on a part of training" in facts.get("set apart", "")) == (
            share == 0.5
        )
    assert utility.labels(Split(["a"], ["q"], [(1,)], [(1.0,)], histories=[(0,)]), fitted, 5) == [""]
