"""Several seeds of one recipe: intervals over seeds and queries, and the command, stopped and resumed."""

import json

import numpy as np
import pytest

from rec_r1 import cli, train
from rec_r1.evaluation import seeds
from rec_r1.evaluation.significance import over_seeds


@pytest.mark.slow
def test_the_interval_covers_seeds_and_queries():
    """Of normal data with a seed effect and a query effect: the true mean lies inside as often as promised."""
    rng, inside = np.random.default_rng(0), 0
    for trial in range(60):
        values = rng.normal(0, 1, (8, 1)) + rng.normal(0, 1, (1, 40)) + rng.normal(0, 1, (8, 40))
        found = over_seeds(values, range(40), seed=trial)
        assert found["mean"] == pytest.approx(values.mean())
        inside += found["low"] <= 0 <= found["high"]
    assert inside >= 50  # 57 expected; with so few seeds the percentile bootstrap is narrow


@pytest.mark.slow
def test_against_a_loop():
    values, groups = np.random.default_rng(1).normal(size=(3, 6)), ["a", "a", "b", "c", "c", "c"]
    rng, means = np.random.default_rng(2), []
    for _ in range(20_000):
        rows = rng.integers(0, 3, 3)
        columns = [i for g in rng.choice(["a", "b", "c"], 3) for i in range(6) if groups[i] == g]
        means.append(values[np.ix_(rows, columns)].mean())
    found = over_seeds(values, groups)
    assert np.allclose([found["low"], found["high"]], np.percentile(means, [2.5, 97.5]), atol=0.03)
    with pytest.raises(ValueError, match="without a number"):
        over_seeds(np.array([[0.0, np.nan]]), "ab")


@pytest.mark.slow
def test_train_resume_and_report(tiny_model, beir_folder, tmp_path, capsys):
    run = tmp_path / "runs"
    settings = [
        "quickstart", "task.name=beir", f"task.path={beir_folder}", "task.train_filter.raw_ndcg_below=1.01",
        "format.repeat=1", f"model.name={tiny_model}", "model.dtype=float32", "lora=null", f"output_dir={run}",
        "evaluation.metrics=[ndcg@10]", "evaluation.every_steps=0", "evaluation.test_limit=30",
        "prompts_per_step=2", "grpo.num_generations=4", "grpo.max_completion_length=6",
        "grpo.save_steps=1", "seed=3",
    ]  # fmt: skip
    assert train.main([*settings, "grpo.max_steps=1", "--seeds", "1"]) == 2
    assert "--seeds must be at least 2, got 1" in capsys.readouterr().err
    assert train.main([*settings, "grpo.max_steps=1", "output_dir=" + str(run / "seed-3")]) == 0  # one is there already
    assert train.main([*settings, "grpo.max_steps=2", "--seeds", "2"]) == 2
    assert "seed-3 is not empty" in capsys.readouterr().err and not (run / "seed-4").exists()
    assert train.main([*settings, "grpo.max_steps=2", "--seeds", "2", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "ndcg@10 on test, 2 seeds" in said and "trained - raw query" in said and "seed 4" in said
    logs = [(run / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines() for seed in (3, 4)]
    assert [sum('"reward"' in line for line in log) for log in logs] == [2, 2] and logs[0] != logs[1]
    result = json.loads((run / seeds.RECORD).read_text())
    assert result["seeds"] == [3, 4] and result["tables"][0]["n"] == 2
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert (
        "over seeds" in page and "ndcg@10 on test, 2 seeds" in page and "over seeds" in (run / "report.md").read_text()
    )
    (run / "seed-4" / "evaluation" / "test" / "untrained.json").unlink()
    assert cli.main(["report", str(run)]) == 2
    assert "no answers of 'untrained'" in capsys.readouterr().err
