"""The README's code, as it stands there: short, and it runs."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import retrievers
from rec_r1 import config, train
from rec_r1.environment import open_environment

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def module(name: str) -> str:
    (block,) = [b for b in BLOCKS if b.startswith(f"# {name}.py")]
    return block


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    """The README's own modules, importable."""
    for name in ("my_reward", "my_retriever", "my_task"):
        (tmp_path / f"{name}.py").write_text(module(name), encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


def test_every_block_is_under_fifteen_lines():
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len([line for line in block.splitlines()[1:] if line.strip()]) < 15


def test_own_reward_retriever_and_task_work_together(extensions):
    settings = ["task.name=my_task", "retriever.kind=my_retriever", "rewards={ndcg@10: 1.0, my_reward.brevity: 0.1}"]
    env = open_environment(config.load("quickstart", settings))
    split = env.task.train
    scored = env.scorer.score(["running shoes", ""], [split.queries[0]] * 2, [split.rows[0]] * 2, [split.grades[0]] * 2)
    assert scored.components["ndcg@10"].tolist() == [1.0, 0.0]
    assert scored.rewards.tolist() == pytest.approx([1.0 + 0.1 / 2, 0.0])
    queries = [retrievers.Query("red shoes"), retrievers.Query("nothing")]
    hits = env.retriever.search(queries, len(env.task.catalog))
    ranks = env.retriever.ranks(queries, np.array([[0, 1], [0, 1]]))
    for q in range(2):
        for row in range(2):
            position = np.flatnonzero(hits.rows[q] == row)
            assert ranks[q, row] == (position[0] + 1 if len(position) else 0)


@pytest.mark.slow
def test_scorer_in_a_plain_trl_script(tiny_model, tmp_path, monkeypatch):
    (script,) = [b for b in BLOCKS if "GRPOTrainer(" in b]
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in script
    monkeypatch.chdir(tmp_path)
    exec(compile(script.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)), "README", "exec"), {})
    assert list((tmp_path / "runs").glob("**/*"))


@pytest.mark.slow
def test_a_trained_policy_answers_a_query(tiny_model, tmp_path, monkeypatch, capsys):
    (script,) = [b for b in BLOCKS if "ask.parse(text, query)" in b]
    monkeypatch.chdir(tmp_path)
    sizes = ["grpo.per_device_train_batch_size=4", "grpo.gradient_accumulation_steps=1", "grpo.num_generations=4"]
    few = [*sizes, "grpo.max_steps=1", "evaluation.validation_limit=4", "task.train_filter.raw_ndcg_below=1.01"]
    assert train.main(["quickstart", f"model.name={tiny_model}", "model.dtype=float32", "lora=null", *few]) == 0
    capsys.readouterr()
    exec(compile(script, "README", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_recipes_of_the_readme_exist():
    named = re.findall(r"recipes/(\w+)\.yaml", README)
    assert "quickstart" in named
    for name in named:
        assert config.find(name).is_file()
