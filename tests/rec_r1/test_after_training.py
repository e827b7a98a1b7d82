"""What a person does with a trained run: evaluate it again, compare, transfer, check abilities, hand it on."""

import json
import shutil
from functools import partial

import pytest
import yaml

from rec_r1 import cli, config, models, train
from rec_r1.pages import cards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of two steps with a learning rate that changes what is written."""
    out = tmp_path_factory.mktemp("after") / "run"
    settings = [
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1", f"output_dir={out}",
        "evaluation={every_steps: 2, validation_limit: 4, test_limit: 30, metrics: ['ndcg@10', 'recall@100']}",
        "grpo.max_steps=2",
        "prompts_per_step=2", "grpo.num_generations=4",
        "grpo.max_completion_length=6", "grpo.learning_rate=0.5", "grpo.disable_tqdm=true",
    ]  # fmt: skip
    assert train.main(["quickstart", *settings]) == 0
    return out


def comparison(run, part="test"):
    return json.loads((run / "evaluation" / part / "comparison.json").read_text())


def test_the_cards_of_a_run_are_the_toolkits_own(run):
    """Before anything else is evaluated: what the training itself leaves behind."""
    folders = [run, run / "best", *run.glob("checkpoint-*")]
    assert len(folders) == 3
    for folder in folders:
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nbase_model: ") and "trained on emoji with Rec-R1 Toolkit" in card
        for template in ("fine-tuned version", "More Information Needed", "None", "Model Card for"):
            assert template not in card, (folder, template)
    (row,) = [row for row in comparison(run)["tables"][0]["rows"] if row["system"] == "trained"]
    for folder in folders[:2]:
        card = (folder / "README.md").read_text()
        (line,) = [line for line in card.splitlines() if line.startswith("trained  ")][:1]
        assert f"{row['mean']:.3f}" in line and "not been evaluated" not in card
    assert "after step 2" in " ".join((run / "best" / "README.md").read_text().split())


def test_again_with_samples_and_against_another_run(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = comparison(run)
    assert cli.main(["eval", str(run), "--against", str(other), "--metrics", "ndcg@10,mrr@10"]) == 0
    shown = capsys.readouterr().out
    assert "trained - trained of other" in shown and "mrr@10 on test" in shown
    after = comparison(run)
    assert after["metrics"] == ["ndcg@10", "recall@100", "mrr@10"]
    for name in ("raw query", "untrained", "trained"):  # greedy: the same answers, the same numbers
        (a,), (b,) = ([r for r in c["tables"][0]["rows"] if r["system"] == name] for c in (before, after))
        assert a == b
    same = [c for c in after["tables"][0]["comparisons"] if c["against"] == "trained of other"]
    assert same[0]["difference"] == 0 and same[0]["p"] == 1 and same[0]["ties"] == 30
    assert cli.main(["eval", str(other), "--samples", "2", "--split", "validation"]) == 0
    sampled = comparison(other, "validation")
    assert "mean of 2 samples at temperature 1" in sampled["systems"]["trained, 2 samples"]["description"]
    assert sampled["sampled"][0]["reference"] == "trained, 2 samples" and "trained" not in sampled["systems"]
    assert cli.main(["eval", str(run), "--against", str(tmp_path)]) == 2
    assert "run rec-r1 eval" in capsys.readouterr().err


def test_transfer_to_other_retrievers(run, capsys):
    assert cli.main(["transfer", str(run), "--on", "bm25", "--on", "bm25 {b: 0.0}", "--on", "lucene"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["ndcg@10", "on", "test", "(n=30)", "bm25", "bm25", "{b:", "0.0}", "lucene"]
    result = json.loads((run / "evaluation/test/transfer.json").read_text())
    assert len(result["cells"]) == 3 * 3
    own = {c["system"]: c["mean"] for c in result["cells"] if c["retriever"] == "bm25"}
    evaluated = {r["system"]: r["mean"] for r in comparison(run)["tables"][0]["rows"]}
    assert own["raw query"] == pytest.approx(evaluated["raw query"], abs=1e-6)
    assert own["trained on bm25"] == pytest.approx(evaluated["trained"], abs=1e-6)
    other = {c["system"]: c["mean"] for c in result["cells"] if c["retriever"] == "bm25 {b: 0.0}"}
    assert other["raw query"] != own["raw query"]
    for spec, message in (("bm52", "unknown 'bm52'"), ("bm25 {b: ", "not valid YAML"), ("bm25 x", "are no mapping")):
        assert cli.main(["transfer", str(run), "--on", spec]) == 2
        assert message in capsys.readouterr().err
    assert (run / "evaluation/test/transfer.html").is_file() and (run / "evaluation/test/transfer.md").is_file()


def test_a_folder_for_others(run, tiny_model, tmp_path, capsys):
    out = tmp_path / "export"
    assert cli.main(["push", str(run), "me/policy", "--dry-run", "--folder", str(out)]) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft" and front["base_model"] == str(tiny_model)
    means = {r["system"]: r["mean"] for r in comparison(run)["tables"][0]["rows"]}
    assert f"The raw query scores {means['raw query']:.3f}" in card and f"{means['trained']:.3f} [" in card
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    assert (out / "adapter_model.safetensors").is_file() and (out / "tokenizer_config.json").is_file()
    assert not (out / "trainer_state.json").exists() and not (out / "optimizer.pt").exists()
    assert config.load(out / "recipe.yaml") == config.load(run / "config.yaml")
    policy = models.load_policy_for_evaluation(str(tiny_model), config.load(run / "config.yaml"), out)
    assert policy.active_adapters  # what was exported loads
    assert cli.main(["push", str(run), "me/policy", "--folder", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["push", str(run), "me/policy", "--folder", str(tmp_path / "again")]) == 2
    message = capsys.readouterr().err
    assert "the hub refused" in message and "the folder is ready" in message  # the tests are offline


def test_the_base_of_a_bundled_model_has_its_hub_name():
    assert cards.base_model(config.load("quickstart")) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_general_ability_by_lm_eval(run, tmp_path, capsys, monkeypatch):
    from lm_eval.tasks import TaskManager

    # Reading the thousands of files of lm_eval's own tasks takes longer than everything else here.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"q": f"{n} is", "choices": [" red", " blue"], "gold": n % 2}) + "\n" for n in range(6))
    )
    (tmp_path / "colours.yaml").write_text(
        yaml.safe_dump(
            {
                "task": "colours", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
                "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            }
        )
    )  # fmt: skip
    command = ["ability", str(run), "--tasks", "colours", "--include", str(tmp_path), "--limit", "4"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:4] == ["task", "metric", "untrained", "trained"] and shown[1].split()[:2] == [
        "colours",
        "acc",
    ]
    kept = json.loads((run / "evaluation/ability.json").read_text())["results"]
    assert set(kept) == {"untrained", "trained"} and kept["trained"]["colours"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert cli.main([*command[:3], "no_such_task", *command[4:]]) == 2
    assert "no such task" in capsys.readouterr().err
