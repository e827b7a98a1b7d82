"""Read a recipe, a YAML file with `key=value` overrides, into dataclasses.

An unknown key is an error that names the nearest known one. The options of TRL and PEFT are not declared again here:
the sections `grpo` and `lora` pass through to `trl.GRPOConfig` and `peft.LoraConfig`, and their keys are checked
against these classes.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rec_r1.config import schema, typed, values
from rec_r1.config.overrides import apply, blamed
from rec_r1.config.redaction import redact, secret_urls, settled, shown, without_marks
from rec_r1.config.yaml_text import Dumper, parse
from retrievers.types import ToolkitError

RUN_FILE = "config.yaml"  # The file in a run's folder that holds the run's recipe.
DOCUMENT_END = "...\n"  # YAML's mark for the end of a document. A run's recipe without it is incomplete.


class UserError(ToolkitError):
    """A mistake that the user can fix.

    The message is one line that names the file, the field, its value and the fix. :func:`refuse` puts several mistakes
    into one message. Commands print the message and exit with code 2.
    """


@dataclass
class ModelConfig:
    """The model that is trained."""

    name: str = "smollm2-135m"  # A hub id, a local folder, or a name in models.BUNDLED.
    dtype: str = "auto"  # "auto" takes bfloat16 where the processor computes it fast, and float32 elsewhere.
    attn_implementation: str | None = None  # None leaves the choice to transformers, which prefers sdpa.
    trust_remote_code: bool = False  # True runs the Python code in the model's folder (auto_map).


@dataclass
class TrainFilter:
    """Which training prompts are kept, by the nDCG@k of their raw query."""

    raw_ndcg_below: float = 1.01  # Prompts whose raw query scores less than this are kept. 1.01 keeps all of them.
    k: int = 10  # The depth of the nDCG.


@dataclass
class TaskConfig:
    """The task: its catalogue, its queries and their targets."""

    name: str = "emoji"  # A key of tasks.TASKS, or the path of your own module that has load(config) -> Task.
    path: str | None = None  # The folder with the task's files, or hub:OWNER/NAME for a dataset of the hub.
    params: dict[str, Any] = field(default_factory=dict)  # The task's parameters: `Params` in rec_r1/tasks/NAME.py.
    splits: dict[str, str] = field(  # For beir: the file qrels/NAME.tsv that each split is read from.
        default_factory=lambda: {"train": "train", "validation": "dev", "test": "test"}
    )
    train_filter: TrainFilter = field(default_factory=TrainFilter)
    candidates: int = 0  # How many first hits of the raw query the prompt shows in place of {candidates}.


@dataclass
class FormatConfig:
    """What the prompt asks for, and how a completion becomes an action."""

    answer: str = "line"  # How a completion is written: line, json or think_json. See prompts.py.
    # A name in prompts.PROMPTS, or a text with one of prompts.PLACES. {answer} is replaced by the instruction that says
    # how to write the completion. None takes the prompt that belongs to the action.
    prompt: str | None = None
    system: str | None = None  # The system message. None keeps the one of the chat template.
    chat: bool = True  # False sends the prompt as plain text, without a chat template.
    # What a completion means. replace: it is the query. expand: it is appended to the query. items: it is a list of
    # titles, which are grounded to the catalogue. ranking: it is a new order of the candidates' numbers. edit: it names
    # titles to add to the history, each wished for or unwanted.
    action: str = "replace"
    repeat: int = 1  # For expand: how often the query itself is repeated before the completion.
    keep_query: bool = False  # For replace and expand: True sends the raw query when a completion is empty.
    max_items: int = 10  # For items and edit: only the first so many titles count.
    floor: float = 0.0  # For items and edit: a title whose best hit scores at most this is not in the catalogue.
    titles: int = 10  # A prompt shows the last so many titles of a history.
    title_words: int | None = None  # Titles in a prompt are cut to so many words. None shows them whole.
    examples: int = 0  # Every prompt begins with so many training queries, each with a relevant title as its answer.
    example_words: int = 0  # Examples are answered with so many words that their relevant documents share, not a title.


@dataclass
class CacheConfig:
    """Where results of the retriever are kept for later queries."""

    memory_mb: int = 64  # The memory of each process for them, in MB. 0 keeps none in memory.
    disk: str | None = None  # A folder that processes and runs share. None keeps none on disk.
    disk_mb: int = 1024  # The largest size of that folder, in MB.


@dataclass
class RetrieverConfig:
    """The retriever that ranks the catalogue."""

    kind: str = "bm25"  # A key of retrievers.BACKENDS, or the path of your own module.
    index: str | None = None  # The folder of the index. None takes a folder in the cache, named by its content.
    params: dict[str, Any] = field(default_factory=dict)  # The parameters of this kind of retriever.
    exclude_history: bool | None = None  # Whether rankings leave out the history's items. None: the task decides.
    cache: CacheConfig = field(default_factory=CacheConfig)
    # The run stops when the retriever fails for more than this share of the completions in each of the last
    # `error_steps` batches.
    max_error_rate: float = 0.1
    error_steps: int = 5


@dataclass
class GroundingConfig:
    """The retriever that finds the item of a written title, for the actions items and edit."""

    kind: str | None = None  # None takes the recipe's retriever, which must read text.
    params: dict[str, Any] = field(default_factory=dict)  # The parameters of this kind of retriever.


@dataclass
class EvaluationConfig:
    """When and how held-out queries are evaluated."""

    every_steps: int = 25  # Validation runs after so many steps. 0 validates only before and after training.
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "recall@100"])  # The first one picks the best.
    mismatch_below: float = 0.2  # The mismatch slice holds the queries whose raw first metric is below this.
    validation_limit: int | None = None  # Training validates on the first so many queries. None takes all.
    test_limit: int | None = None  # Only the first so many test queries are read, to try a recipe out quickly.
    batch_size: int = 64  # How many completions are generated at once.
    transcript_hits: int = 3  # How many hits each row of rollouts.jsonl shows.


@dataclass
class SpeedConfig:
    """Work that a training leaves out, because nothing reads its result or because it does not change the policy."""

    end_at_answer: bool = True  # Generation stops where the action is complete, not at grpo.max_completion_length.
    share_prompts: bool = True  # The completions of one prompt share its key-value cache, as they always do in vLLM.
    live_rows: bool = True  # Completions of advantage 0 are left out of the loss, unless it has a KL or entropy term.
    # From the second epoch on, a prompt whose last n groups were dead is asked again with probability explore^n, or 0.1
    # if that is larger. Prompts with live groups are asked twice in its place. 1 asks all prompts equally often.
    explore: float = 0.5


@dataclass
class EndpointConfig:
    """The server that the baseline `endpoint` asks for completions."""

    url: str = "http://localhost:8000/v1"  # Any OpenAI-compatible server: vLLM, Ollama, or a vendor's.
    model: str | None = None  # The name under which the server knows the model.
    key_variable: str = "OPENAI_API_KEY"  # If this environment variable is set, its value is sent to url as the key.
    dollars_per_million: list[float] | None = None  # The prices of prompt and completion tokens. None: not known.
    concurrency: int = 8  # How many requests are sent at the same time.
    extra: dict[str, Any] = field(default_factory=dict)  # Further fields of the request.


@dataclass
class BaselinesConfig:
    """The settings of `rec-r1 baseline` alone."""

    few_shot: int = 3  # How many examples a prompt holds: training queries, each with a relevant title as its answer.
    samples: int = 8  # For sft and dpo: how many completions of a training prompt the untrained policy writes.
    rollouts: str | None = None  # For sft and dpo: the rollouts.jsonl of a run, whose completions are used instead.
    outputs: str | None = None  # For sft: a JSONL file with `query` and `completion`, which is used instead.
    sft: dict[str, Any] = field(default_factory=dict)  # Options of trl.SFTConfig.
    dpo: dict[str, Any] = field(default_factory=dict)  # Options of trl.DPOConfig.
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class Recipe:
    """All settings of a run, one section for each part of the toolkit."""

    output_dir: str = "runs/run"  # The run's folder.
    seed: int = 0  # The seed of every random choice.
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: dict[str, Any] | None = None  # Options of peft.LoraConfig. None trains all weights.
    task: TaskConfig = field(default_factory=TaskConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    rewards: dict[str, Any] = field(default_factory=lambda: {"ndcg@10": 1.0})  # Each reward and its weight.
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    grpo: dict[str, Any] = field(default_factory=dict)  # Options of trl.GRPOConfig.
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)


_PROBLEM_SEPARATOR = "\nrec-r1: "  # Separates the problems in one message. `rec-r1: ` is printed before the first.


def recipes_folder() -> Path:
    """The folder of the recipes: inside an installed package, or beside the package in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find(recipe: str | Path) -> Path:
    """A recipe's file, from its path or from its name in the recipes folder.

    Raises UserError where there is no such file.
    """
    for candidate in (Path(recipe), recipes_folder() / recipe, recipes_folder() / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"recipe {recipe}: no such file: give a path, or one of {', '.join(shipped())}")


