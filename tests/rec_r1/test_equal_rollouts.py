"""Baselines beside a run at its own budget: reward-weighted SFT on its rollouts, and the best of several samples."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from datasets_ import write_jsonl

from rec_r1 import baselines, cli, config, generation, models
from rec_r1.baselines import post_training, sft_dpo
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.evaluation import records
from rec_r1.generation import sampling_of
from rec_r1.runs import rollouts
from rec_r1.tasks import prompts


def rollout(prompt, completion, reward, **more):
    return {"step": 0, "query": "q", "prompt": prompt, "completion": completion, "reward": reward, **more}


def test_the_rollouts_of_all_processes_are_grouped_by_prompt(tmp_path):
    chat = [{"role": "user", "content": "b"}]
    write_jsonl(tmp_path / "rollouts.jsonl", [rollout("a", "a1", 0.1), rollout(chat, "b1", 0.5), rollout("a", "a2", 0)])
    more = [rollout("a", "a3", 1.0, step=7), rollout("a", "an outage", None), rollout("a", "", 0.0)]
    write_jsonl(tmp_path / "rollouts.rank1.jsonl", [*more, rollout("c", "c1", 0.2)])
    with (tmp_path / "rollouts.rank1.jsonl").open("a") as file:
        file.write('{"prompt": "a", "compl')  # as a killed process leaves it
    found = sft_dpo._recorded(rollouts.files(tmp_path))
    assert [(g.prompt, g.answers, g.rewards.tolist()) for g in found] == [
        ("a", ["a1", "a2", "a3"], [0.1, 0.0, 1.0]), (chat, ["b1"], [0.5]), ("c", ["c1"], [0.2]),
    ]  # fmt: skip
    write_jsonl(tmp_path / "rollouts.jsonl", [{"prompt": "a", "completion": "a1"}])
    with pytest.raises(UserError, match=r"rollouts\.jsonl: line 1 is damaged \(it lacks prompt, completion or"):
        sft_dpo._recorded(rollouts.files(tmp_path))


def test_queries_with_the_same_prompt_are_groups_of_their_own(tmp_path):
    """Their targets differ, so the rewards of one say nothing about the completions of the other."""
    rows = [rollout("p", f"{i}", 0.1 * i, query_id=["a", "b"][i % 2]) for i in range(4)]
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    found = sft_dpo._recorded(rollouts.files(tmp_path))
    assert [(group.prompt, group.answers) for group in found] == [("p", ["0", "2"]), ("p", ["1", "3"])]


def test_rollouts_belong_to_the_query_with_their_id_and_text(tmp_path, monkeypatch):
    """Two queries have one text. Rows without an id, and ids of another task, are matched by the text alone."""
    monkeypatch.setattr(rollouts, "PART_BYTES", 150)
    split = SimpleNamespace(ids=["1", "2", "3"], queries=["red", "red", "blue"])
    rows = [
        rollout("p", "of 2", 0.5, query="red", query_id="2"), rollout("p", "of both", 0.25, query="red"),
        rollout("p", "no such id", 1.0, query="blue", query_id="1"), rollout("p", "another", 0.0, query="green"),
        rollout("p", "", 0.0, query="red", query_id="1"), rollout("p", "an outage", None, query="red", query_id="1"),
    ]  # fmt: skip
    for number, row in enumerate(rows):
        rollouts.append(rollouts.file_of(tmp_path, number % 2), [row])
    assert rollouts.is_in_parts(tmp_path / "rollouts.jsonl")
    found = sft_dpo._from_rollouts(tmp_path, split, ["p1", "p2", "p3"], np.zeros(3))
    assert [(g.prompt, sorted(g.answers), sorted(g.rewards.tolist())) for g in found] == [
        ("p1", ["of both"], [0.25]), ("p2", ["of 2", "of both"], [0.25, 0.5]), ("p3", ["no such id"], [1.0]),
    ]  # fmt: skip
    first = sft_dpo._from_rollouts(tmp_path / "rollouts.jsonl", split, ["p1", "p2", "p3"], np.zeros(3))
    assert [group.answers for group in first] == [["of 2"], ["no such id"]]  # one process, with its closed parts
    with pytest.raises(UserError, match="none of its queries is a training query"):
        sft_dpo._from_rollouts(tmp_path, SimpleNamespace(ids=["9"], queries=["x"]), ["p"], np.zeros(1))


def test_the_best_completion_is_taken_for_every_query():
    rng = np.random.default_rng(0)
    earned = rng.integers(0, 4, 60) / 3  # with ties
    completions = [f"{i}: {value}" for i, value in enumerate(earned)]
    expected = []
    for q in range(12):
        own = list(range(q * 5, q * 5 + 5))
        expected.append(completions[sorted(own, key=lambda i: (-earned[i], i))[0]])
    assert baselines.best_of(completions, earned, 5) == expected


@pytest.fixture
def run(lora_run, tmp_path):
    """A run of a tiny model whose rollouts earn 0 and 1 in turn: its own earn nothing."""
    out = tmp_path / "run"
    shutil.copytree(lora_run, out)
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    write_jsonl(out / "rollouts.jsonl", ({**row, "reward": float(i % 2)} for i, row in enumerate(rows)))
    return out


def beside(out, name, *more) -> list[str]:
    """The command for a baseline with the recipe of the run in ``out``."""
    settings = ["baselines.reward_weighted_sft={max_steps: 2, learning_rate: 1.0e-2}", "baselines.samples=3"]
    return ["baseline", str(out / "config.yaml"), name, f"output_dir={out}", *settings, *more]


@pytest.mark.slow
def test_reward_weighted_sft_trains_on_the_run_s_rollouts(run, capsys, monkeypatch):
    weighted, seen = beside(run, "reward_weighted_sft"), []
    train = post_training.Training.train

    def spy(self, rows, *given):
        seen.append(rows)
        return train(self, rows, *given)

    monkeypatch.setattr(post_training.Training, "train", spy)
    assert cli.main(weighted) == 0
    assert "trained - reward weighted sft" in capsys.readouterr().out
    recorded = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    better = {(row["prompt"], row["completion"]) for row in recorded if row["reward"] == 1.0}
    (rows,) = seen
    assert len(rows) == len(recorded)  # With a temperature of 0.1, 1 against 0 is e^10.
    assert {(row["prompt"], row["completion"]) for row in rows} == better
    policy = run / "baselines/reward_weighted_sft"
    assert (policy / "adapter_model.safetensors").is_file() and not (policy / "README.md").exists()
    assert cli.main([*weighted, "--split", "validation"]) == 0 and len(seen) == 1  # It is trained once.
    assert cli.main([*weighted, "baselines.reward_temperature=0.5"]) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert cli.main([*weighted, "rewards={ndcg@100: 0.5, ndcg@10: 0.9}"]) == 2
    assert "rewards.ndcg@10: 0.9, but the run in" in capsys.readouterr().err
    write_jsonl(run / "rollouts.rank1.jsonl", recorded[:2])
    assert cli.main(weighted) == 2
    assert "trained on other rollouts than the run's: delete it" in capsys.readouterr().err


@pytest.mark.slow
def test_reward_weighted_sft_without_rollouts_says_what_to_do(run, tmp_path, capsys):
    assert cli.main(["baseline", "quickstart", "reward_weighted_sft", f"output_dir={tmp_path / 'none'}"]) == 2
    shown = capsys.readouterr().err
    assert "has no rollouts.jsonl" in shown and "train the recipe first" in shown and "Traceback" not in shown
    recorded = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    write_jsonl(run / "rollouts.jsonl", ({**row, "reward": 0.0} for row in recorded))
    assert cli.main(beside(run, "reward_weighted_sft")) == 2
    assert "earn the same reward, so there is nothing to weight" in capsys.readouterr().err
    assert not list(run.glob("baselines/*"))


@pytest.mark.slow
def test_best_of_is_the_best_sample_by_the_reward_and_an_upper_bound(run, capsys):
    assert cli.main(beside(run, "best_of")) == 0
    shown = capsys.readouterr().out
    assert "\nbest of 3, upper bound " in shown and "trained - best of" not in shown
    assert "best of 3, upper bound: it reads the judgments" in shown and "the others (best of" not in shown
    recipe = config.load(run / "config.yaml", [f"output_dir={run}"])
    env = open_environment(recipe)
    split = env.task.test
    asked, sampling = prompts(split, env.task.catalog, env.format), sampling_of(recipe, 3)
    samples, _ = generation.answer(recipe, models.resolve(recipe.model.name), None, asked, "again", sampling)
    kept = records.load_all(run, "test")["best of 3, upper bound"]
    assert kept.reads_judgments and kept.samples == 1 and len(kept.rows) == len(split) == 10
    for q, row in enumerate(kept.rows):
        own = [env.scorer.score_split([text], split.take([q])).rewards[0] for text in samples[3 * q : 3 * q + 3]]
        assert row["completion"] == samples[3 * q + own.index(max(own))]
    assert cli.main(["eval", str(run), "--metrics", "mrr@10"]) == 0  # Later evaluations keep what it is.
    assert "trained - best of" not in capsys.readouterr().out
