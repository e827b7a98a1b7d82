"""Held-out queries that a run was trained on, because its data were edited since."""

import json

import pytest
import runs_

from rec_r1 import config
from rec_r1.environment import open_environment
from rec_r1.evaluation import audit, evaluate
from rec_r1.evaluation.trained_queries import trained_queries
from rec_r1.runs import rollouts
from rec_r1.tasks import Split

TEXTS = Split(["t1", "t2", "t3"], ["Lecturer", "wet weather", "joy"], [(0,), (1,), (2,)], [(1.0,)] * 3)
PROMPTS = ["Lecturer:", "wet weather:", "joy:"]


def trained_on(folder, *rows):
    keys = ("query_id", "query", "prompt")
    rollouts.append(rollouts.file_of(folder, 0), [dict(zip(keys, row, strict=True)) for row in rows])


def test_a_text_is_known_whatever_its_id_its_case_and_the_examples_in_its_prompt(tmp_path):
    trained_on(tmp_path, ("q9", "wet  Weather", "rain: umbrella\nwet  Weather:"), ("t3", "joyful", "joyful:"))
    assert trained_queries(tmp_path, TEXTS, PROMPTS) == ["t2"]


def test_a_history_is_known_by_its_user_and_its_prompt(tmp_path):
    """A user who was trained on with an earlier target, and another user with the same history, are others."""
    split = Split(["u1", "u2"], ["", ""], [(0,), (1,)], [(1.0,)] * 2, histories=[(3,), (4,)])
    chat = [{"role": "user", "content": "Bought: a"}]
    trained_on(tmp_path, ("u1", "", "Bought: nothing"), ("u3", "", chat))
    assert trained_queries(tmp_path, split, [chat, chat]) == []
    trained_on(tmp_path, ("u2", "", chat))
    assert trained_queries(tmp_path, split, [chat, chat]) == ["u2"]


def test_all_processes_are_read(tmp_path):
    for process, text in enumerate(("lecturer", "joy")):
        rollouts.append(rollouts.file_of(tmp_path, process), [{"query_id": "x", "query": text, "prompt": f"{text}:"}])
    assert trained_queries(tmp_path, TEXTS, PROMPTS) == ["t1", "t3"]


@pytest.fixture
def run(tmp_path):
    """A folder of the quickstart with a policy, and its environment."""
    recipe = config.load("quickstart", [f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    (tmp_path / "run.json").write_text("{}")
    runs_.policy(tmp_path / "best", 1.0)
    (tmp_path / "best.json").write_text(json.dumps({"step": 4, "metric": "ndcg@10", "value": 0.3}))
    return tmp_path, open_environment(recipe)


@pytest.mark.parametrize("verb", ["eval", "audit"])
def test_evaluations_warn_of_them(run, monkeypatch, caplog, verb):
    folder, env = run
    test, train = env.task.test, env.task.train
    trained_on(folder, ("a", test.queries[0], "…"), ("b", train.queries[0], "…"), ("c", test.queries[2], "…"))
    module = {"eval": evaluate, "audit": audit}[verb]
    monkeypatch.setattr(module, "open_environment", lambda recipe: env)

    class ReachedError(Exception):
        pass

    def reached(*_, **__):
        raise ReachedError

    monkeypatch.setattr(module, "evaluate_run" if verb == "eval" else "_policies", reached)
    call = {"eval": evaluate.evaluate, "audit": audit.audit}[verb]
    with pytest.raises(ReachedError):
        call(folder, "test")
    expected = (
        f"{folder} was trained on 2 of the {len(test)} test queries, such as {test.ids[0]!r}, because its data were "
        "edited since then. Its gain on these queries says nothing about new ones: restore the data of the training, "
        "or train again"
    )
    assert caplog.messages.count(expected) == 1
    caplog.clear()
    for split in ("train", "validation"):  # Training queries may be evaluated, and no validation query was trained on.
        with pytest.raises(ReachedError):
            call(folder, split)
    assert "was trained on" not in caplog.text
