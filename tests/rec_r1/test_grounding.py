"""Answers that are lists: grounded, reordered, ranked, scored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
import rewards
from rec_r1 import config
from rec_r1.config import FormatConfig
from rec_r1.environment import open_environment
from rec_r1.evaluation.evaluate import metric_scorer, score_raw
from rec_r1.prompts import Format
from rec_r1.scoring import Scorer, summary
from rec_r1.scoring.grounding import ground, list_ranks, reorder
from retrievers import Catalog

TITLES = ["Toy Story", "GoldenEye", "Four Rooms", "Get Shorty", "Babe"]
CATALOG = Catalog.from_records({"id": f"m{n}", "text": title} for n, title in enumerate(TITLES))
BM25 = retrievers.open("bm25", CATALOG)


def test_items_stand_for_their_best_hit_once():
    rows, missed = ground(BM25, [["the toy story film", "babe!", "Toy Story", "Casablanca"], ["shorty"]], 0.0)
    assert rows == [[0, 4], [3]] and missed == pytest.approx(1 / 5)


def test_below_the_floor_an_item_stands_for_nothing():
    score = float(BM25.search([retrievers.Query("shorty")], 1).scores[0, 0])
    assert ground(BM25, [["shorty"]], score - 0.01)[0] == [[3]]
    assert ground(BM25, [["shorty"]], score) == ([[]], 1.0)


@given(st.lists(st.integers(-3, 12), max_size=12), st.integers(1, 8))
def test_an_order_is_a_permutation_of_the_candidates(order, n):
    candidates = [100 + i for i in range(n)]
    rows = reorder(order, candidates)
    known = list(dict.fromkeys(x for x in order if 1 <= x <= n))
    if not known:
        assert rows is None
        return
    assert sorted(rows) == candidates
    assert rows[: len(known)] == [candidates[x - 1] for x in known]
    assert rows[len(known) :] == sorted(rows[len(known) :])  # the rest in the order given


@given(st.lists(st.integers(0, 9), unique=True, max_size=10), st.lists(st.integers(-1, 9), max_size=5))
def test_places_in_a_list(rows, targets):
    expected = [rows.index(t) + 1 if t in rows else 0 for t in targets]
    assert list_ranks(rows, np.array(targets, int)).tolist() == expected


def scorer(action, **more):
    return Scorer(
        Format(FormatConfig(action=action, prompt="{query} {candidates}")).parse,
        BM25,
        rewards.from_spec({"ndcg@10": 1.0, "format": 0.5}),
        catalog=CATALOG,
        **more,
    )


def test_a_generated_list_is_scored_by_its_own_order(tmp_path):
    log = tmp_path / "rollouts.jsonl"
    lists = scorer("items", transcript=log)
    logged = {}
    got = lists(
        prompts=["p"] * 3,
        completions=["- Babe\n- toy story", "Casablanca", "…"],
        query=["", "", ""],
        target_rows=[[0], [0], [0]],
        target_grades=[[1.0], [1.0], [1.0]],
        log_metric=logged.__setitem__,
    )
    assert got == pytest.approx([1 / np.log2(3), 0.0, -0.5])  # second place; nothing grounded; malformed
    assert logged["scorer/ungrounded"] == pytest.approx(1 / 3) and logged["retrieval/queries"] == 3
    first = log.read_text().splitlines()[0]
    assert '"hits": [{"id": "m4", "title": "Babe"}, {"id": "m0", "title": "Toy Story"}]' in first


def test_a_ranking_is_scored_by_its_order():
    scored = scorer("ranking").score(
        ["2, 1", "1", "7, 9", "no"], ["q"] * 4, [[3]] * 4, [[1.0]] * 4, [[0, 3], [0, 3], [0, 3], [0, 3]]
    )
    assert scored.lists == [[3, 0], [0, 3], None, None]
    assert scored.components["ndcg@10"].tolist() == pytest.approx([1.0, 1 / np.log2(3), 0.0, 0.0])
    assert scored.components["format"].tolist() == [0, 0, -1, -1]  # no known number is no order
    assert summary(scored, ["q"] * 4)["scorer/malformed"] == 0.5


class Down:
    fingerprint = "down"

    def search(self, queries, k):
        raise ConnectionError("nobody there")

    ranks = search


def test_an_outage_while_grounding_is_no_score():
    down = scorer("items")
    down.retriever = Down()
    scored = down.score(["Babe", "…"], ["", ""], [[0], [0]], [[1.0], [1.0]])
    assert scored.failed.tolist() == [True, False] and np.isnan(scored.rewards[0]) and scored.rewards[1] == -0.5
    assert scored.retrieval["retrieval/error_rate"] == 1.0


@pytest.mark.slow
def test_candidates_are_the_raw_query_s_first_hits_and_no_held_out_query_is_lost():
    bare = open_environment(config.load("quickstart"))
    env = open_environment(config.load("quickstart", ["format={action: ranking}", "task.candidates=5"]))
    hits = bare.retriever.search([retrievers.Query(q) for q in bare.task.test.queries], 5).rows
    assert [list(c) for c in env.task.test.candidates] == [[r for r in row if r >= 0] for row in hits.tolist()]
    assert env.task.test.ids == bare.task.test.ids and () in env.task.test.candidates  # scored 0, not left out
    for candidates, rows in zip(env.task.train.candidates, env.task.train.rows, strict=True):
        assert set(candidates) & set(rows)  # no order of the others earns anything
    assert len(env.task.train) < len(bare.task.train)
    split = env.task.test
    given = ["1 2 3 4 5"] * len(split)  # the order they came in is the raw query's, cut at 5
    same = metric_scorer(env.scorer, ["ndcg@5"]).score_split(given, split).components["ndcg@5"]
    raw = score_raw(bare.task.test, metric_scorer(bare.scorer, ["ndcg@5"])).components["ndcg@5"]
    np.testing.assert_allclose(same, raw)
