"""What an evaluation adds to a run's results, and what it leaves as it was."""

import dataclasses
import functools
import json
import logging
import shutil

import numpy as np
import pytest

from rec_r1 import baselines, cli, config, generation, train
from rec_r1.baselines import post_training, sft_dpo
from rec_r1.baselines.post_training import Training
from rec_r1.environment import open_environment
from rec_r1.evaluation import budget, records, significance
from rec_r1.evaluation.budget import Used
from rec_r1.evaluation.evaluate import below_untrained, evaluate_run, metric_scorer, score_answers, score_raw
from rec_r1.pages import hub, run_report

pytestmark = pytest.mark.slow  # policies write, and later tests read what earlier ones stored

PART = "validation"
FILES = ("raw-query", "untrained", "trained")


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """The statistics have tests of their own; here they are made some fifty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rec_r1.evaluation.significance.RESAMPLES", 200)
        patch.setattr(
            "rec_r1.evaluation.compare.randomisation", functools.partial(significance.randomisation, resamples=200)
        )
        yield


@pytest.fixture(scope="module")
def settings(tiny_model):
    return [
        f"model.name={tiny_model}", "model.dtype=float32", "lora=null", "grpo.max_completion_length=6",
        "grpo.top_k=9", "evaluation.metrics=[ndcg@10,recall@100]", "baselines.few_shot=2",
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def env(settings):
    """Opened once, with a few of the queries; whoever opens the environment gets it."""
    opened = open_environment(config.load("quickstart", settings))
    task = opened.task
    splits = {name: split.take(range(24)) for name, split in task.splits.items()}
    few = dataclasses.replace(opened, task=dataclasses.replace(task, **splits))
    with pytest.MonkeyPatch.context() as patch:
        for place in ("evaluation.evaluate", "baselines", "environment"):
            patch.setattr(f"rec_r1.{place}.open_environment", lambda *_: few)
        yield few


@pytest.fixture(scope="module")
def trained(env, tiny_model, settings, tmp_path_factory):
    """A folder as a training leaves it: its best policy is the tiny model with its weights shaken. Evaluated once."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("evaluated") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump(config.load("quickstart", [*settings, f"output_dir={folder}"])))
    shutil.copytree(tiny_model, folder / "best")
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    policy.save_pretrained(folder / "best")
    (folder / "best.json").write_text(json.dumps({"step": 4, "metric": "ndcg@10", "value": 0.30}))
    (folder / "run.json").write_text(json.dumps({"model_source": str(tiny_model)}))
    evaluate_run(folder, PART)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, in another place than it was made in."""
    return shutil.copytree(trained, tmp_path / "moved")


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a policy fails."""

    def refuse(*_):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("rec_r1.models.load_policy_for_evaluation", refuse)


def comparison(folder):
    return json.loads((records.folder_of(folder, PART) / "comparison.json").read_text())


def stored(folder, name):
    return [json.loads(line) for line in (records.folder_of(folder, PART) / f"{name}.jsonl").read_text().splitlines()]


def without_time(result):
    return {key: value for key, value in result.items() if key != "created"}


def test_a_metric_is_added_and_nothing_is_replaced(env, run, no_model):
    before, rows = comparison(run), {name: stored(run, name) for name in FILES}
    assert cli.main(["eval", str(run), "--split", PART, "--metrics", "mrr@10"]) == 0
    after = comparison(run)
    assert before["metrics"] == ["ndcg@10", "recall@100"] and after["metrics"] == ["ndcg@10", "recall@100", "mrr@10"]
    assert after["tables"][: len(before["tables"])] == before["tables"]  # with the same slices
    assert after["best_baseline"] == before["best_baseline"] and after["changed"] == before["changed"]
    scorer = metric_scorer(env.scorer, ["mrr@10"])
    for name in FILES:
        now = stored(run, name)
        assert [{**row, "metrics": row["metrics"] | {"mrr@10": None}} for row in now] == [
            {**row, "metrics": row["metrics"] | {"mrr@10": None}} for row in rows[name]
        ]
        answers = [row["completion"] for row in now]
        split = env.task.splits[PART]
        scored = score_raw(split, scorer) if name == "raw-query" else score_answers(answers, split, scorer)
        assert np.allclose([row["metrics"]["mrr@10"] for row in now], scored.components["mrr@10"], atol=1e-6)
    # Later evaluations, and baselines, keep what was added.
    evaluate_run(run, PART)
    assert without_time(comparison(run)) == without_time(after)


