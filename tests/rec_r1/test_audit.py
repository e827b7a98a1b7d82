"""Audits of runs whose completions are planted: adversaries, verdicts, and the floor against stuffing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets_ import plain_folder, write_jsonl
from runs_ import policy

from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.evaluation import adversaries, audit, audit_text, records
from rec_r1.evaluation.completion_words import cut, described
from rec_r1.evaluation.evaluate import metric_scorer, save_raw, score_answers, score_raw
from rec_r1.pages import run_report
from rec_r1.tasks.example_words import CatalogWords
from retrievers.text.analysis import words
from rewards import StuffingPenalty

# The completions of the quickstart's policies (seed 0, step 26 of 39) on its validation queries.
COMPLETIONS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/quickstart_completions.jsonl").open()]
FLOOR = "rewards={ndcg@100: 0.5, ndcg@10: 0.5, stuffing: 1.0}"


@pytest.fixture(scope="module")
def env():
    return open_environment(config.load("quickstart"))


@pytest.fixture(scope="module")
def known(env):
    return CatalogWords(env.task.catalog)


def planted(name):
    return [row[name] for row in COMPLETIONS]


def empty_run(folder, settings=(), recipe="quickstart"):
    """A run without an evaluation; its recipe. The model of the recipe does not exist, so nothing can load it."""
    made = config.load(recipe, [f"output_dir={folder}", "model.name=/no/such/model", *settings])
    policy(folder / "best", 1.0)
    (folder / "config.yaml").write_text(config.dump(made))
    (folder / "best.json").write_text(json.dumps({"step": 2, "metric": "ndcg@10", "value": 0.5}))
    return made


def make_run(folder, env, untrained, trained, settings=(), recipe="quickstart"):
    """A run whose policies have answered the validation queries."""
    recipe = empty_run(folder, settings, recipe)
    split, scorer = env.task.validation, metric_scorer(env.scorer, recipe.evaluation.metrics)
    save_raw(folder, "validation", env, split, scorer)
    for name, answers, step in (("untrained", untrained, None), ("trained", trained, 2)):
        scored = score_answers(answers, split, scorer)
        records.save(folder, "validation", env, split, scored, name, "policy", name, step=step)
    return folder


@pytest.fixture(scope="module")
def honest(env, tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("honest") / "run", env, planted("untrained"), planted("trained"))
    write_jsonl(
        folder / "rollouts.jsonl",
        [
            {"step": step, "query": "rain", "completion": completion}
            for step, completion in [(0, "umbrella, cloud"), (1, "x"), (2, "rain rain"), (2, "face face face"), (2, "")]
        ],
    )
    return folder, audit.audit(folder)


def rows(result):
    return {row["system"]: row for row in result["systems"]}


def statistics(result):
    return {row["of"]: row for row in result["completions"]}


def test_the_planted_completions_are_those_of_the_validation_queries(env):
    assert [row["query_id"] for row in COMPLETIONS] == list(env.task.validation.ids)


@pytest.mark.slow
def test_an_honest_run_is_told_apart_from_one_that_stuffs(env, known, honest, tmp_path):
    _, result = honest
    frequent = " ".join(known.most_frequent(40))
    long = [" ".join([*row["trained"].split(), frequent]) for row in COMPLETIONS]
    stuffs = audit.audit(make_run(tmp_path / "long", env, planted("untrained"), long), queries=30)
    again = [f"{row['query']} {row['query']} star star star" for row in COMPLETIONS]
    repeats = audit.audit(make_run(tmp_path / "again", env, planted("untrained"), again), queries=30)
    copied = [row["query"] for row in COMPLETIONS]
    copies = audit.audit(make_run(tmp_path / "copies", env, planted("untrained"), copied), queries=30)
    said = {name: " ".join(one["verdict"]) for name, one in
            (("honest", result), ("long", stuffs), ("again", repeats), ("copies", copies))}  # fmt: skip
    assert "does not stuff: 0% of its completions" in said["honest"] and "does not copy" in said["honest"]
    assert "The trained policy stuffs: 100% of its completions are stuffed, 0% before training" in said["long"]
    assert "The trained policy stuffs: " in said["again"]
    assert "does not stuff" in said["copies"] and "The trained policy copies the query: " in said["copies"]


@pytest.mark.slow
def test_no_adversary_earns_as_much_as_an_honest_policy(honest):
    _, result = honest
    assert result["verdict"][0].startswith("No adversary earns as much reward as the trained policy")
    trained = rows(result)["trained"]["reward"]["mean"]
    for comparison in result["comparisons"]:
        reward = rows(result)[comparison["against"]]["reward"]["mean"]
        assert comparison["difference"] == pytest.approx(trained - reward)
        assert comparison["p"] <= comparison["p_holm"]


@pytest.mark.slow
def test_an_adversary_that_earns_more_is_named(env, tmp_path):
    settings = ["format.action=replace", "format.repeat=1"]
    own = open_environment(config.load("quickstart", settings))
    queries = list(own.task.validation.queries)
    result = audit.audit(make_run(tmp_path / "run", own, queries, ["zzzz"] * len(queries), settings), queries=40)
    assert result["verdict"][0].startswith("An adversary earns more reward than the trained policy (trained - query")
    result = audit.audit(make_run(tmp_path / "same", own, queries, queries, settings), queries=40)
    assert result["verdict"][0].startswith("An adversary earns as much reward as the trained policy")


@pytest.mark.slow
def test_the_adversaries_of_a_query(env, known):
    recipe, split = config.load("quickstart"), env.task.validation
    found = adversaries.adversaries(recipe, env, split, known)
    assert found == adversaries.adversaries(recipe, env, split, known)  # The random documents are seeded.
    for name, completions in found.items():
        for completion, query in zip(completions, split.queries, strict=True):  # One query is "!", without a word.
            assert env.format.parse(completion, query) or not words(query), name
    assert found["query, 10 times"][3] == " ".join([split.queries[3]] * 10)
    for query, completion in zip(split.queries, found["stuffed, 182 words"], strict=True):
        assert completion.startswith(query) and len(words(completion)) == 182
    (frequent,) = set(found["frequent words"])
    texts = [set(words(text)) for text in env.task.catalog.texts]
    counts = [sum(word in text for text in texts) for word in frequent.split()]
    assert len(counts) == 10 and counts == sorted(counts, reverse=True) and "the" not in frequent.split()
    rest = {w for text in texts for w in text} - set(frequent.split()) - adversaries.stop_words_of(recipe)
    assert max(sum(word in text for text in texts) for word in rest if len(word) > 2) <= counts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("settings, names", [
    (["format={action: ranking, answer: line}", "task.candidates=5"],
     ["order that changes nothing", "first words of candidates"]),
    (["format={action: ranking, answer: json}", "task.candidates=5"], ["order that changes nothing"]),
])  # fmt: skip
def test_the_adversaries_of_an_order(settings, names):
    recipe = config.load("quickstart", settings)
    own = open_environment(recipe)
    split = own.task.validation
    found = adversaries.adversaries(recipe, own, split, CatalogWords(own.task.catalog))
    assert list(found) == names
    scored = own.scorer.score_split(found["order that changes nothing"], split)
    for candidates, listed in zip(split.candidates, scored.lists, strict=True):
        assert listed == (list(candidates) or None)
    raw = score_raw(split, own.scorer)
    first = (raw.outcome.ranks > 0) & (raw.outcome.ranks <= 5)
    np.testing.assert_array_equal(scored.outcome.ranks, np.where(first, raw.outcome.ranks, 0))


@pytest.mark.slow
@pytest.mark.parametrize("settings, names", [
    (["format={action: items, prompt: null, answer: json}"],
     ["last title", "titles of the history", "popular titles", "random titles"]),
    (["format={action: edit, prompt: null, answer: line}", "grounding.kind=bm25", "task.params.fit_share=0.5",
      "retriever={kind: ease, params: {regularization: 10.0}}"],
     ["last title", "titles of the history", "popular titles", "random titles"]),
    (["format={action: replace, prompt: sequential, answer: think_json}"],
     ["query, 2 times", "query, 10 times", "frequent words", "stuffed, 182 words", "words of a random document",
      "last title"]),
])  # fmt: skip
def test_runs_with_histories(settings, names, tmp_path):
    given = [f"task.path={plain_folder(tmp_path / 'shop')}", *settings]
    own = open_environment(config.load("cpu/sequential", given))
    split = own.task.validation
    answers = [own.format.write(["title 3 Romance"])] * len(split)
    run = make_run(tmp_path / "run", own, answers, answers, given, "cpu/sequential")
    result = audit.audit(run)
    assert [row["system"] for row in result["systems"] if row["adversary"]] == names
    titles = own.task.catalog.titles
    written = adversaries.adversaries(config.load(run / "config.yaml"), own, split, CatalogWords(own.task.catalog))
    for q, history in enumerate(split.histories):
        action = own.format.parse(written["last title"][q], split.queries[q])
        assert titles[history[-1]] in (action.text, *action.items)
    is_query = "query, 2 times" in names
    assert (result["equal_length"] is None) == (result["retention"] is None) == (not is_query)
    assert len(result["verdict"]) == (5 if is_query else 1)
    assert audit_text.text(json.loads((run / "evaluation" / "audit.json").read_text()))


@pytest.mark.slow
def test_statistics_of_completions(env, honest):
    _, result = honest
    texts = [set(words(text)) for text in env.task.catalog.texts]

    def share(word):
        return sum(word in text for text in texts) / len(texts)

    found = statistics(result)
    assert list(found) == ["untrained", "trained", "rollouts, step 0", "rollouts, step 2"]
    last = found["rollouts, step 2"]  # "rain rain", "face face face", and a malformed one
    assert (last["completions"], last["malformed"]) == (3, pytest.approx(1 / 3))
    assert (last["words"], last["echo"]) == (2.5, 0.5)
    assert last["repeated"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert last["documents"] == pytest.approx((2 * share("rain") + 3 * share("face")) / 5)
    assert (last["copies"], last["stuffed"]) == (0.5, 0.5)
    own = [words(row["trained"]) for row in COMPLETIONS]
    assert found["trained"]["words"] == pytest.approx(np.mean([len(w) for w in own]))
    assert found["trained"]["documents"] == pytest.approx(np.mean([share(w) for written in own for w in written]))
    assert rows(result)["trained"]["words"]["mean"] == pytest.approx(found["trained"]["words"])


def test_statistics_of_nothing(known):
    nothing = described([None], ["rain"], known, StuffingPenalty())
    assert nothing["malformed"] == 1 and np.isnan(nothing["words"]) and np.isnan(nothing["stuffed"])


def test_completions_are_cut_to_a_number_of_words(env):
    written = [" fire, torch-light, candle\nand more", "sun", "", "ice-cream, cake"]
    actions = [env.format.parse(text, "rain") for text in written]
    short = cut(env, actions, [2, 3, 4, 0], written)
    assert short == ["fire,", "sun", "", "ice-cream,"]  # torch-light is two words; a query keeps its first word


@pytest.mark.slow
def test_the_gain_at_equal_length_and_on_another_retriever(env, honest):
    _, result = honest
    split = env.task.validation
    scorer = metric_scorer(env.scorer, ["ndcg@10"])
    first = {n: [row[n].strip().partition("\n")[0] for row in COMPLETIONS] for n in ("untrained", "trained")}
    shorter = [min(len(words(one)), len(words(two))) for one, two in zip(*first.values(), strict=True)]
    assert rows(result)[audit.CUT]["words"]["mean"] <= np.mean(shorter)
    gain = {}
    for name in ("untrained", "trained"):
        gain[name] = score_answers(planted(name), split, scorer).components["ndcg@10"].mean()
    assert result["equal_length"]["whole"]["difference"] == pytest.approx(gain["trained"] - gain["untrained"], abs=1e-6)
    assert result["equal_length"]["cut"]["difference"] == pytest.approx(
        rows(result)[audit.CUT]["metric"]["mean"] - gain["untrained"], abs=1e-6
    )
    other = open_environment(config.load("quickstart", ["retriever.params={k1: 0.9, b: 0.4}"]))
    scorer = metric_scorer(other.scorer, ["ndcg@10"])
    there = {n: score_answers(planted(n), split, scorer).components["ndcg@10"].mean() for n in gain}
    assert result["retention"]["retriever"] == "bm25 {k1: 0.9, b: 0.4}"
    assert result["retention"]["other"]["difference"] == pytest.approx(there["trained"] - there["untrained"], abs=1e-6)


@pytest.mark.slow
def test_with_the_floor_no_adversary_earns_more_than_the_honest_best_query(env, known):
    """The honest best query is the best of the raw query and of both policies' completions, for each query."""
    recipe = config.load("quickstart", [FLOOR])
    own = open_environment(recipe)
    split = own.task.validation
    raw = score_raw(split, own.scorer).rewards
    policies = [own.scorer.score_split(planted(name), split) for name in ("untrained", "trained")]
    best = np.max([raw, *(scored.rewards for scored in policies)], axis=0).mean()
    found = adversaries.adversaries(recipe, own, split, known)
    for name, completions in found.items():
        with_floor = own.scorer.score_split(completions, split).rewards.mean()
        without = env.scorer.score_split(completions, split).rewards.mean()
        assert with_floor <= best, name
        if name.startswith(("query, ", "stuffed, ")):
            assert with_floor < 0 < raw.mean() <= without, name  # Without the floor they earn what the raw query earns.
    for scored in policies:  # Honest completions keep their reward.
        assert scored.components["stuffing"].mean() > -0.01


