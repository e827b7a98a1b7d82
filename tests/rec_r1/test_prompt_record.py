"""What prompts earned: causes, streaks, and the state a checkpoint keeps."""

import json
from types import SimpleNamespace

import pytest

from rec_r1.scoring.earned import DEAD_CAUSES, LIVE, Earned, cause

NAN = float("nan")


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([("q", 0.5, False, 0.5), ("q", 0.25, False, 0.25)], LIVE),
        ([("q", 0.0, False, 0.0), ("q", 0.0, True, 0.0)], "all_zero"),
        ([("q", 1.0, False, 1.0), ("q", 1.0, False, 1.0)], "all_perfect"),
        ([("q", 0.5, False, 0.5), ("q", 0.5, False, 0.5)], "all_equal"),
        ([("q", 0.5, False, NAN), ("q", 0.5, False, NAN)], "all_equal"),
        ([("q", -2.0, True, 0.0), ("q", -2.0, True, 0.0)], "all_malformed"),
        ([("q", None, False, NAN), ("q", 0.5, False, 0.5)], None),  # the retriever failed: nothing is known
        ([("q", None, False, NAN), ("q", 0.5, False, 0.5), ("q", 0.75, False, 0.5)], LIVE),
    ],
)
def test_causes(group, expected):
    assert cause([Earned(*row) for row in group]) == expected


def test_streaks_shares_and_checkpoints():
    from rec_r1.training.prompt_record import STATE_KEY, PromptRecord

    scorer = SimpleNamespace(batches=[], take_earned=lambda: scorer.batches.pop(0))
    record, state = PromptRecord(scorer), SimpleNamespace(stateful_callbacks={})

    def step(**rewards):
        scorer.batches.append([Earned(q, r, False, r) for q, each in rewards.items() for r in each])
        record.on_step_end(None, state, None)

    step(a=[0.0, 0.0], b=[0.0, 1.0])
    step(c=[1.0, 1.0], a=[0.0, 0.0])
    assert record.dead == {"a": 2, "b": 0, "c": 1}
    assert record.last == {
        f"groups/{n}": {"all_zero": 0.5, "all_perfect": 0.5}.get(n, 0.0) for n in (LIVE, *DEAD_CAUSES)
    }
    assert record.when_began(0) == {} and record.when_began(1) == {"a": 2, "b": 0, "c": 1}
    step(a=[0.0, 1.0])
    assert record.dead["a"] == 0 and record.when_began(1)["a"] == 2  # the epoch goes on with what it began with
    scorer.batches.append([])  # a step that uses earlier completions
    record.on_step_end(None, state, None)

    resumed = PromptRecord(scorer)
    kept = SimpleNamespace(stateful_callbacks=json.loads(json.dumps(state.stateful_callbacks)))
    assert STATE_KEY in kept.stateful_callbacks
    resumed.on_train_begin(None, kept, None)
    assert (resumed.dead, resumed.epoch) == (record.dead, 1) and resumed.when_began(1) == record.when_began(1)
    assert resumed.when_began(2) == record.when_began(2) == {"a": 0, "b": 0, "c": 1}