def test_the_mismatch_slice_is_the_recipe_s_first_metric_s(run, no_model):
    size = next(t["n"] for t in comparison(run)["tables"] if t["slice"] == "mismatch")
    for metrics in (["recall@1000"], ["hit@1", "ndcg@10"], ["precision@5", "map@100"]):
        result = evaluate_run(run, PART, metrics)
        assert result["metrics"][:2] == ["ndcg@10", "recall@100"] and set(metrics) <= set(result["metrics"])
        assert {t["n"] for t in result["tables"] if t["slice"] == "mismatch"} == {size}


def test_baselines_get_an_added_metric_from_their_answers(env, run, settings, no_model, monkeypatch):
    here = config.load("quickstart", [*settings, f"output_dir={run}"])
    for name in ("popularity", "random", "untrained"):  # untrained: its answers are those of the evaluation
        baselines.run(here, name, PART)
    monkeypatch.undo()
    baselines.run(here, "few_shot", PART)
    monkeypatch.setattr("rec_r1.models.load_policy_for_evaluation", None)
    monkeypatch.setattr("rec_r1.baselines.BASELINES", {})  # none is made again
    result = evaluate_run(run, PART, ["mrr@10", "hit@3"])
    for metric in ("mrr@10", "hit@3"):
        table = next(t for t in result["tables"] if t["metric"] == metric)
        names = {row["system"] for row in table["rows"]}
        assert names == {"raw query", "untrained", "trained", "popularity", "random", "few shot"}
    for name in ("popularity", "few-shot"):
        rows = stored(run, name)
        for row in rows:  # the three stored hits decide hit@3
            assert row["metrics"]["hit@3"] == float(any(hit["grade"] > 0 for hit in row["hits"]))
    monkeypatch.undo()
    added = {name: stored(run, name) for name in ("popularity", "random")}
    for name, rows in added.items():  # what a baseline says that was asked for the metric at once
        direct = dataclasses.replace(here, evaluation=dataclasses.replace(here.evaluation, metrics=["mrr@10"]))
        scorer = metric_scorer(env.scorer, ["mrr@10"])
        scored = baselines.BASELINES[name](direct, env, env.task.splits[PART], scorer).scored
        assert np.allclose([row["metrics"]["mrr@10"] for row in rows], scored.components["mrr@10"], atol=1e-6)


def test_a_list_too_short_for_a_metric_is_not_scored_by_it(run, settings, caplog):
    baselines.run(config.load("quickstart", [*settings, f"output_dir={run}"]), "popularity", PART)
    result = evaluate_run(run, PART, ["recall@500"])
    assert "popularity: its stored lists are too short for recall@500" in caplog.text
    table = next(t for t in result["tables"] if t["metric"] == "recall@500")
    assert {row["system"] for row in table["rows"]} == {"raw query", "untrained", "trained"}


