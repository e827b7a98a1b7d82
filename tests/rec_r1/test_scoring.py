import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
import rewards
from rec_r1.config import FormatConfig
from rec_r1.prompts import Format
from rec_r1.scoring import MAX_TRANSCRIPT_QUERIES, Scorer
from rec_r1.scoring.batch_summary import summary
from retrievers import Catalog, Query, RetrieverError

TEXTS = ["party popper", "sad face", "party face", "running shoes", "face of a clock"]
CATALOG = Catalog.from_records({"id": f"d{i}", "text": text, "title": f"T{i}"} for i, text in enumerate(TEXTS))
BM25 = retrievers.open("bm25", CATALOG)


def make(spec=None, retriever=BM25, **more) -> Scorer:
    return Scorer(Format(FormatConfig()).parse, retriever, rewards.from_spec(spec or {"ndcg@10": 1.0}), **more)


class Counting:
    """A retriever that remembers what it was asked."""

    fingerprint = "counting"

    def __init__(self):
        self.asked = []

    def search(self, queries, k):
        return BM25.search(queries, k)

    def ranks(self, queries, targets):
        self.asked.append([query.text for query in queries])
        return BM25.ranks(queries, targets)


def test_rewards_are_those_of_the_ranking():
    got = make()(
        ["p"] * 3, ["party face", "zebra", ""], query=["q"] * 3, target_rows=[[0, 1]] * 3, target_grades=[[1, 2]] * 3
    )
    order = BM25.search([Query("party face")], 5).rows[0].tolist()
    dcg = sum(grade / math.log2(order.index(row) + 2) for row, grade in ((0, 1), (1, 2)))
    assert got == pytest.approx([dcg / (2 + 1 / math.log2(3)), 0.0, 0.0], abs=1e-6)
    assert all(isinstance(value, float) for value in got)


def test_one_call_for_all_distinct_queries():
    retriever = Counting()
    scorer = make(retriever=retriever)
    completions = ["party", "party", "", "sad", "party"]
    scorer.score(completions, ["q"] * 5, [[0], [0], [0], [0], [1]], [[1.0]] * 5)
    assert retriever.asked == [["party", "sad", "party"]]  # the last asks for another target
    scorer.score(["", ""], ["q"] * 2, [[0], [1]], [[1.0]] * 2)
    assert len(retriever.asked) == 1


def test_harm_is_measured_beside_the_raw_query():
    retriever = Counting()
    scorer = make({"ndcg@10": 1.0, "harm@10": 2.0, "lift@10": {"weight": 0}}, retriever)
    # "clock" has the relevant document at rank 1, "sad clock" second, "zebra" and a malformed answer nowhere.
    scored = scorer.score(["clock", "sad clock", "zebra", ""], ["clock"] * 4, [[4]] * 4, [[1.0]] * 4)
    assert retriever.asked == [["clock", "sad clock", "zebra"], ["clock"]]
    second = scored.components["ndcg@10"][1]
    assert scored.components["lift@10"] == pytest.approx([0, second - 1, -1, -1])
    assert scored.components["harm@10"] == pytest.approx([0, second - 1, -1, -1])
    assert scored.rewards == pytest.approx([1, second + 2 * (second - 1), -2, -2]) and second < 1
    # From nothing, a find is a gain and no harm.
    gained = scorer.score(["clock"], ["zebra"], [[4]], [[1.0]]).components
    assert gained["lift@10"] == pytest.approx([1]) and gained["harm@10"] == pytest.approx([0])


def test_where_the_raw_query_cannot_be_ranked_there_is_no_reward():
    class FailsOnRaw(Counting):
        def ranks(self, queries, targets):
            if [query.text for query in queries] == ["raw"]:
                raise OSError("down")
            return super().ranks(queries, targets)

    got = make({"harm@10": 1.0}, FailsOnRaw())(
        ["p"], ["party"], query=["raw"], target_rows=[[0]], target_grades=[[1.0]]
    )
    assert got == [None]


COMPLETION = st.sampled_from(["party", "face party", "sad", "", "zebra", "\n", "shoes\nparty"])
TARGETS = st.lists(st.integers(0, 4), max_size=4)


@pytest.mark.slow
@given(st.lists(st.tuples(COMPLETION, TARGETS), min_size=1, max_size=8))
def test_every_row_is_scored_on_its_own(batch):
    scorer = make({"ndcg@3": 1.0, "recall@2": 0.5, "format": 0.1})
    completions, targets = [c for c, _ in batch], [t for _, t in batch]
    together = scorer.score(completions, ["q"] * len(batch), targets, [[1.0] * len(t) for t in targets])
    for b, (completion, rows) in enumerate(batch):
        alone = scorer.score([completion], ["q"], [rows], [[1.0] * len(rows)])
        assert alone.rewards[0] == pytest.approx(together.rewards[b], nan_ok=True)
        for name, values in together.components.items():
            assert alone.components[name][0] == pytest.approx(values[b], nan_ok=True)


