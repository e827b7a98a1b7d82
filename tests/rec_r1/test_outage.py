"""The retriever's failure is never a score: rows become None, are counted, and a lasting outage ends the run."""

import json

import numpy as np
import pytest

import retrievers
import rewards
from rec_r1.config import FormatConfig
from rec_r1.evaluation.evaluate import score_raw
from rec_r1.prompts import Format
from rec_r1.scoring import Scorer
from rec_r1.scoring.batch_summary import summary
from rec_r1.tasks import make_split
from rec_r1.tasks.types import raw_scores
from retrievers import Cache, Catalog, RetrieverError
from rewards import RankingReward

CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(["party", "sad", "tada"]))
BM25 = retrievers.open("bm25", CATALOG)


class Flaky:
    """A retriever that fails as told: an exception for the whole call, or -1 for the queries named."""

    fingerprint = "flaky"

    def __init__(self, error=None, lost=()):
        self.error, self.lost, self.asked = error, lost, []

    def search(self, queries, k):
        if self.error:
            raise self.error
        return BM25.search(queries, k)

    def ranks(self, queries, targets):
        self.asked.append([query.text for query in queries])
        if self.error:
            raise self.error
        ranks = BM25.ranks(queries, targets)
        ranks[[query.text in self.lost for query in queries]] = -1
        return ranks


def make(retriever, **more) -> Scorer:
    spec = rewards.from_spec({"ndcg@10": 1.0, "format": 0.5})
    return Scorer(Format(FormatConfig()).parse, retriever, spec, **more)


def ask(scorer, completions, **more):
    n = len(completions)
    return scorer(["p"] * n, completions, query=["q"] * n, target_rows=[[0]] * n, target_grades=[[1.0]] * n, **more)


@pytest.mark.parametrize("error", [ConnectionError("refused"), TimeoutError("late"), KeyError("x"), MemoryError()])
def test_a_retriever_that_fails_gives_none_for_what_was_asked(error, tmp_path):
    logged = {}
    scorer = make(Flaky(error), transcript=tmp_path / "rollouts.jsonl")
    got = ask(scorer, ["party", "", "zebra"], log_metric=logged.__setitem__)
    assert got[0] is None and got[2] is None
    assert got[1] == pytest.approx(-0.5)  # malformed: the model's failure, known without a retriever
    assert logged["retrieval/error_rate"] == 1.0  # of the two that asked something
    assert logged["reward/format"] == pytest.approx(-1.0)  # of the row that was scored
    assert "scorer/nothing_found" not in logged
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["failed"] for row in rows] == [True, False, True]
    assert [row["reward"] for row in rows] == [None, -0.5, None] and rows[0]["hits"] is None


def test_a_query_that_finds_nothing_is_a_score():
    assert ask(make(Flaky()), ["zebra"]) == [0.0]


def test_only_the_rows_concerned_are_left_out():
    logged = {}
    got = ask(make(Flaky(lost=["sad"])), ["party", "sad", "tada", "sad"], log_metric=logged.__setitem__)
    assert [value is None for value in got] == [False, True, False, True]
    assert got == [
        v if v is None else w for v, w in zip(got, ask(make(BM25), ["party", "sad", "tada", "sad"]), strict=True)
    ]
    assert logged["retrieval/error_rate"] == 0.5 and logged["reward/ndcg@10"] == 0.5


@pytest.mark.parametrize("error", [RetrieverError("another index"), ValueError("target row 9")])
def test_a_broken_index_and_bad_arguments_stop_the_run(error):
    scorer = make(Flaky(error), error_steps=5)
    with pytest.raises(type(error), match=str(error)):  # outside training
        scorer.score(["party"], ["q"], [[0]], [[1.0]])
    assert scorer.outage is None
    logged = {}
    assert ask(scorer, ["party", ""], log_metric=logged.__setitem__) == [None, -0.5]
    assert str(error) in scorer.outage and "for good" in scorer.outage  # after one batch, not after error_steps
    assert logged["retrieval/error_rate"] == 1.0  # every process logs the same keys
    with pytest.raises(type(error)):  # training is over
        scorer.score(["party"], ["q"], [[0]], [[1.0]])


def test_hits_that_cannot_be_had_for_good_stop_the_run(tmp_path):
    class Broken(Flaky):
        def search(self, queries, k):
            raise RetrieverError("damaged")

    scorer = make(Broken(), transcript=tmp_path / "r.jsonl")
    assert ask(scorer, ["party"]) == [1.0] and "damaged" in scorer.outage


def test_a_reward_that_raises_is_no_failure_of_the_retriever():
    class Bad(Flaky):
        pass

    scorer = make(Bad())
    scorer.rewards = None
    with pytest.raises(AttributeError):
        ask(scorer, ["party"])
    assert scorer.outage is None and not scorer.training