def test_samples_stand_beside_the_greedy_answers(env, run, no_model, monkeypatch, capsys):
    before = comparison(run)
    greedy = {name: (stored(run, name)) for name in FILES}
    monkeypatch.undo()
    assert cli.main(["eval", str(run), "--split", PART, "--samples", "3"]) == 0
    shown = capsys.readouterr().out
    assert "trained, 3 samples - raw query" in shown and "trained - raw query" in shown
    assert {name: (stored(run, name)) for name in FILES} == greedy
    after = comparison(run)
    assert set(after["systems"]) == {*before["systems"], "trained, 3 samples", "untrained, 3 samples"}
    assert after["systems"]["trained, 3 samples"]["description"].endswith("mean of 3 samples at temperature 1")
    assert after["best_baseline"] == before["best_baseline"] and after["changed"] == before["changed"]
    for old, new in zip(before["tables"], after["tables"], strict=True):
        assert new["comparisons"] == old["comparisons"]  # p values, too
        assert [row for row in new["rows"] if "samples" not in row["system"]] == old["rows"]
        assert len(new["rows"]) == len(old["rows"]) + 2
    (sampled,) = after["sampled"]
    assert sampled["samples"] == 3 and sampled["reference"] == "trained, 3 samples"
    assert {c["against"] for c in sampled["tables"][0]["comparisons"]} == {"raw query", "untrained, 3 samples"}
    # All samples are kept: a metric is added to their means without a model, and five are another system.
    rows = stored(run, "trained-3-samples")
    assert all(len(row["samples"]) == 3 and row["completion"] == row["samples"][0] for row in rows)
    assert len({sample for row in rows for sample in row["samples"]}) > len(rows)
    monkeypatch.setattr("rec_r1.models.load_policy_for_evaluation", None)
    evaluate_run(run, PART, ["mrr@10"])
    answers = [sample for row in rows for sample in row["samples"]]
    mean = score_answers(answers, env.task.splits[PART], metric_scorer(env.scorer, ["mrr@10"]), 3)
    added = [row["metrics"]["mrr@10"] for row in stored(run, "trained-3-samples")]
    assert np.allclose(added, mean.components["mrr@10"], atol=1e-6) and max(added) > 0
    evaluate_run(run, PART, samples=3)
    monkeypatch.undo()
    evaluate_run(run, PART, samples=2)
    assert [each["samples"] for each in comparison(run)["sampled"]] == [2, 3]
    assert {name: [row["completion"] for row in stored(run, name)] for name in FILES} == {
        name: [row["completion"] for row in rows] for name, rows in greedy.items()
    }


def test_samples_are_drawn_with_the_recipe_s_options(env, run, tiny_model):
    evaluate_run(run, PART, samples=2)
    recipe = config.load(run / "config.yaml")
    from rec_r1.tasks import prompts

    asked = prompts(env.task.splits[PART], env.task.catalog, env.format)
    how = generation.sampling_of(recipe, 2)
    assert how.options["top_k"] == 9
    rows = stored(run, "untrained-2-samples")
    answers, _ = generation.answer(recipe, str(tiny_model), None, asked, "again", how)
    assert [sample for row in rows for sample in row["samples"]] == answers


def test_report_and_card_read_a_folder_with_added_results(run, tmp_path):
    evaluate_run(run, PART, ["mrr@10"], samples=2)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.1, "time": 1.0}) + "\n")
    page, text = run_report.write([run], tmp_path / "report.html", PART)
    assert "2 samples per query" in page.read_text() and "trained, 2 samples - raw query" in text.read_text()
    folder = hub.export(run, tmp_path / "export", PART)
    card = (folder / "README.md").read_text()
    assert "mrr@10" in card and "ndcg@10 on validation" in card
    (run / "best.json").write_text(json.dumps({"step": 9, "metric": "ndcg@10", "value": 0.4}))
    with pytest.raises(config.UserError, match="with the policy of step 4, and its best policy is that of step 9"):
        hub.export(run, tmp_path / "again", PART)


def test_changed_weights_or_options_are_answered_again(run, no_model):
    evaluate_run(run, PART)
    for override in ("evaluation.repetition_penalty=2.0", "grpo.max_completion_length=5", "model.dtype=bfloat16"):
        kept = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.dump(config.load(run / "config.yaml", [override])))
        with pytest.raises(AssertionError, match="a model is loaded"):
            evaluate_run(run, PART)
        (run / "config.yaml").write_text(kept)
    weights = run / "best" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(AssertionError, match="a model is loaded"):
        evaluate_run(run, PART)


def test_a_policy_that_writes_otherwise_than_the_run_s_is_no_baseline_of_it(run, settings):
    rows = stored(run, "untrained")
    for override in ("evaluation.repetition_penalty=2.0", "grpo.max_completion_length=5"):
        here = config.load("quickstart", [*settings, f"output_dir={run}", override])
        with pytest.raises(config.UserError, match=override.partition("=")[0]):
            baselines.run(here, "untrained", PART)
    assert stored(run, "untrained") == rows


