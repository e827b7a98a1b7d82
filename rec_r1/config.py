"""A recipe: YAML + `key=value` overrides -> dataclasses. An unknown key is an error that names the nearest.

What TRL and PEFT call options is not declared again here: `grpo` and `lora` pass through to
`trl.GRPOConfig` and `peft.LoraConfig`, and their keys are checked against those classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RUN_FILE = "config.yaml"  # a run's recipe, in its folder
END = "...\n"  # YAML for the end of a document: without it a run's recipe was cut short


class UserError(Exception):
    """A mistake the user can mend. One line: file, field, value, fix. Commands print it and exit with code 2."""


@dataclass
class ModelConfig:
    name: str = "smollm2-135m"  # hub id, local folder, or a name in models.BUNDLED
    dtype: str = "auto"  # auto = bfloat16 where the processor computes it fast, else float32
    attn_implementation: str = "sdpa"


@dataclass
class TrainFilter:
    raw_ndcg_below: float = 1.01  # keep training prompts whose raw query scores less; 1.01 keeps all
    k: int = 10


@dataclass
class TaskConfig:
    name: str = "emoji"  # a key of tasks.TASKS, or path of a module of yours with load(config) -> Task
    path: str | None = None  # the folder with the task's files, or hub:OWNER/NAME, a dataset of the hub
    params: dict[str, Any] = field(default_factory=dict)  # of the task, see `Params` in rec_r1/tasks/NAME.py
    splits: dict[str, str] = field(  # beir: which qrels/NAME.tsv plays which part
        default_factory=lambda: {"train": "train", "validation": "dev", "test": "test"}
    )
    train_filter: TrainFilter = field(default_factory=TrainFilter)
    candidates: int = 0  # the raw query's first hits, shown in the prompt as {candidates}; 0 = none


@dataclass
class FormatConfig:
    answer: str = "line"  # line | json | think_json, see prompts.py
    # a name in prompts.PROMPTS, or text with one of prompts.PLACES; {answer} stands for how to write the answer
    prompt: str | None = None
    system: str | None = None  # system message; None = the chat template's own
    chat: bool = True  # False: plain continuation, no chat template
    # replace: the answer is the query | expand: the query, then the answer | items: a list of titles, grounded to the
    # catalogue | ranking: the candidates' numbers in a new order | edit: titles to add to the history, with signs
    action: str = "replace"
    repeat: int = 1  # expand: how often the query itself is written
    max_items: int = 10  # items, edit: how many of a list count
    floor: float = 0.0  # items, edit: a title whose best hit scores this or less is not in the catalogue
    titles: int = 10  # of a history, the last so many in a prompt
    title_words: int | None = None  # titles in a prompt are cut to so many words; None = whole
    examples: int = 0  # training queries with a relevant title as their answer, at the head of every prompt


@dataclass
class CacheConfig:
    memory_mb: int = 64  # answers of the retriever kept in memory, a process; 0 = none
    disk: str | None = None  # a folder that processes and runs share
    disk_mb: int = 1024


@dataclass
class RetrieverConfig:
    kind: str = "bm25"  # a key of retrievers.BACKENDS, or path of a module of yours
    index: str | None = None  # folder; None = the cache, named by content
    params: dict[str, Any] = field(default_factory=dict)  # of the kind, see retrievers/KIND.py
    exclude_history: bool = False  # what the query's history already holds is not retrieved
    cache: CacheConfig = field(default_factory=CacheConfig)
    max_error_rate: float = 0.1  # the run stops once the retriever fails for more than this share of completions …
    error_steps: int = 5  # … in each of so many batches in a row


@dataclass
class GroundingConfig:
    """What turns written titles into documents, for format.action items and edit."""

    kind: str | None = None  # None = the retriever itself, which must read text
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvaluationConfig:
    every_steps: int = 25  # 0 = only before and after training
    metrics: list[str] = field(default_factory=lambda: ["ndcg@10", "recall@100"])  # the first picks the best
    mismatch_below: float = 0.2  # the vocabulary-mismatch slice: raw score of the first metric below this
    validation_limit: int | None = None  # evaluate on the first N validation queries while training
    batch_size: int = 64
    transcript_hits: int = 3  # hits a rollout row shows


@dataclass
class EndpointConfig:
    url: str = "http://localhost:8000/v1"  # any OpenAI-compatible server: vLLM, Ollama, a vendor's
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"  # the environment variable whose value is sent to url as the key, if it is set
    dollars_per_million: list[float] | None = None  # of prompt and completion tokens; None = cost not known
    concurrency: int = 8
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the request


@dataclass
class BaselinesConfig:
    """What `rec-r1 baseline` needs beyond the recipe. `sft` and `dpo` pass through to trl.SFTConfig and DPOConfig."""

    few_shot: int = 3  # examples in the prompt: training queries with a relevant title as the answer
    samples: int = 8  # sft, dpo: completions a training prompt, from the untrained policy
    rollouts: str | None = None  # sft, dpo: take them from a run's rollouts.jsonl instead
    outputs: str | None = None  # sft: train on given answers, JSONL with query and completion, instead
    sft: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass
class Recipe:
    output_dir: str = "runs/run"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: dict[str, Any] | None = None
    task: TaskConfig = field(default_factory=TaskConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    grounding: GroundingConfig = field(default_factory=GroundingConfig)
    rewards: dict[str, Any] = field(default_factory=lambda: {"ndcg@10": 1.0})
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    grpo: dict[str, Any] = field(default_factory=dict)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)


class Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML alone reads 1e-6 as a string."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `Loader` would read as something else: "1e-4", and separators that YAML takes for line ends."""