def shipped() -> list[str]:
    """The names of the recipes that come with the toolkit, in the form that :func:`find` takes."""
    folder = recipes_folder()
    return [path.stem for path in sorted(folder.glob("*.yaml"))] + [
        f"cpu/{path.stem}" for path in sorted(folder.glob("cpu/*.yaml"))
    ]


def load(recipe: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge it into the recipe that its `base:` names, and apply the overrides.

    recipe: the path of a recipe, or the name of one in the recipes folder.
    overrides: settings such as `grpo.learning_rate=1e-6`, applied in order.

    Returns the checked recipe. A secret that was redacted when the recipe was written counts as not set.

    Raises UserError, which names the file or the override, the field and the value, for a missing or empty file, broken
    YAML, an unknown key, a value of the wrong type, and a URL that holds a password.
    """
    path = find(recipe)
    tree = _read(path)
    if path.name == RUN_FILE and (path.parent / "run.json").is_file():
        _refuse_cut(path, tree)
        tree["output_dir"] = str(path.parent)  # The folder may have been moved after the run.
    base = tree.pop("base", None)
    if base is not None:
        beside = path.parent / str(base)
        tree = _merged(_read(beside if beside.is_file() else find(str(base))), tree)
    changed = copy.deepcopy(tree)
    for override in overrides:
        try:
            apply(changed, override)
        except ValueError as error:
            raise UserError(str(error)) from error
    try:
        return _checked(changed, str(path))
    except UserError as error:
        if overrides and _is_sound(tree, str(path)):
            refuse(blamed(overrides, problem.removeprefix(f"{path}: ")) for problem in problems_of(str(error)))
        raise


def _is_sound(tree: dict[str, Any], file: str) -> bool:
    try:
        _checked(tree, file)
    except UserError:
        return False
    return True


def _checked(tree: dict[str, Any], file: str) -> Recipe:
    tree = without_marks(tree)
    for name in secret_urls(tree):
        raise UserError(
            f"{file}: {name} is a URL with a user, password or key in it: take it out; secrets come from the "
            "environment: $HF_TOKEN, $REC_R1_TOKEN, $MILVUS_TOKEN, or the variable of baselines.endpoint.key_variable"
        )
    _refuse_not_finite(tree, file)
    result: Recipe = _dataclass(Recipe, tree, "", file)
    refuse(f"{file}: {problem}" for problem in values.problems(result))
    return result


def _refuse_not_finite(tree: dict[str, Any], file: str) -> None:
    """Raise UserError for every setting that is NaN or infinite: neither is a valid value of any setting."""
    try:
        names = list(typed.not_finite(tree))
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply, or an alias inside itself: write it out flat") from error
    refuse(f"{file}: {name} is NaN or infinite: write a finite number" for name in names)


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}: save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if tree is None or tree == {}:
        raise UserError(f"{path}: the file is empty: a recipe has at least one section, such as task: {{name: emoji}}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


def _refuse_cut(path: Path, tree: dict[str, Any]) -> None:
    """Raise UserError for a run's config.yaml whose end is missing: the missing settings would get their defaults."""
    is_complete = path.read_text(encoding="utf-8").rstrip().endswith(DOCUMENT_END.rstrip())
    missing = [f.name for f in dataclasses.fields(Recipe) if f.name not in tree]
    if not is_complete and missing:
        raise UserError(
            f"{path}: damaged (it ends before {missing[0]}): restore it from a copy, or write the run's recipe there"
        )


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``tree``: sections are merged key by key, and each key's value is replaced whole."""
    merged = dict(base)
    for section, value in tree.items():
        under = merged.get(section)
        merged[section] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML without its secrets. :func:`load` reads it back."""
    return yaml.dump(redact(dataclasses.asdict(recipe)), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors; rec_r1/README.md says how one uses it."""
    return schema.schema_of(Recipe)


def comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values without secrets, to be compared with a recipe that was written to a file."""
    plain: dict[str, Any] = settled(dataclasses.asdict(recipe))
    return plain


def cache_folder() -> Path:
    """The folder of indexes and converted models: $REC_R1_CACHE, or ~/.cache/rec-r1 where it is not set."""
    return Path(os.environ.get("REC_R1_CACHE") or Path.home() / ".cache" / "rec-r1")


def read_params(cls: type, given: dict[str, Any], section: str) -> Any:
    """Read a section's parameters into a dataclass, checked as the recipe's own sections are.

    cls: the dataclass.
    given: the parameters by name.
    section: the name of the section in messages, such as task.params.

    Raises UserError for an unknown parameter or a value of the wrong type.
    """
    return _dataclass(cls, given, f"{section}.", "recipe")


def _dataclass(cls: type, tree: Any, prefix: str, file: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {prefix.rstrip('.')} must be a section with keys, got {shown(prefix[:-1], tree)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{file}: unknown key {prefix}{key}{_nearest(str(key), hints)}")
        values[key] = _value(hints[key], value, f"{prefix}{key}", file)
    return cls(**values)


def _value(hint: Any, value: Any, name: str, file: str) -> Any:
    """``value``, checked against a field's type. An int becomes a float where a float is needed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return _dataclass(typing.cast(type, option), value, f"{name}.", file)
    wrong = typed.mismatch(hint, value, name)
    if wrong:
        raise UserError(f"{file}: {name} {wrong}")
    return float(value) if float in options and isinstance(value, int) else value


def _nearest(name: str, choices: typing.Iterable[str]) -> str:
    choices = list(choices)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f": did you mean {nearest[0]!r}?" if nearest else f": choose from {', '.join(choices)}"


def refuse(problems: typing.Iterable[str]) -> None:
    """Raise one UserError with one line for each of ``problems``. Do nothing where there are none."""
    lines = list(problems)
    if lines:
        raise UserError(_PROBLEM_SEPARATOR.join(lines))


def problems_of(message: str) -> list[str]:
    """The problems that :func:`refuse` joined into ``message``, or ``message`` alone if another function made it."""
    return message.split(_PROBLEM_SEPARATOR)


def unknown_key(name: str, key: str, owner: str, known: typing.Iterable[str]) -> str:
    """The message for a key of a pass-through section that is no field of its class ``owner``."""
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
    return f"{name}: {owner} has no such option: did you mean {nearest!r}?"