def test_no_judgments_is_none_and_logged_as_nothing():
    logged = {}
    got = make()(["p"], ["party"], query=["q"], target_rows=[[]], target_grades=[[]], log_metric=logged.__setitem__)
    assert got == [None]
    assert "reward/ndcg@10" not in logged and not any(math.isnan(value) for value in logged.values())


def test_chat_completions_are_read():
    message = [{"role": "assistant", "content": "sad face"}]
    assert make()([[]], [message], query=["q"], target_rows=[[1]], target_grades=[[1.0]]) == [1.0]


def test_the_same_keys_are_logged_for_every_batch():
    def keys(completions):
        logged = {}
        n = len(completions)
        make()(["p"] * n, completions, query=["q"] * n, target_rows=[[0]] * n, target_grades=[[1.0]] * n,
               log_metric=logged.__setitem__)  # fmt: skip
        return set(logged)

    expected = {"reward/ndcg@10", "reward/ndcg@10/std", "scorer/malformed", "scorer/echo", "scorer/written_words"}
    assert expected < keys(["party", "sad"]) == keys(["zebra"])
    unknown = {"scorer/echo", "scorer/written_words", "scorer/nothing_found"}  # there is nothing to take a mean of
    unasked = {"retrieval/seconds/p50", "retrieval/seconds/p95", "retrieval/error_rate"}
    assert keys([""]) == keys(["party"]) - unknown - unasked


def test_summary_counts_what_it_says():
    scored = make().score(["Happy party", "", "party", "zebra happy"], ["happy"] * 4, [[0]] * 4, [[1.0]] * 4)
    seen = summary(scored, ["happy"] * 4)
    assert seen["scorer/malformed"] == 0.25
    assert seen["scorer/echo"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert seen["scorer/written_words"] == pytest.approx(5 / 3)
    assert seen["scorer/distinct"] == 1.0
    assert seen["scorer/nothing_found"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("clause", ["防水登山鞋", "รองเท้าเดินป่า", "トレッキング靴", "ស្បែកជើង", "waterproof boot "])
def test_length_and_repetition_count_words_in_any_script(clause):
    scorer = make({"length": {"weight": 1.0, "max_words": 4}, "repetition": 1.0})
    scored = scorer.score([clause * 40, "猫 cat", clause * 40], ["q"] * 3, [[0]] * 3, [[1.0]] * 3)
    assert scored.components["length"].tolist() == [-1, 0, -1]
    assert (scored.components["repetition"] < -0.7).tolist() == [True, False, True]


def test_echo_compares_words_in_any_script():
    scored = make().score(["登山鞋 don’t"], ["防水登山鞋 DON'T"], [[0]], [[1.0]])
    assert summary(scored, ["防水登山鞋 DON'T"])["scorer/echo"] == 1.0
    assert summary(scored, ["红色雨伞"])["scorer/echo"] == 0.0
    assert summary(scored, ["红色雨伞"])["scorer/written_words"] == 3


def test_transcript(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    scorer = make({"ndcg@10": 1.0, "format": 0.5}, transcript=path, catalog=CATALOG, hits=2)
    state = SimpleNamespace(global_step=7)
    scorer(
        ["p1", "p2"],
        ["party", ""],
        query=["a", "b"],
        target_rows=[[0], [1]],
        target_grades=[[1.0]] * 2,
        trainer_state=state,
    )
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["step"] == 7 and first["prompt"] == "p1" and first["action"] == "party" and first["ranks"] == [1]
    assert first["hits"] == [{"id": "d0", "title": "T0"}, {"id": "d2", "title": "T2"}]
    assert first["rewards"] == {"ndcg@10": 1.0, "format": 0.0} and first["reward"] == 1.0
    assert second["action"] is None and second["hits"] is None
    assert second["rewards"] == {"ndcg@10": 0.0, "format": -1.0} and second["reward"] == -0.5


def test_duplicate_targets_do_not_lower_a_perfect_ranking():
    assert make()(["p"], ["sad"], query=["q"], target_rows=[[1, 1]], target_grades=[[1.0, 1.0]]) == [1.0]


def test_metrics_are_logged_and_not_trained_on():
    scorer = make({"ndcg@10": 1.0}, metrics=rewards.from_spec({"recall@1": 1.0}))
    scored = scorer.score(["party"], ["q"], [[0, 2]], [[1.0, 1.0]])
    assert set(scored.components) == {"ndcg@10", "recall@1"} and scored.components["recall@1"][0] == 0.5
    assert scored.rewards[0] == scored.components["ndcg@10"][0] == 1.0


def test_a_scorer_pickles():
    scorer = pickle.loads(pickle.dumps(make()))
    assert scorer.__name__ == "reward"
    assert np.array_equal(scorer.score(["sad"], ["q"], [[1]], [[1.0]]).rewards, [1.0])


GRADED = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 2.0, 3.0])), min_size=1, max_size=4)


