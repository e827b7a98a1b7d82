"""The search for a prompt: its changes, its budget, and that a stopped search ends as an uninterrupted one."""

import json

import numpy as np
import pytest

from rec_r1 import config, runs
from rec_r1.baselines import prompt_changes, prompt_search
from rec_r1.baselines.prompt_changes import Candidate, Shown, change, first_candidates, format_of
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.tasks import prompts


@pytest.fixture(scope="module")
def env():
    return open_environment(config.load("quickstart"))


def shown(env, place, text="red, dog", reward=0.5):
    return Shown(env.task.train.ids[place], env.task.train.queries[place], text, reward)


def test_examples_are_written_like_the_last_line(env):
    candidate = Candidate(env.format.template, ((env.task.train.ids[3], "red, dog"),))
    (asked,) = prompts(env.task.test.take([0]), env.task.catalog, format_of(candidate, env))
    own, query = env.task.train.queries[3], env.task.test.queries[0]
    assert asked.splitlines() == [
        f"{own}: red, dog", "happy: smile, joy, laugh", "rain: umbrella, cloud, weather", f"{query}:",
    ]  # fmt: skip
    assert prompt_changes.shows(candidate, env.task.train, [2, 3]).tolist() == [False, True]


def test_examples_of_chats_are_turns():
    env = open_environment(config.load("quickstart", ["format={answer: think_json, action: replace}"]))
    candidate = Candidate(env.format.template, ((env.task.train.ids[3], "<think></think>"),))
    (asked,) = prompts(env.task.test.take([0]), env.task.catalog, format_of(candidate, env))
    assert [turn["role"] for turn in asked] == ["user", "assistant", "user"]
    assert first_candidates(env.format)[0] == Candidate(env.format.template) and len(first_candidates(env.format)) > 2


def test_every_change_keeps_the_place_of_the_query(env):
    rng, seen = np.random.default_rng(0), set()
    good = [shown(env, place) for place in range(12)]
    for _ in range(300):
        before = Candidate(env.format.template, tuple((one.query_id, "cat") for one in good[:3]))
        after = change(before, good, good, env, lambda *_: " Words for {query}: ", rng)
        assert after is not None and "{query}" in after.template
        lines = len(after.template.splitlines()), len(after.examples)
        seen.add(("rewritten" if after.template == "Words for {query}:" else "", *lines))
    assert seen == {("", 3, 4), ("", 3, 2), ("", 3, 3), ("", 2, 3), ("rewritten", 1, 3)}


@pytest.mark.parametrize("written", ["no place", "", "{query} and {history}"])
def test_an_instruction_without_the_place_is_dropped(env, written):
    only = Candidate("{query}:")  # Nothing can be added, removed or reordered.
    asked = []

    def write(prompt, tokens):
        asked.append((prompt, tokens))
        return written

    assert change(only, [], [shown(env, 0, "bad words", 0.0)], env, write, np.random.default_rng(0)) is None
    ((prompt, tokens),) = asked
    assert "bad words" in prompt and env.task.train.queries[0] in prompt and "{query}" in prompt and tokens > 30


class Fake:
    """Rollouts of prompts whose reward is known: the number of their examples, with noise that all prompts share."""

    def __init__(self, env, queries=40):
        self.env, self.split, self.count = env, env.task.train.take(range(queries)), 0
        self.rewards, self.shown = {}, {}
        self.best = {f"{place}": shown(env, place) for place in range(60, 80)}
        self.noise = np.random.default_rng(1).normal(size=queries)

    def score(self, candidate, size):
        known = len(self.rewards.get(candidate, ()))
        self.count += max(0, size - known)
        self.rewards[candidate] = (self.noise + 0.01 * len(candidate.examples))[: max(size, known)]
        self.shown[candidate] = [shown(self.env, 0)]
        return self.rewards[candidate][:size]

    def needs(self, candidate, size):
        return max(0, size - len(self.rewards.get(candidate, ())))

    def ask(self, prompt, tokens):
        self.count += 1
        return "nothing"


@pytest.mark.parametrize("most", [41, 100, 4000])
def test_the_search_climbs_and_keeps_to_its_budget(env, most):
    rollouts = Fake(env)
    ranked = prompt_search.climb(rollouts, [Candidate(env.format.template)], most, np.random.default_rng(0))
    assert rollouts.count <= most and len(set(ranked)) == len(ranked)
    assert all(len(rollouts.rewards[one]) == 40 for one in ranked)
    assert [len(one.examples) for one in ranked] == sorted((len(one.examples) for one in ranked), reverse=True)
    if most != 100:
        assert len(ranked[0].examples) == (8 if most == 4000 else 0)


def settings(tiny_model, out):
    return [
        f"model.name={tiny_model}", "model.dtype=float32", f"output_dir={out}", "format.repeat=1",
        "rewards={test_budget.lottery: 1.0}", "evaluation.metrics=[ndcg@10]", "evaluation.validation_limit=4",
        "grpo.max_completion_length=6", "grpo.disable_tqdm=true", "baselines.search_rollouts=200",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_stopped_search_ends_as_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch):
    recipe = config.load("quickstart", settings(tiny_model, tmp_path / "whole"))
    env = open_environment(recipe)
    format_, used = prompt_search.found(recipe, env)
    folder = tmp_path / "whole" / "baselines" / "prompt_search"
    result, log = json.loads((folder / "prompt.json").read_text()), (folder / "search.jsonl").read_text()
    assert used.rollouts <= 200 and len(result["compared"]) >= 1
    assert sum(len(row["prompts"]) for row in map(json.loads, log.splitlines())) == used.rollouts
    best = max(result["compared"], key=lambda one: one["validation"])
    assert format_.template == best["template"] and len(format_.examples) == len(best["examples"])

    stopped = config.load("quickstart", settings(tiny_model, tmp_path / "stopped"))
    calls, generate = [], prompt_search.generate

    def some(*given):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(given[2]))
        return generate(*given)

    monkeypatch.setattr(prompt_search, "generate", some)
    with pytest.raises(KeyboardInterrupt):
        prompt_search.found(stopped, env)
    other = tmp_path / "stopped" / "baselines" / "prompt_search"
    with (other / "search.jsonl").open("a") as file:
        file.write('{"prompts": ["a')  # as a killed process leaves it
    written = []

    def counted(*given):
        written.append(len(given[2]))
        return generate(*given)

    monkeypatch.setattr(prompt_search, "generate", counted)
    _, again = prompt_search.found(stopped, env)
    assert json.loads((other / "prompt.json").read_text()) == result and again.rollouts == used.rollouts
    validated = 4 * len(result["compared"])
    assert sum(calls) + sum(written) == used.rollouts + validated  # Nothing is written twice.
    assert prompt_search.found(stopped, env)[1] == again and sum(calls) + sum(written) == used.rollouts + validated
    with pytest.raises(UserError, match="made with other settings: delete it"):
        more = config.load("quickstart", [*settings(tiny_model, tmp_path / "stopped"), "baselines.search_rollouts=9"])
        prompt_search.found(more, env)
    (other / "prompt.json").unlink()
    rows = runs.read_rows(other / "search.jsonl")
    rows[0]["prompts"][0] = "another"
    (other / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="belongs to another search"):
        prompt_search.found(stopped, env)


@pytest.mark.filterwarnings("error")  # numpy warns of a mean of nothing.
def test_a_prompt_that_shows_all_queries_has_no_mean_reward():
    assert prompt_search.mean_reward(np.array([np.nan, np.nan])) is None
    assert prompt_search.mean_reward(np.array([np.nan, 0.25, 0.75])) == 0.5
