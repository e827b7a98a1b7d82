"""Export a trained policy as a folder with a model card of the measured results, and upload it to the hub."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_r1 import config, models, runs
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.tables import notes, sentence, text
from rec_r1.generation import generation_config, sampling_of
from rec_r1.pages import outputs

logger = logging.getLogger(__name__)
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # Patterns of a checkpoint's files to export.


def export(run: Path, folder: Path, split: str = "test") -> Path:
    """Export a run's best policy with its tokenizer, its recipe and a model card.

    run: the run's folder.
    folder: the folder to write, which must be empty or missing.
    split: the split whose results are in the card.

    Returns ``folder``. Raises UserError where the folder is not empty, the run has no trained policy, or the split was
    not evaluated.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml): give the output_dir of a training")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--folder: {folder} is no folder: choose another")
    outputs.refuse_inside_a_run(folder, "--folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty: choose another folder")
    if not (records.folder_of(run, split) / "comparison.json").is_file():
        raise UserError(f"{run}: its {split} split was not evaluated: run rec-r1 eval {run} --split {split} first")
    recipe = config.load(run / "config.yaml")
    policy = runs.best_policy(run)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in MODEL_FILES:
        for path in policy.glob(pattern):
            if path.name != "trainer_state.json":
                shutil.copy2(path, folder / path.name)
    if not (folder / "tokenizer_config.json").is_file():
        tokenizer = models.load_tokenizer(runs.model_source(run, recipe), recipe.model.trust_remote_code)
        tokenizer.save_pretrained(folder)
    _add_generation_config(recipe, run, folder)
    base = base_model(recipe)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # PEFT wrote a path of this machine as the base model.
        settings = runs.read_json(adapter, "restore it from a copy") | {"base_model_name_or_path": base}
        adapter.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    # The file itself is not copied, because one of an older version may hold secrets.
    (folder / "recipe.yaml").write_text(config.dump(recipe), encoding="utf-8")
    result = compare.read(run, split)
    (folder / "README.md").write_text(card(recipe, result, adapter.is_file(), base), encoding="utf-8")
    return folder


def _add_generation_config(recipe: Recipe, run: Path, folder: Path) -> None:
    """Write the generation_config.json of the evaluation, where the policy's own files have none.

    An adapter has none, and that of its base model may differ from the evaluation's.
    """
    if (folder / "generation_config.json").is_file():
        return
    source = runs.model_source(run, recipe)
    tokenizer = models.load_tokenizer(str(folder), recipe.model.trust_remote_code)
    how = generation_config(sampling_of(recipe), tokenizer, models.token_ids(source)["eos_token_id"])
    how.save_pretrained(folder)


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to the hub.

    folder: from :func:`export`.
    repository: OWNER/NAME on the hub. It is made if it does not exist.
    private: whether a new repository is private.

    Returns the address of the repository. Raises UserError where the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*MODEL_FILES, "recipe.yaml", "README.md"],
            commit_message="Policy trained with Rec-R1 Toolkit",
        )
    except Exception as error:  # The hub's errors have no common base.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{repository}: the hub refused ({type(error).__name__}: {reason}): check the name, the network, and "
            f"`hf auth login`; the folder is ready in {folder}"
        ) from error
    return str(address)


def base_model(recipe: Recipe) -> str:
    """The hub's name of the model that was trained, or the recipe's name where it has none."""
    bundled = models.BUNDLED.get(recipe.model.name)
    return bundled.hub if bundled else recipe.model.name


def card(recipe: Recipe, result: Mapping[str, Any], adapter: bool, base: str) -> str:
    """The text of a model card: front matter, description, prompt, and the tables of results.

    recipe: the run's recipe.
    result: the content of comparison.json.
    adapter: whether the policy is a LoRA adapter.
    base: the name of the model that was trained.
    """
    prompt = recipe.format.prompt or f"(the default of answer={recipe.format.answer}, action={recipe.format.action})"
    blocks = [f"```\n{text(result, metric, result['part'])}\n```" for metric in result["metrics"]]
    tables = "\n\n".join([*blocks, *notes(result)])
    front = [
        "---",
        f"base_model: {base}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [rec-r1, grpo, recommendation, retrieval, query-rewriting]",
        "---",
    ]
    best = sentence(result)
    verdict = f"{best[0].upper()}{best[1:]}.\n\n" if best else ""
    raw = next(r for r in result["tables"][0]["rows"] if r["system"] == compare.RAW)
    return (
        "\n".join(front)
        + f"""

# {base.rpartition("/")[2]} trained on {result["task"]} with Rec-R1 Toolkit

{"A LoRA adapter for" if adapter else "All weights of"} `{base}`, trained with GRPO so that `{result["retriever"]}`
ranks relevant documents first. It was trained on one prompt and one form of completion
(`format.answer: {recipe.format.answer}`, `format.action: {recipe.format.action}`). `recipe.yaml` has all settings.
`generation_config.json` has the settings with which the completions were generated: pass it to `generate`, because that
of the base model may differ.

Prompt: {prompt!r}

## Results

{verdict}The {result["part"]} split has {result["queries"]} queries. Brackets are 95% bootstrap
intervals over queries, and p is of the paired randomisation test, corrected by Holm over all comparisons of a metric.
The raw query scores {raw["mean"]:.3f} in {result["metrics"][0]}.

{tables}

The results were measured on {result["created"][:10]} with this task and this retriever. Others were not tested.
"""
    )