@given(st.lists(st.tuples(COMPLETION, GRADED), min_size=1, max_size=6))
def test_ndcg_is_the_brute_force_one(batch):
    got = make({"ndcg@3": 1.0})(
        ["p"] * len(batch),
        [completion for completion, _ in batch],
        query=["q"] * len(batch),
        target_rows=[[row for row, _ in pairs] for _, pairs in batch],
        target_grades=[[grade for _, grade in pairs] for _, pairs in batch],
    )
    for value, (completion, pairs) in zip(got, batch, strict=True):
        grade_of = {row: max(g for r, g in pairs if r == row) for row, _ in pairs}
        lines = [line for line in completion.split("\n") if line]
        order = BM25.search([Query(lines[0])], 3).rows[0].tolist() if lines else []
        dcg = sum(grade_of.get(row, 0.0) / math.log2(i + 2) for i, row in enumerate(order))
        ideal = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(grade_of.values(), reverse=True)[:3]))
        assert value == pytest.approx(dcg / ideal, abs=1e-6)


def test_duplicate_targets_count_once_with_their_best_grade():
    twice = make()(["p"], ["party"], query=["q"], target_rows=[[0, 2, 0]], target_grades=[[1.0, 1.0, 2.0]])
    once = make()(["p"], ["party"], query=["q"], target_rows=[[0, 2]], target_grades=[[2.0, 1.0]])
    assert twice == once == [pytest.approx(1.0)]


def test_expand_sends_the_query_too():
    retriever = Counting()
    parse = Format(FormatConfig(action="expand", repeat=2)).parse
    scorer = Scorer(parse, retriever, rewards.from_spec({"ndcg@10": 1.0}))
    scorer.score(["party", "party", ""], ["sad", "happy", "sad"], [[0]] * 3, [[1.0]] * 3)
    assert retriever.asked == [["sad sad party", "happy happy party"]]


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError):
        make().score(["party"], ["q", "q"], [[0]], [[1.0]])


def test_rows_without_judgments_do_not_void_those_with():
    logged = {}
    got = make()(
        ["p"] * 2, ["sad"] * 2, query=["q"] * 2, target_rows=[[1], []], target_grades=[[1.0], []],
        log_metric=logged.__setitem__,
    )  # fmt: skip
    assert got == [1.0, None] and logged["reward/ndcg@10"] == 1.0 and logged["reward/ndcg@10/std"] == 0.0


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def one_step(scorer, completions, **more):
    n = len(completions)
    return scorer(["p"] * n, completions, query=["q"] * n, target_rows=[[0]] * n, target_grades=[[1.0]] * n, **more)


def test_transcripts_are_appended_and_name_rows_without_a_catalogue(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    scorer = make(transcript=path, hits=1)
    one_step(scorer, ["party"])
    one_step(scorer, ["clock"], trainer_state=SimpleNamespace(global_step=1))
    first, second = rows_of(path)
    assert (first["step"], second["step"]) == (0, 1)
    assert first["hits"] == [{"row": 0}] and second["hits"] == [{"row": 4}]
    keys = {"step", "query", "prompt", "completion", "action", "failed", "hits", "ranks", "rewards", "reward"}
    assert set(first) == set(second) == keys
    one_step(scorer, ["clock", "party"], query_id=["a", "b"])
    assert [row.get("query_id") for row in rows_of(path)] == [None, None, "a", "b"]


def test_transcripts_show_the_hits_of_so_many_queries_and_no_more(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    one_step(make(transcript=path, hits=1), [f"party {i}" for i in range(MAX_TRANSCRIPT_QUERIES + 3)])
    shown = [row["hits"] is not None for row in rows_of(path)]
    assert shown == [True] * MAX_TRANSCRIPT_QUERIES + [False] * 3


def test_a_transcript_without_hits_searches_nothing(tmp_path):
    class NoSearch(Counting):
        def search(self, queries, k):
            raise RetrieverError("searched")  # another exception would be an outage, and the row go without hits

    path = tmp_path / "rollouts.jsonl"
    one_step(make(transcript=path, retriever=NoSearch(), hits=0), ["party"])
    assert rows_of(path)[0]["hits"] is None


def test_a_transcript_keeps_what_was_written(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    texts = ["party 🎉", "party\u2028line", "party\n\tnext"]
    one_step(make(transcript=path), texts)
    assert [row["completion"] for row in rows_of(path)] == texts


def test_half_a_character_in_an_answer_is_the_model_s_failure(tmp_path):
    parse = Format(FormatConfig(answer="think_json")).parse
    scorer = Scorer(parse, BM25, rewards.from_spec({"ndcg@10": 1.0}), transcript=tmp_path / "rollouts.jsonl")
    (value,) = one_step(scorer, ['<think>a</think><answer>{"query": "party \\ud83d"}</answer>'])
    assert value is not None and len(rows_of(tmp_path / "rollouts.jsonl")) == 1
