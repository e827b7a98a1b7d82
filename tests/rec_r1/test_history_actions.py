"""How a model drives a recommender: ground-then-propagate, edits of the history, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from datasets_ import plain_folder

import retrievers
import rewards
from rec_r1 import baselines, cli, config
from rec_r1.config import FormatConfig, UserError
from rec_r1.environment import _grounder as grounder_of
from rec_r1.environment import check_trainable, open_environment
from rec_r1.evaluation import records
from rec_r1.evaluation.evaluate import metric_scorer, save_raw, score_answers
from rec_r1.prompts import Format
from rec_r1.scoring import Scorer
from rec_r1.scoring.grounding import edited
from retrievers import Catalog, Interactions, Query, Traits
from retrievers.combine.propagate import Propagate

TITLES = ["red shoe", "red sock", "red lace", "blue hat", "blue scarf", "blue glove"]
CATALOG = Catalog.from_records({"id": f"d{n}", "text": title} for n, title in enumerate(TITLES))
# Who has the shoe takes sock and lace; who has the hat, scarf and glove.
CHOICES = Interactions.from_sequences(6, [[0, 1], [0, 2], [1, 2], [3, 4], [3, 5], [4, 5]])
BM25 = retrievers.open("bm25", CATALOG)
EASE = retrievers.open("ease", CATALOG, interactions=CHOICES, regularization=1.0)


@pytest.mark.parametrize(
    ("answer", "completion", "items", "weights"),
    [
        ("json", '<answer>{"more_like": ["a", "b"], "less_like": ["c"]}</answer>', ("a", "b", "c"), (1, 1, -1)),
        ("json", '<answer>{"less_like": ["c", 3, ""]}</answer>', ("c",), (-1,)),
        ("think_json", '<think>so</think><answer>{"more_like": ["a"]}</answer>', ("a",), (1,)),
        ("line", "more: a; b\nless: c", ("a", "b", "c"), (1, 1, -1)),
        ("line", "Here you are\n- Less like: c\nmore_like : a ;", ("c", "a"), (-1, 1)),
    ],
)
def test_an_edit_is_read(answer, completion, items, weights):
    action = Format(FormatConfig(action="edit", answer=answer)).parse(completion, "")
    assert (action.items, action.weights, action.text) == (items, weights, "")


@pytest.mark.parametrize(
    ("answer", "completion"),
    [("json", '<answer>{"more_like": [], "less_like": []}</answer>'), ("json", '<answer>{"more_like": "a"}</answer>'),
     ("json", "<answer>[1]</answer>"), ("json", "more: a"), ("line", "a; b"), ("line", "more:\nless: ;")],
)  # fmt: skip
def test_no_edit_is_malformed(answer, completion):
    assert Format(FormatConfig(action="edit", answer=answer)).parse(completion, "") is None


def test_what_is_written_is_read_again():
    for answer in ("line", "json", "think_json"):
        format_ = Format(FormatConfig(action="edit", answer=answer))
        assert format_.parse(format_.write(["red  shoe", "blue hat"], "hm"), "").weights == (1.0, 1.0)


def test_edits_add_up_and_only_the_history_is_seen():
    query = edited([0, 3, 0], ["shoe", "hat", "sock", "sock"], [1.0, -1.0, 1.0, -1.0], {"shoe": 0, "hat": 3, "sock": 1})
    assert query == Query("", (0, 3, 0, 3, 1, 1), (1.0, 1.0, 1.0, -1.0, 1.0, -1.0), (0, 3))
    total = retrievers.interactions.history_matrix([query], 6).toarray()[0]
    assert total.tolist() == [2, 0, 0, 0, 0, 0]


def scorer(action, retriever, **more):
    return Scorer(
        Format(FormatConfig(action=action)).parse,
        retriever,
        rewards.from_spec({"mrr@10": 1.0}),
        catalog=CATALOG,
        **more,
    )


def test_an_edit_moves_the_recommender():
    edits = scorer("edit", retrievers.Unseen(EASE, 6), grounder=BM25)
    answers = ["more: blue hat", "less: blue hat; red shoe", "more: nothing known", "what?"]
    scored = edits.score(answers, [""] * 4, [[4]] * 4, [[1.0]] * 4, histories=[[0], [0], [0], [0]])
    assert scored.outcome.ranks[:, 0].tolist() == [
        3,
        0,
        0,
        0,
    ]  # a scarf, once a hat is wished for; sock and lace tie with it
    assert scored.asked[0] == Query("", (0, 3), (1.0, 1.0), (0,)) and scored.asked[2].history == (0,)
    assert scored.asked[3] is None and scored.lists == [None] * 4
    assert scored.retrieval["scorer/ungrounded"] == pytest.approx(1 / 4)
    wished = edits.score(["more: red sock"], [""], [[1]], [[1.0]], histories=[[0]])
    assert wished.outcome.ranks[0, 0] > 0  # what is wished for is not yet bought


class Down:
    fingerprint = "down"

    def search(self, queries, k):
        raise ConnectionError("nobody there")

    ranks = search


def test_an_outage_while_grounding_an_edit_is_no_score():
    edits = scorer("edit", EASE, grounder=Down())
    scored = edits.score(["more: blue hat", "?"], ["", ""], [[4], [4]], [[1.0], [1.0]], histories=[[0], [0]])
    assert scored.failed.tolist() == [True, False] and np.isnan(scored.rewards[0]) and scored.rewards[1] == 0
    assert scored.retrieval["retrieval/error_rate"] == 1.0


def test_propagate_asks_the_backend_with_what_the_text_finds():
    both = Propagate(BM25, EASE, m=1, mix=0.25)
    (query,) = both.grounded([Query("hat", (0, 1), seen=(0,))])
    assert query == Query("", (0, 1, 3), (0.375, 0.375, 0.25), (0,))
    assert both.grounded([Query("hat", (0, 1))])[0].seen == (0, 1)  # what the text found may be recommended
    assert both.grounded([Query("zebra", (0, 1)), Query("", (2,))]) == [Query("", (0, 1)), Query("", (2,))]
    assert both.grounded([Query("hat", (0, 1), (1.0, -1.0))])[0].weights == (0.375, -0.375, 0.25)
    (repeated,) = Propagate(BM25, EASE, m=1, mix=0.5).grounded([Query("blue", (0, 3, 0))])
    assert repeated.history[:3] == (0, 3, 0) and repeated.weights[:3] == pytest.approx((0.125, 0.25, 0.125))
    (alone,) = Propagate(BM25, EASE, m=2, mix=1.0).grounded([Query("blue", (0,))])
    assert alone.history == (0, 4, 3) and alone.weights[0] == 0 and sum(alone.weights) == pytest.approx(1)
    assert set(both.search([Query("hat")], 2).rows[0].tolist()) == {4, 5}


def shop(tmp_path, *more):
    return [f"task.path={plain_folder(tmp_path / 'shop')}", f"output_dir={tmp_path / 'out'}", *more]


FITTED = [
    "retriever={kind: propagate, exclude_history: true, params: {backend: {kind: ease}}}",
    "task.params.fit_share=0.5",
]


@pytest.mark.slow
def test_the_history_reaches_the_retriever_and_the_baseline_without_a_text_differs(tmp_path):
    recipe = config.load("cpu/sequential", shop(tmp_path, *FITTED))
    env = open_environment(recipe)
    assert env.fitted_on == {env.task.interactions.fingerprint} and env.reads_text and env.task.set_apart
    check_trainable(recipe, env)
    split = env.task.test
    scored = env.scorer.score_split(["words"] * len(split), split)
    assert [query.history for query in scored.asked] == list(split.histories)
    result = baselines.run(recipe, "history", "test")
    assert {row["system"] for row in result["tables"][0]["rows"]} == {"raw query", "history"}
    rows = env.retriever.search([Query("", split.histories[0])], 30).rows[0]
    assert not set(rows.tolist()) & set(split.histories[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["retriever.kind=ease", "task.params.fit_share=0.5"], "reads histories, and not what.*propagate"),
        ([FITTED[0]], "task.params.fit_share: 0: propagate was fitted on the targets"),
        (["retriever.kind=ease", "task.params.fit_share=0.5", "format.action=edit"], "grounding.kind: not set"),
        (["retriever.kind=hybrid", "retriever.params={retrievers: [{kind: ease}]}", "task.params.fit_share=0.5"],
         "reads histories"),
        (["task.params.fit_share=1.0"], "fit_share: 1.0: must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_what_would_teach_nothing_is_refused(tmp_path, capsys, settings, message):
    assert cli.main(["check", "cpu/sequential", *shop(tmp_path, *settings)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rec-r1: ")
    with pytest.raises(UserError, match=message):
        raise UserError(error)


def test_a_server_that_was_fitted_on_another_task_s_choices_is_refused(tmp_path):
    recipe = config.load("cpu/sequential", shop(tmp_path, *FITTED))
    env = open_environment(recipe)
    for env_, message in (
        (dataclasses.replace(env, fitted_on={"another"}), "start rec-r1 serve with the same task settings"),
        (dataclasses.replace(env, task=dataclasses.replace(env.task, interactions=None)), "on other interactions"),
    ):
        with pytest.raises(UserError, match=message):
            check_trainable(recipe, env_)

    class Served:
        """As the client of a server says."""

        def retriever_traits(self):
            return Traits(reads_text=False, fitted_on=("some",))

    edits = config.load("cpu/sequential", shop(tmp_path, "format.action=edit", "retriever.kind=remote"))
    with pytest.raises(UserError, match="not set, and remote does not look titles up"):
        grounder_of(edits, env.task, Served())


@pytest.mark.parametrize("verb", ["index", "fit", "check"])
def test_a_kind_that_does_not_exist_is_named(tmp_path, capsys, verb):
    assert cli.main([verb, "cpu/sequential", *shop(tmp_path, "retriever.kind=eas")]) == 2
    assert "retriever.kind: unknown 'eas': did you mean 'ease'?" in capsys.readouterr().err
    part = "retriever={kind: hybrid, params: {retrievers: [{kind: eas}]}}"
    assert cli.main([verb, "cpu/sequential", *shop(tmp_path, part)]) == 2
    assert "did you mean 'ease'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_without_histories_is_refused(capsys):
    assert cli.main(["fit", "quickstart", "retriever.kind=ease"]) == 2
    assert "is fitted on interactions, but this task has none: take a sequential task" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_says_what_it_found_and_index_has_nothing_to_fit(tmp_path, capsys):
    settings = shop(tmp_path, *FITTED)
    assert cli.main(["fit", "cpu/sequential", *settings]) == 0
    out = capsys.readouterr().out
    assert "choices of 12 users, set apart from the training prompts" in out and '"regularization"' in out
    assert cli.main(["fit", "cpu/sequential", *settings[:2]]) == 2
    assert "bm25 is not fitted on interactions: rec-r1 index builds it" in capsys.readouterr().err


@pytest.mark.slow
def test_an_edit_is_grounded_alike_on_whichever_retriever_it_is_sent_to(tmp_path, capsys):
    fitted = "retriever={kind: ease, exclude_history: true, params: {regularization: 10.0}}"
    edits = ["format.action=edit", "grounding.kind=bm25", "task.params.fit_share=0.5", "evaluation.metrics=[ndcg@10]"]
    recipe = config.load("cpu/sequential", shop(tmp_path, fitted, *edits))
    env = open_environment(recipe)
    split, titles, run = env.task.test, env.task.catalog.titles, tmp_path / "out"
    run.mkdir()
    (run / "config.yaml").write_text(config.dump(recipe))
    answers = [f"more: {titles[(rows[0] + 1) % len(titles)]}\nless: {titles[0]}" for rows in split.rows]
    metrics = metric_scorer(env.scorer, ["ndcg@10"])
    save_raw(run, "test", env, split, metrics)
    scored = score_answers(answers, split, metrics)
    records.save(run, "test", env, split, scored, "trained", "policy", "answers by hand")
    kinds = ("ease", "ease {regularization: 10.0}", "itemknn", "popularity")
    assert cli.main(["transfer", str(run), *(word for kind in kinds for word in ("--on", kind))]) == 0
    result = json.loads((run / "evaluation/test/transfer.json").read_text())
    means = {(cell["system"], cell["retriever"]): cell["mean"] for cell in result["cells"]}
    moved = {kind: means["trained on ease", kind] - means["raw query", kind] for kind in kinds}
    own = scored.whole().components["ndcg@10"].mean()
    assert means["trained on ease", "ease {regularization: 10.0}"] == pytest.approx(own, abs=1e-6)
    assert moved["ease {regularization: 10.0}"] and moved["itemknn"] and not moved["popularity"]
    for kind in kinds[2:]:  # the same edits, asked of that recommender itself
        there = dataclasses.replace(recipe, retriever=dataclasses.replace(recipe.retriever, kind=kind, params={}))
        asked = metric_scorer(open_environment(there).scorer, ["ndcg@10"])
        expected = score_answers(answers, split, asked).whole().components["ndcg@10"].mean()
        assert means["trained on ease", kind] == pytest.approx(expected, abs=1e-6)