@pytest.mark.slow
def test_the_verb_writes_its_result_where_the_report_shows_it(env, honest, capsys, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(honest[0], folder)
    assert cli.main(["audit", str(folder), "--queries", "20"]) == 0
    out = capsys.readouterr().out
    kept = json.loads((folder / "evaluation" / "audit.json").read_text())
    assert kept["queries"] == 20 and kept["part"] == "validation"
    assert out.splitlines()[0].startswith("validation (n=20)")
    assert out.splitlines()[-1] == f"all numbers in {folder / 'evaluation' / 'audit.json'}"
    for sentence in kept["verdict"]:
        assert sentence in out
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.1}\n')
    html, markdown = run_report.write([folder], folder / "report.html")
    assert "### Audit" in markdown.read_text() and kept["verdict"][0] in markdown.read_text()
    assert "<h3>Audit</h3>" in html.read_text()


def test_the_other_bm25_keeps_the_language(tmp_path):
    for params, name, other in (
        ("{language: fr}", "bm25 {k1: 0.9, b: 0.4}", {"language": "fr", "k1": 0.9, "b": 0.4}),
        ("{k1: 0.9, b: 0.4}", "bm25 {k1: 1.2, b: 0.75}", {"k1": 1.2, "b": 0.75}),
    ):
        shown, recipe = audit._other_retriever(config.load("quickstart", [f"retriever.params={params}"]), None)
        assert (shown, recipe.retriever.params) == (name, other)
    shown, recipe = audit._other_retriever(config.load("esci_dense"), None)
    assert (shown, recipe.retriever.kind, recipe.retriever.params) == ("bm25", "bm25", {})


