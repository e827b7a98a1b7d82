"""--resume of runs that are finished, moved, or have damaged checkpoints, through the command."""

import json
import shutil
from pathlib import Path

import pytest

from rec_r1 import cli, train

pytestmark = pytest.mark.slow


def test_finished_damaged_and_moved(tiny_model, beir_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "model")
    settings = [
        "quickstart", "task.name=beir", "task.path=shop", "task.train_filter.raw_ndcg_below=1.01", "format.repeat=1",
        "model.name=model", "model.dtype=float32", "lora.layers_to_transform=0-1", "evaluation.every_steps=2",
        "evaluation.metrics=[ndcg@10]", "prompts_per_step=2",
        "grpo.num_generations=4", "grpo.max_completion_length=6", "grpo.max_steps=4", "grpo.save_steps=2",
    ]  # fmt: skip
    run = Path("run")

    def resume(*more: str, code: int = 0) -> str:
        capsys.readouterr()
        assert train.main([*settings, f"output_dir={run}", "--resume", *more]) == code
        return capsys.readouterr().err

    def logged() -> list[str]:
        return [line for line in (run / "metrics.jsonl").read_text().splitlines() if "train_runtime" not in line]

    assert train.main([*settings, f"output_dir={run}"]) == 0
    first = logged()
    said = resume()
    assert "nothing is trained" in said and "the closing evaluation already exists" in said
    shutil.rmtree(run / "evaluation")  # as if it had been killed in it
    assert "nothing is trained" in resume() and (run / "evaluation" / "test" / "comparison.json").is_file()
    assert logged() == first
    assert "another rewards" in resume("rewards={ndcg@10: 1.0}", code=2)

    weights = (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK")
    said = resume()
    assert "checkpoint-4 cannot be continued from (optimizer.pt" in said and "continuing from checkpoint-2" in said
    assert (run / "checkpoint-4" / "adapter_model.safetensors").read_bytes() == weights
    rewards = [[json.loads(line).get("reward") for line in lines] for lines in (first, logged())]
    assert rewards[0] == rewards[1]

    for step in (2, 4):
        (run / f"checkpoint-{step}" / "scheduler.pt").unlink()
    assert "scheduler.pt: missing" in resume(code=2).splitlines()[-1]

    run = Path(shutil.move("run", tmp_path / "moved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert cli.main(["eval", str(run), "--split", "validation"]) == 0
    queries = tmp_path / "shop" / "queries.jsonl"
    queries.write_text(queries.read_text().replace("shoes", "boots"))
    there = ["task.path=../shop", "model.name=../model"]
    shutil.copy(run / "checkpoint-4" / "rng_state.pth", run / "checkpoint-4" / "scheduler.pt")
    assert "data_fingerprint" in resume(*there, code=2)
    assert not list((tmp_path / "elsewhere").iterdir())