for _yaml in (Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029") else None
    ),
)

# The trainer's own fields that this toolkit fills in, and where the recipe says them.
_OURS = {
    "output_dir": "output_dir",
    "seed": "seed",
    "model_init_kwargs": "model.dtype and model.attn_implementation",
    "eval_strategy": "evaluation.every_steps",
    "eval_steps": "evaluation.every_steps",
    "reward_weights": "rewards",
    "resume_from_checkpoint": "the option --resume",
}


def recipes_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def find(recipe: str | Path) -> Path:
    """A recipe's file, from a path or from a bare name in the recipes folder. Raises UserError."""
    for candidate in (Path(recipe), recipes_folder() / recipe, recipes_folder() / f"{recipe}.yaml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"recipe {recipe}: no such file: give a path, or one of {', '.join(shipped())}")


def shipped() -> list[str]:
    """The names of the recipes that come with the toolkit, as :func:`find` takes them."""
    folder = recipes_folder()
    return [path.stem for path in sorted(folder.glob("*.yaml"))] + [
        f"cpu/{path.stem}" for path in sorted(folder.glob("cpu/*.yaml"))
    ]


def load(recipe: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe, over the one that its `base:` names, and apply overrides such as `grpo.learning_rate=1e-6`.

    Raises UserError naming file, field and value for a missing file, broken YAML, an unknown key, or a value
    of the wrong type.
    """
    path = find(recipe)
    tree = _read(path)
    if path.name == RUN_FILE and (path.parent / "run.json").is_file():
        _refuse_cut(path, tree)
        tree["output_dir"] = str(path.parent)  # the run may have been moved since
    base = tree.pop("base", None)
    if base is not None:
        tree = _merged(_read(find(path.parent / str(base))), tree)
    for override in overrides:
        _override(tree, override)
    result = _dataclass(Recipe, tree, "", str(path))
    _check_values(result, str(path))
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


def _refuse_cut(path: Path, tree: dict[str, Any]) -> None:
    """Raise UserError for a run's config.yaml whose end is missing: what is cut off would have its default value."""
    whole = path.read_text(encoding="utf-8").rstrip().endswith(END.rstrip())
    missing = [f.name for f in dataclasses.fields(Recipe) if f.name not in tree]
    if not whole and missing:
        raise UserError(
            f"{path}: damaged (it ends before {missing[0]}): restore it from a copy, or write the run's recipe there"
        )


def _merged(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` over ``base``: sections key by key, one level deep; anything deeper is replaced as a whole."""
    merged = dict(base)
    for section, value in tree.items():
        under = merged.get(section)
        merged[section] = {**under, **value} if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load` reads it back."""
    return yaml.dump(dataclasses.asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def cache_folder() -> Path:
    """Where indexes and converted models are kept: $REC_R1_CACHE, else ~/.cache/rec-r1."""
    return Path(os.environ.get("REC_R1_CACHE") or Path.home() / ".cache" / "rec-r1")


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write key=value, such as grpo.learning_rate=1.0e-6")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent!r} is not a section")
    node[leaf] = value


def read_params(cls: type, given: dict[str, Any], section: str) -> Any:
    """``given`` as the dataclass ``cls``, checked like a recipe's own sections. Raises UserError."""
    return _dataclass(cls, given, f"{section}.", "recipe")


def _dataclass(cls: type, tree: Any, prefix: str, file: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{file}: {prefix.rstrip('.')} must be a section with keys, got {tree!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{file}: unknown key {prefix}{key}{_nearest(str(key), hints)}")
        values[key] = _value(hints[key], value, f"{prefix}{key}", file)
    return cls(**values)


def _value(hint: Any, value: Any, name: str, file: str) -> Any:
    """Check ``value`` against a field's type; int passes for float, nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return _dataclass(typing.cast(type, option), value, f"{name}.", file)
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, plain) and not (plain is int and isinstance(value, bool)):
            return value
    wanted = " or ".join("null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{file}: {name} must be {wanted}, got {value!r}")


def _nearest(name: str, choices: typing.Iterable[str]) -> str:
    choices = list(choices)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f": did you mean {nearest[0]!r}?" if nearest else f": choose from {', '.join(choices)}"


def _check_values(recipe: Recipe, file: str) -> None:
    """What can be wrong in a well-typed recipe and needs neither data nor a model to see."""
    import rewards

    for key in recipe.grpo:
        if key in _OURS:
            raise UserError(f"{file}: grpo.{key} is set by {_OURS[key]}: remove it from grpo")
    for metric in recipe.evaluation.metrics:
        if not isinstance(metric, str):
            raise UserError(f"{file}: evaluation.metrics: {metric!r} is no name: write names such as ndcg@10")
    for name, spec in (("rewards", recipe.rewards), ("evaluation.metrics", recipe.evaluation.metrics)):
        try:
            rewards.from_spec(spec if isinstance(spec, dict) else dict.fromkeys(spec, 1.0))
        except ValueError as error:
            raise UserError(f"{file}: {name}: {error}") from error
    actions = ("replace", "expand", "items", "ranking", "edit")
    if recipe.format.action not in actions:
        raise UserError(f"{file}: format.action: {recipe.format.action!r}: choose from {', '.join(actions)}")
    if recipe.format.action == "ranking" and recipe.task.candidates < 2:
        raise UserError(
            f"{file}: task.candidates: {recipe.task.candidates}: a ranking needs at least 2, such as task.candidates=16"
        )
    for name, value, least in (
        ("format.repeat", recipe.format.repeat, 1),
        ("format.max_items", recipe.format.max_items, 1),
        ("format.examples", recipe.format.examples, 0),
        ("format.titles", recipe.format.titles, 1),
        ("format.title_words", recipe.format.title_words or 1, 1),
        ("task.candidates", recipe.task.candidates, 0),
        ("task.train_filter.k", recipe.task.train_filter.k, 1),
        ("baselines.few_shot", recipe.baselines.few_shot, 1),
        ("baselines.samples", recipe.baselines.samples, 2),
        ("evaluation.every_steps", recipe.evaluation.every_steps, 0),
        ("evaluation.batch_size", recipe.evaluation.batch_size, 1),
        ("evaluation.transcript_hits", recipe.evaluation.transcript_hits, 0),
        ("retriever.error_steps", recipe.retriever.error_steps, 1),
        ("retriever.cache.memory_mb", recipe.retriever.cache.memory_mb, 0),
        ("retriever.cache.disk_mb", recipe.retriever.cache.disk_mb, 1),
    ):
        if value < least:
            raise UserError(f"{file}: {name} must be at least {least}, got {value}")
    if not 0 <= recipe.retriever.max_error_rate <= 1:
        raise UserError(
            f"{file}: retriever.max_error_rate must lie in [0, 1], got {recipe.retriever.max_error_rate}: 0.1 is usual"
        )


def check_keys(section: str, given: dict[str, Any], cls: type) -> None:
    """Refuse a key of a pass-through section that ``cls`` does not have, naming the nearest."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{section}.{key}: {cls.__name__} has no such option: did you mean {nearest!r}?")