@pytest.mark.parametrize("model", ["trained", "untrained", "raw query", "few shot"])
def test_an_endpoint_is_never_named_as_another_system(model):
    assert baselines._endpoint_name(model) == f"{model} (endpoint)"
    assert baselines._endpoint_name("gpt-x") == "gpt-x"


@pytest.mark.parametrize(
    ("start", "best", "failed", "said"),
    [(0.4, 0.3, 0.0, True), (0.3, 0.3, 0.0, False), (0.2, 0.3, 0.0, False), (0.4, 0.3, 0.5, False)],
)
def test_a_best_checkpoint_below_the_untrained_policy_is_said(run, capsys, monkeypatch, start, best, failed, said):
    (run / "best.json").write_text(json.dumps({"step": 4, "metric": "ndcg@10", "value": best}))
    rows = [
        {"step": 0, "reward/ndcg@10": 0.9},
        {"step": 0, "eval/ndcg@10": start, "retrieval/held_out_error_rate": failed},
        {"step": 4, "eval/ndcg@10": best},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = (
        "On validation the best checkpoint (step 4) has ndcg@10 0.3000, which is below the untrained policy's 0.4000."
    )
    assert below_untrained(run) == (sentence if said else "")
    shutil.copytree(records.folder_of(run, PART), records.folder_of(run, "test"))
    monkeypatch.setattr("rec_r1.evaluation.evaluate.evaluate_run", lambda folder, env: comparison(run))
    train.close(run, None, 4)
    assert (sentence in capsys.readouterr().out) is said


def test_without_a_best_checkpoint_there_is_nothing_to_say(tmp_path):
    assert below_untrained(tmp_path) == ""


def test_stored_answers_are_said_to_be_used(run, caplog):
    caplog.set_level(logging.INFO, "rec_r1")
    evaluate_run(run, PART)
    assert caplog.text.count("no model is loaded") == 2


def test_answers_of_an_older_checkpoint_are_not_compared(run, no_model, caplog):
    """As if training had gone on since: what stands there of step 4 is not the policy of step 8."""
    name = "trained, 3 samples"
    kept = records.folder_of(run, PART) / "trained.json"
    for suffix in (".json", ".jsonl"):
        shutil.copy(kept.with_suffix(suffix), kept.with_name(f"trained-3-samples{suffix}"))
    older = kept.with_name("trained-3-samples.json")
    assert json.loads(kept.read_text())["step"] == 4
    older.write_text(json.dumps(json.loads(kept.read_text()) | {"name": name, "samples": 3, "identity": None}))
    evaluate_run(run, PART)
    assert name in comparison(run)["systems"] and "its completions are of step" not in caplog.text
    (run / "best.json").write_text(json.dumps({"step": 8, "metric": "ndcg@10", "value": 0.31}))
    evaluate_run(run, PART)
    after = comparison(run)
    assert name not in after["systems"] and "trained" in after["systems"] and after["sampled"] == []
    assert "its completions are of step 4, and the best policy is of step 8" in caplog.text
    assert "--samples 3" in caplog.text


def test_an_export_finds_the_model_of_a_run_that_was_moved(run, tmp_path):
    (run / "run.json").write_text(json.dumps({"model_source": str(tmp_path / "gone")}))
    (run / "best" / "generation_config.json").unlink()
    folder = hub.export(run, tmp_path / "export", PART)
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 6


def test_stored_answers_that_lack_a_row_are_made_again(run):
    rows = records.folder_of(run, PART) / "trained.jsonl"
    meta = json.loads(rows.with_suffix(".json").read_text())
    assert len(records.answers_in(records.stored(run, meta["identity"]))) == 24
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    assert records.stored(run, meta["identity"]) is None
    rows.with_suffix(".json").write_text('{"identity"')
    with pytest.raises(config.UserError, match=r"trained\.json: damaged .*evaluate again"):
        records.stored(run, meta["identity"])


def test_sft_on_samples_drawn_otherwise_is_trained_again(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(post_training.Training, "train", lambda *_: 0.0)
    examples = sft_dpo.Examples([{"prompt": "a", "completion": "b"}], Used(None, None))

    def trained(*more):
        recipe = config.load("quickstart", [*settings, f"output_dir={tmp_path}", *more])
        return sft_dpo._trained(recipe, env, "sft", "SFT", lambda: examples)[0]

    env = open_environment(config.load("quickstart", settings))
    folder = trained()
    assert trained() == folder
    budget.write(folder, Used(10, 1.0))  # made beside a training that was stopped early
    with pytest.raises(config.UserError, match=r"trained on 10 samples, but [\d,]+ would be as many as .*: delete it"):
        trained()
    budget.write(folder, Used(None, None))
    assert trained("baselines.dpo.beta=0.5", "baselines.reward_temperature=2", "baselines.few_shot=1") == folder
    for other in ("grpo.top_k=3", "baselines.samples=3", "baselines.sft.max_steps=7"):
        with pytest.raises(config.UserError, match="made with other settings"):
            trained(other)
    record = json.loads((folder / "settings.json").read_text())
    del record["grpo"], record["grounding"], record["format"]["examples"]  # as older versions wrote it
    record["retriever"] |= {"max_error_rate": 0.5}
    (folder / "settings.json").write_text(json.dumps(record))
    assert trained() == folder
    with pytest.raises(config.UserError, match="made with other settings"):
        trained("format.examples=1")
    old = {name: value for name, value in record.items() if name != "evaluation"}
    (folder / "settings.json").write_text(json.dumps(old))
    with pytest.raises(config.UserError, match=r"an older version trained it, with fewer updates .*: delete it"):
        trained()
    (folder / "settings.json").write_text(json.dumps(record | {"model": "of another kind"}))
    with pytest.raises(config.UserError, match=r"settings\.json"):
        trained()


def test_sft_stays_trained_where_only_a_path_s_spelling_or_the_cache_changes(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(post_training.Training, "train", lambda *_: 0.0)
    (tmp_path / "inside").mkdir()
    examples = sft_dpo.Examples([{"prompt": "a", "completion": "b"}], Used(None, None))

    def trained(folder, *more):
        monkeypatch.chdir(folder)
        recipe = config.load("quickstart", [*settings, f"output_dir={tmp_path / 'run'}", *more])
        return sft_dpo._trained(recipe, None, "sft", "SFT", lambda: examples)[0]

    folder = trained(tmp_path, "baselines.rollouts=old.jsonl")
    again = ["baselines.rollouts=../old.jsonl", "retriever.cache.memory_mb=1", "retriever.error_steps=2"]
    assert trained(tmp_path / "inside", *again) == folder
    with pytest.raises(config.UserError, match="made with other settings"):
        trained(tmp_path / "inside", "baselines.rollouts=old.jsonl")


@pytest.mark.parametrize(("kind", "trainer"), [("sft", "SFTTrainer"), ("dpo", "DPOTrainer")])
def test_what_a_trainer_finds_wrong_is_one_line(settings, tmp_path, monkeypatch, no_model, kind, trainer):
    def refuse(**_):
        raise ValueError("`padding_free` needs\nanother attention")

    monkeypatch.setattr(f"trl.{trainer}", refuse)
    for name in ("load_policy", "load_tokenizer"):
        monkeypatch.setattr(f"rec_r1.models.{name}", lambda *_, **__: None)
    monkeypatch.setattr("rec_r1.baselines.post_training.write_as_evaluated", lambda *_: None)
    recipe = config.load("quickstart", [*settings, f"output_dir={tmp_path}", f"baselines.{kind}.padding_free=true"])
    with pytest.raises(config.UserError, match=rf"^baselines\.{kind}\.padding_free: `padding_free` needs another"):
        Training(recipe, open_environment(recipe), kind).train([{"prompt": "a"}], tmp_path)