def test_mistakes_are_refused(tmp_path):
    folder = tmp_path / "run"
    empty_run(folder)
    empty_run(tmp_path / "order", ["format={action: ranking}", "task.candidates=5"])
    for run, options, message in (
        (tmp_path, {}, "not a run"),
        (folder, {"queries": 0}, "--queries must be at least 1, got 0"),
        (folder, {"retriever": "bm25"}, "--retriever bm25: it is the run's own retriever: give other parameters"),
        (folder, {"retriever": "bm25 {b: 0.75}"}, r"--retriever bm25 \{b: 0.75\}: it ranks exactly like the run's own"),
        (folder, {"retriever": "bm25 {k1"}, r"--retriever 'bm25 \{k1': the parameters are not valid YAML"),
        (folder, {"retriever": "bm26"}, "bm26"),
        (
            tmp_path / "order",
            {"retriever": "bm25"},
            "--retriever: the run writes no plain queries",
        ),
    ):
        with pytest.raises(UserError, match=message):
            audit.audit(run, **options)
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    with pytest.raises(UserError, match="no run with a trained policy"):
        audit.audit(tmp_path)


@pytest.mark.slow
def test_policies_that_have_not_answered_answer_first(lora_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(lora_run, folder)
    result = audit.audit(folder, queries=5)
    assert result["queries"] == 5
    assert (folder / "evaluation" / "validation" / "trained.jsonl").is_file()
    stored = records.load_all(folder, "validation")
    assert {"trained", "untrained", "raw query"} <= set(stored)


def _gain(difference, low, high, p):
    return {"difference": difference, "low": low, "high": high, "p_holm": p}


def _result(cut, whole, own, other, stuffed):
    """What the verdict reads. stuffed: the stuffed shares of the trained policy, the first and the last step."""
    of = ("untrained", "trained", "rollouts, step 0", "rollouts, step 38")
    return {
        "comparisons": [{"against": "query", **_gain(0.1, 0.05, 0.15, 0.001)}],
        "completions": [
            {"of": name, "stuffed": share, "copies": 0.0, "repeated": 0.3}
            for name, share in zip(of, (0.0, *stuffed), strict=True)
        ],
        "metric": "ndcg@10",
        "equal_length": {"cut": cut, "whole": whole},
        "retention": {"retriever": "bm25", "own": own, "other": other},
    }


def test_a_change_is_claimed_only_where_it_is_shown():
    shown, not_shown = _gain(0.05, 0.01, 0.1, 0.02), _gain(0.04, -0.01, 0.09, 0.1)
    cut, elsewhere = audit_text.verdict(_result(not_shown, shown, shown, shown, (0, 0, 0)))[-2:]
    assert "training is not shown to change ndcg@10 (+0.040 [-0.010, +0.090], p=.100)" in cut
    assert "with whole completions, it changes ndcg@10 by +0.050 [+0.010, +0.100], p=.020." in cut
    assert elsewhere.endswith("p=.020, 100% of the gain on the run's own retriever.")
    elsewhere = audit_text.verdict(_result(shown, shown, shown, not_shown, (0, 0, 0)))[-1]
    assert elsewhere == "On bm25, training is not shown to change ndcg@10 (+0.040 [-0.010, +0.090], p=.100)."


@pytest.mark.parametrize("stuffed, said", [
    ((0.0, 0.02, 0.17), True),
    ((0.5, 0.02, 0.17), False),  # The sentence about the policy says it already.
    ((0.0, 0.02, 0.08), False),
    ((0.0, 0.20, 0.17), False),  # It was stuffed from the start.
])  # fmt: skip
def test_a_training_that_stuffs_at_its_end_is_named_where_its_best_policy_does_not(stuffed, said):
    gain = _gain(0.05, 0.01, 0.1, 0.02)
    verdict = " ".join(audit_text.verdict(_result(gain, gain, gain, gain, stuffed)))
    sentence = (
        "But at its end the training was learning to stuff (rollouts, step 38): 17% of the completions are stuffed, "
        "and 30% of their words are repeated; at its start these were 2% and 30% (rollouts, step 0)."
    )
    assert (sentence in verdict) == said == ("learning to stuff" in verdict)


def test_no_adversary_is_behind_unless_each_is_shown_to_be():
    """An adversary with a wide interval may earn as much, though its mean is not the nearest."""
    near, wide = _gain(0.02, 0.01, 0.03, 0.001), _gain(0.025, -0.06, 0.11, 0.55)
    more = _gain(-0.01, -0.02, -0.005, 0.01)
    shown = _gain(0.05, 0.01, 0.1, 0.02)

    def said(*comparisons):
        named = [{"against": f"adversary {n}", **one} for n, one in enumerate(comparisons)]
        return audit_text.verdict(_result(shown, shown, shown, shown, (0, 0, 0)) | {"comparisons": named})[0]

    assert said(near).startswith("No adversary earns as much reward as the trained policy (trained - adversary 0")
    assert said(near, wide).startswith("An adversary earns as much reward as the trained policy, or no difference")
    assert "(trained - adversary 1:" in said(near, wide)
    assert said(near, wide, more).startswith("An adversary earns more reward than the trained policy")
