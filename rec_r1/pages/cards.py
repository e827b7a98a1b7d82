"""Model cards: of an exported policy, and of the folders of a run, in place of the templates of TRL and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_r1 import config, models, runs
from rec_r1.config import Recipe
from rec_r1.evaluation import compare
from rec_r1.evaluation.tables import notes, sentence, text

NAME = "README.md"
_ASK = """
## How to ask it

```python
from rec_r1 import Policy

policy = Policy.load("{run}")
policy.search(["a query"], k=5)  # or histories=[["an item's id"]], for a task with histories
```
"""
_NOT_YET = """
## Results

The test split has not been evaluated yet: `rec-r1 eval {run}` does it.
"""
_CONTENT = """
## What is in this folder

`best/` is the policy with the best validation metric, `best.json` names its step, and `checkpoint-*` are what
`--resume` continues from. `config.yaml` is the recipe, `metrics.jsonl` has every logged number, `rollouts.jsonl`
every completion (earlier ones are in `rollouts.parts/`, where there are many), and `reward_curve.png` the curves.
`evaluation/` has the completions of each system and the comparison.
"""


def base_model(recipe: Recipe) -> str:
    """The hub's name of the model that was trained, or the recipe's name where it has none."""
    bundled = models.BUNDLED.get(recipe.model.name)
    return bundled.hub if bundled else recipe.model.name


def card(recipe: Recipe, result: Mapping[str, Any], adapter: bool) -> str:
    """The model card of an exported policy: front matter, description, prompt, and the tables of results.

    recipe: the run's recipe.
    result: the content of comparison.json.
    adapter: whether the weights are an adapter, and not a whole model.
    """
    settings = (
        "`recipe.yaml` has all settings. `generation_config.json` has the settings with which the completions were\n"
        "generated: pass it to `generate`, because that of the base model may differ."
    )
    return _head(recipe, result["task"], settings, adapter) + _results(result)


def write_run(folder: Path, recipe: Recipe, result: Mapping[str, Any] | None = None) -> None:
    """Write the cards of a run's folder and of its `best/`.

    folder: the folder of a run.
    recipe: its recipe.
    result: the content of the comparison.json of the test split. None = it has not been evaluated yet.
    """
    task, adapter = result["task"] if result else recipe.task.name, recipe.lora is not None
    end = _ASK.format(run=folder) + (_results(result) if result else _NOT_YET.format(run=folder))
    runs.write_atomically(
        folder / NAME, _head(recipe, task, "`config.yaml` has all settings.", adapter) + _CONTENT + end
    )
    best = folder / "best"
    if best.is_dir() and (folder / "best.json").is_file():
        record = runs.best_record(folder)
        settings = (
            f"It is the policy after step {record['step']},\nthe best by validation {record['metric']}. "
            "`../config.yaml` has all settings."
        )
        runs.write_atomically(best / NAME, _head(recipe, task, settings, adapter) + end)


def write_evaluated(folder: Path) -> None:
    """Write the cards of a run, with the results that its evaluation on the test split has written.

    folder: the folder of a run.
    """
    write_run(folder, config.load(folder / config.RUN_FILE), compare.read(folder, "test"))


def write_checkpoint(folder: Path, recipe: Recipe, step: int) -> None:
    """Write the card of a policy that a training has just saved.

    folder: the folder with the policy's weights.
    recipe: the recipe that is trained.
    step: the step after which it was saved.
    """
    settings = (
        f"It is the policy after step {step}\nof a training. The policy that is evaluated is `best/` in the run's "
        "folder, where `config.yaml` has all settings."
    )
    runs.write_atomically(folder / NAME, _head(recipe, recipe.task.name, settings, recipe.lora is not None))


def _head(recipe: Recipe, task: str, settings: str, adapter: bool) -> str:
    """Front matter, title, what the policy was trained for, ``settings`` as the next sentences, and the prompt."""
    base = base_model(recipe)
    prompt = recipe.format.prompt or f"(the default of answer={recipe.format.answer}, action={recipe.format.action})"
    front = [
        "---",
        f"base_model: {base}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [rec-r1, grpo, recommendation, retrieval, query-rewriting]",
        "---",
    ]
    return (
        "\n".join(front)
        + f"""

# {base.rpartition("/")[2]} trained on {task} with Rec-R1 Toolkit

{"A LoRA adapter for" if adapter else "All weights of"} `{base}`, trained with GRPO so that `{recipe.retriever.kind}`
ranks relevant documents first. It was trained on one prompt and one form of completion
(`format.answer: {recipe.format.answer}`, `format.action: {recipe.format.action}`). {settings}

Prompt: {prompt!r}
"""
    )


def _results(result: Mapping[str, Any]) -> str:
    """The section with the tables of a comparison."""
    blocks = [f"```\n{text(result, metric, result['part'])}\n```" for metric in result["metrics"]]
    tables = "\n\n".join([*blocks, *notes(result)])
    best = sentence(result)
    verdict = f"{best[0].upper()}{best[1:]}.\n\n" if best else ""
    raw = next(row for row in result["tables"][0]["rows"] if row["system"] == compare.RAW)
    return f"""
## Results

{verdict}The {result["part"]} split has {result["queries"]} queries. Brackets are 95% bootstrap
intervals over queries, and p is of the paired randomisation test, corrected by Holm over all comparisons of a metric.
The raw query scores {raw["mean"]:.3f} in {result["metrics"][0]}.

{tables}

The results were measured on {result["created"][:10]} with this task and this retriever. Others were not tested.
"""
