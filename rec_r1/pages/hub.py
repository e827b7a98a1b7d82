"""Export a trained policy as a folder with a model card of the measured results, and upload it to the hub."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from rec_r1 import config, models, runs
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.evaluate import eval_command
from rec_r1.generation import generation_config, sampling_of, write_as_evaluated
from rec_r1.pages import cards, outputs

logger = logging.getLogger(__name__)
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # Patterns of a checkpoint's files to export.


def check(run: Path, folder: Path, split: str = "test") -> None:
    """Raise UserError where nothing can be exported from ``run`` into ``folder``, see :func:`export`."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run (no config.yaml): give the output_dir of a training")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--folder: {folder} is no folder: choose another")
    outputs.refuse_inside_a_run(folder, "--folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty: choose another folder")
    command = f"run {eval_command(run, split)} first"
    if not (records.folder_of(run, split) / "comparison.json").is_file():
        raise UserError(f"{run}: its {split} split was not evaluated: {command}")
    step, evaluated = runs.step_of(run, runs.best_policy(run)), compare.read(run, split)["systems"].get(compare.TRAINED)
    if evaluated is None:
        raise UserError(f"{run}: its trained policy was not evaluated on its {split} split: {command}")
    if evaluated.get("step") not in (None, step):  # None: a comparison of an older version.
        raise UserError(
            f"{run}: its {split} split was evaluated with the policy of step {evaluated['step']}, and its best policy "
            f"is that of step {step}: {command}"
        )


def export(run: Path, folder: Path, split: str = "test", merged: str | None = None) -> Path:
    """Export a run's best policy with its tokenizer, its recipe and a model card.

    run: the run's folder.
    folder: the folder to write, which must be empty or missing.
    split: the split whose results are in the card.
    merged: the type of the weights, such as float32, in which an adapter is merged into its base model. None = the
        policy's files as they are.

    Returns ``folder``. Raises UserError where the folder is not empty, the run has no trained policy, or the split was
    not evaluated.
    """
    check(run, folder, split)
    recipe = config.load(run / "config.yaml")
    policy = runs.best_policy(run)
    folder.mkdir(parents=True, exist_ok=True)
    if merged is None:
        for pattern in MODEL_FILES:
            for path in policy.glob(pattern):
                if path.name != "trainer_state.json":
                    shutil.copy2(path, folder / path.name)
    else:
        _merge(recipe, runs.model_source(run, recipe), policy, folder, merged)
    if not (folder / "tokenizer_config.json").is_file():
        tokenizer = models.load_tokenizer(runs.model_source(run, recipe), recipe.model.trust_remote_code)
        tokenizer.save_pretrained(folder)
    _add_generation_config(recipe, run, folder)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():  # PEFT wrote a path of this machine as the base model.
        base = {"base_model_name_or_path": cards.base_model(recipe)}
        settings = runs.read_json(adapter, "restore it from a copy") | base
        adapter.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    # The file itself is not copied, because one of an older version may hold secrets.
    (folder / "recipe.yaml").write_text(config.dump(recipe), encoding="utf-8")
    result = compare.read(run, split)
    (folder / cards.NAME).write_text(cards.card(recipe, result, adapter.is_file()), encoding="utf-8")
    return folder


def _merge(recipe: Recipe, source: str, policy: Path, folder: Path, dtype: str) -> None:
    """Save a policy as a whole model. An adapter is added to its base in float32, where nothing is rounded away."""
    import torch

    exact = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32"))
    model: Any = models.load_policy_for_evaluation(source, exact, policy)
    if (policy / "adapter_config.json").is_file():
        model = model.merge_and_unload()
    own = (policy / "tokenizer_config.json").is_file()
    tokenizer = models.load_tokenizer(str(policy) if own else source, recipe.model.trust_remote_code)
    write_as_evaluated(model, tokenizer, recipe)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
