"""Several seeds of one recipe: intervals over seeds and queries, and the command, stopped and resumed."""

import json

import numpy as np
import pytest

from rec_r1 import cli, config, train
from rec_r1.evaluation import records, seeds
from rec_r1.evaluation.number_format import p_value
from rec_r1.evaluation.significance import difference_over_seeds, holm, over_seeds, resampled_over_seeds


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
    assert train.main([*settings, "grpo.max_steps=1", "seed=5", "--seeds", "2"]) == 2
    assert "grpo.max_steps: 2 in " in capsys.readouterr().err and not (run / "seed-5").exists()
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert (
        "over seeds" in page and "ndcg@10 on test, 2 seeds" in page and "over seeds" in (run / "report.md").read_text()
    )
    (run / "seed-4" / "evaluation" / "test" / "untrained.json").unlink()
    assert cli.main(["report", str(run)]) == 2
    assert "no answers of 'untrained'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        (["seed=1", "output_dir=elsewhere", "grpo.dataloader_num_workers=1", "retriever.cache.memory_mb=10"], None),
        (["grpo.learning_rate=1.0e-3"], "grpo.learning_rate"),
        (["grpo.max_steps=40"], "grpo.max_steps"),
        (["evaluation.every_steps=7"], "evaluation.every_steps"),
        (["rewards={mrr@10: 1}"], "rewards"),
    ],
)
def test_only_seeds_of_one_recipe_are_compared(tmp_path, given, refused):
    runs = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    for run, changed in zip(runs, ([], given), strict=True):
        run.mkdir()
        (run / "config.yaml").write_text(config.dump(config.load("quickstart", changed)))
    wanted = "has no answers of 'trained'" if refused is None else f"{refused}.* in the recipe of the other seeds"
    with pytest.raises(config.UserError, match=wanted):
        seeds.evaluated(tmp_path, "test")


def test_p_against_a_loop():
    """Of a difference that is 0 in every third resample or so, beside the same draws by hand."""
    values, groups = np.array([[0.5, -0.2, 0.0, 0.3], [0.1, 0.4, -0.6, 0.2]]), ["a", "b", "b", "c"]
    found, draws = difference_over_seeds(values, groups), resampled_over_seeds(values[..., None], groups)[:, 0]
    below, above = (sum(1 for draw in draws if sign * draw <= 1e-12) for sign in (1, -1))
    assert found["p"] == 2 * (1 + min(below, above)) / (1 + len(draws)) and 0.05 < found["p"] < 1
    assert {**found, "p": 0} == {**over_seeds(values, groups), "p": 0}
    assert difference_over_seeds(-values, groups)["p"] == found["p"]
    assert difference_over_seeds(values + 1, groups)["p"] == 2 / (1 + len(draws))  # It is never 0.
    for nothing in (np.zeros((2, 3)), np.array([[0.1, 0.2, -0.3]] * 2)):  # The latter adds up to a rounding error.
        assert difference_over_seeds(nothing, ["u"] * 3)["p"] == 1
    with pytest.raises(ValueError, match="without a number"):
        difference_over_seeds(np.array([[0.0, np.nan]]), "ab")


@pytest.mark.slow
def test_p_of_no_difference_is_below_a_twentieth_about_as_often():
    rng = np.random.default_rng(3)
    found = [difference_over_seeds(rng.normal(size=(8, 60)), range(60), seed=trial)["p"] for trial in range(60)]
    assert np.mean(np.array(found) < 0.05) < 0.2  # With few seeds the bootstrap is narrow.


def test_better_needs_a_p_that_is_corrected_for_all_comparisons(tmp_path, monkeypatch):
    """One baseline of ten is ahead by chance: its interval alone is on one side of 0."""
    rng, queries = np.random.default_rng(0), 80
    base = rng.uniform(0.3, 0.7, queries)
    lead = {"raw query": 0.2, "untrained": 0.2, "rm3": -0.2, "by chance": 0.0082}
    lead |= {f"other {i}": 0.0 for i in range(8)}

    def system(name, values):
        rows = [{"query_id": str(q), "slices": {}, "metrics": {"ndcg@10": float(v)}} for q, v in enumerate(values)]
        return records.System(name, "policy", "", rows, {})

    each = {}
    for seed in (0, 1, 2):
        each[seed] = {"trained": system("trained", base)}
        for name, gained in lead.items():
            noise = rng.normal(0, 0.04, queries)
            each[seed][name] = system(name, base - gained - noise + noise.mean())
    recipe = config.load("quickstart", ["evaluation.metrics=[ndcg@10]"])
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / "config.yaml").write_text(config.dump(recipe))
    monkeypatch.setattr(seeds, "evaluated", lambda *_: each)
    result = seeds.measure(tmp_path)
    tables = {table["slice"]: {row["against"]: row for row in table["differences"]} for table in result["tables"]}
    assert tables["mismatch"]["raw query"]["p"] is None and tables["mismatch"]["raw query"]["p_holm"] is None
    tested = [row for rows in tables.values() for row in rows.values() if row["p"] is not None]
    assert [row["p_holm"] for row in tested] == holm([row["p"] for row in tested])
    chance = tables["all"]["by chance"]
    assert chance["low"] > 0 and chance["p"] < 0.05 < chance["p_holm"]
    *_, sentence = seeds.text(result).split("\n\n")
    assert "better than raw query, untrained; worse than rm3; not shown to differ from by chance, other 0" in sentence
    assert sentence.endswith(f"p below 0.05 after Holm's correction for {len(tested)} comparisons).")
    assert f"p{p_value(chance['p_holm'])}" in seeds.text(result)