def test_a_transcript_without_hits_is_no_reason_to_stop(tmp_path):
    class NoSearch(Flaky):
        def search(self, queries, k):
            raise ConnectionError("gone")

    assert ask(make(NoSearch(), transcript=tmp_path / "r.jsonl"), ["party"]) == [1.0]


def test_the_run_stops_once_the_rate_stays_above_the_threshold():
    flaky = Flaky()
    scorer = make(flaky, max_error_rate=0.5, error_steps=3)
    ten = ["party", "sad"] + ["tada"] * 8

    def step(lost=(), error=None):
        flaky.lost, flaky.error = lost, error
        ask(scorer, ten)
        return scorer.outage

    assert [step(["tada"]), step(["tada"])] == [None, None]
    assert step(["sad"]) is None  # 10%: it came back
    assert [step(["tada"]), step(error=ConnectionError("refused"))] == [None, None]
    stopped = step(["tada"])
    assert "more than retriever.max_error_rate=0.5" in stopped and "ConnectionError: refused" in stopped
    assert "last 3 batches" in stopped and "87%" in stopped
    assert step() is None


def test_evaluation_leaves_nothing_out():
    split = make_split("test", CATALOG, {"a": "party", "b": "sad"}, {"a": {"d0": 1.0}, "b": {"d1": 1.0}})
    assert score_raw(split, make(BM25)).components["ndcg@10"].tolist() == [1.0, 1.0]
    for broken in (Flaky(ConnectionError("refused")), Flaky(lost=["sad"])):
        with pytest.raises(RetrieverError, match=r"failed for \d of 2 queries"):
            score_raw(split, make(broken))
        with pytest.raises(RetrieverError, match="restart"):
            raw_scores(split, broken, RankingReward("ndcg", 10))


def test_many_queries_are_ranked_in_parts_as_in_one_call(monkeypatch):
    texts = [f"{word} {number}" for number in range(3) for word in ("party", "sad", "tada", "zebra")]
    split = make_split("test", CATALOG, dict(enumerate(texts)), {q: {"d1": 1.0, "d0": 2.0} for q in range(12)})
    whole = score_raw(split, make(BM25)), raw_scores(split, BM25, RankingReward("ndcg", 10))
    monkeypatch.setattr("rec_r1.tasks.types.AT_A_TIME", 5)
    asked = Flaky()
    parts = score_raw(split, make(asked)), raw_scores(split, asked, RankingReward("ndcg", 10))
    assert [len(queries) for queries in asked.asked] == [5, 5, 2] * 2
    assert np.array_equal(parts[0].outcome.ranks, whole[0].outcome.ranks) and np.array_equal(parts[1], whole[1])


def test_cache_hits_are_those_of_the_scored_queries(tmp_path):
    scorer = make(Cache(BM25, 3), transcript=tmp_path / "r.jsonl")
    shares = []
    for texts in (["party", "sad"], ["party", "party", "tada"], ["tada", "tada"]):
        ask(scorer, texts, log_metric=lambda k, v: shares.append(v) if k == "retrieval/cache_hits" else None)
    assert shares == [0.0, 0.5, 1.0]


def test_an_outage_is_not_remembered():
    flaky = Flaky(lost=["sad"])
    scorer = make(Cache(flaky, 3))
    assert [value is None for value in ask(scorer, ["party", "sad"])] == [False, True]
    flaky.lost = []
    assert ask(scorer, ["party", "sad"])[1] is not None
    assert flaky.asked == [["party", "sad"], ["sad"]]


def test_what_the_curves_show():
    scored = make(BM25).score(["party", "party", "", "sad"], ["q"] * 4, [[0]] * 4, [[1.0]] * 4)
    seen = summary(scored, ["q"] * 4)
    assert seen["retrieval/queries"] == 2 and seen["retrieval/distinct"] == pytest.approx(2 / 3)
    assert seen["retrieval/error_rate"] == 0 and 0 < seen["retrieval/seconds/p50"] <= seen["retrieval/seconds/p95"]
    assert np.isfinite(list(seen.values())).all()


def test_every_process_stops_for_the_outage_of_one(monkeypatch):
    """The retriever fails for one process alone: all end after the same step and give the same reason."""
    from transformers import TrainerControl, TrainerState
    from trl import GRPOConfig

    from rec_r1.training.callbacks import StopEarly

    args = GRPOConfig(per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to=[])
    outages = [None, "the retriever fails"]
    for gathered, stopped in (([(False, o) for o in outages], True), ([(False, None)] * 2, False)):
        monkeypatch.setattr("accelerate.utils.gather_object", lambda _, found=gathered: found)
        stop, control = StopEarly(make(BM25)), TrainerControl()
        stop.on_step_end(args, TrainerState(global_step=1), control)
        assert stop.stopped == control.should_training_stop == control.should_save == stopped
        assert stop.outage == ("the retriever fails" if stopped else None)
