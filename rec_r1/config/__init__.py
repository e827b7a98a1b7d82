"""A recipe: YAML + `key=value` overrides -> dataclasses. An unknown key is an error that names the nearest.

What TRL and PEFT call options is not declared again here: `grpo` and `lora` pass through to
`trl.GRPOConfig` and `peft.LoraConfig`, and their keys are checked against those classes.
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

from rec_r1.config import typed, values
from rec_r1.config.overrides import apply, blamed
from rec_r1.config.redaction import redact, secret_urls, settled, shown, without_marks
from rec_r1.config.yaml_text import Dumper, parse
from retrievers.types import ToolkitError

RUN_FILE = "config.yaml"  # a run's recipe, in its folder
END = "...\n"  # YAML for the end of a document: without it a run's recipe was cut short


class UserError(ToolkitError):
    """A mistake the user can fix. One line: file, field, value, fix (several: see :func:`refuse`). Commands print it
    and exit with code 2."""


@dataclass
class ModelConfig:
    name: str = "smollm2-135m"  # hub id, local folder, or a name in models.BUNDLED
    dtype: str = "auto"  # auto = bfloat16 where the processor computes it fast, else float32
    attn_implementation: str | None = None  # None = what transformers picks for the model: sdpa where it has it
    trust_remote_code: bool = False  # True: run the Python code that the model's folder brings (auto_map)


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
    keep_query: bool = False  # replace, expand: an empty answer sends the query as it is; False: it is malformed
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
    exclude_history: bool | None = None  # whether the history's own items are left out; None = as the task says
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
    test_limit: int | None = None  # know only the first N test queries: for trying a recipe out, not for results
    batch_size: int = 64
    transcript_hits: int = 3  # hits a rollout row shows


@dataclass
class SpeedConfig:
    """What a training leaves out because nothing reads it, or because it teaches nothing."""

    end_at_answer: bool = True  # a completion ends where its answer does, not at grpo.max_completion_length
    share_prompts: bool = True  # the completions of a prompt share its key-value cache (transformers; vLLM always does)
    live_rows: bool = True  # completions of advantage 0 stay out of a loss that has no term for them (KL, entropy)
    # From the second epoch on: how likely a prompt whose completions all earned the same is asked again. After n such
    # times in a row it is explore^n, at least 0.1; prompts that teach are asked twice instead. 1 = all equally often.
    explore: float = 0.5


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
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    grpo: dict[str, Any] = field(default_factory=dict)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)


_NEXT = "\nrec-r1: "  # between two problems in one message, which is printed with this at its head


def recipes_folder() -> Path:
    """Where the recipes lie: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


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

    A secret that was redacted when the recipe was written counts as not set. Raises UserError naming file or override,
    field and value for a missing or empty file, broken YAML, an unknown key, a value of the wrong type, or a URL that
    holds a password.
    """
    path = find(recipe)
    tree = _read(path)
    if path.name == RUN_FILE and (path.parent / "run.json").is_file():
        _refuse_cut(path, tree)
        tree["output_dir"] = str(path.parent)  # the run may have been moved since
    base = tree.pop("base", None)
    if base is not None:
        tree = _merged(_read(find(path.parent / str(base))), tree)
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
    """No setting of a recipe, of TRL, PEFT, a task, a retriever or a reward means anything as NaN or infinity."""
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
    """The resolved recipe as YAML, without its secrets; `load` reads it back."""
    return yaml.dump(redact(dataclasses.asdict(recipe)), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values without secrets, which a written recipe does not have either."""
    plain: dict[str, Any] = settled(dataclasses.asdict(recipe))
    return plain


def cache_folder() -> Path:
    """Where indexes and converted models are kept: $REC_R1_CACHE, else ~/.cache/rec-r1."""
    return Path(os.environ.get("REC_R1_CACHE") or Path.home() / ".cache" / "rec-r1")


def read_params(cls: type, given: dict[str, Any], section: str) -> Any:
    """``given`` as the dataclass ``cls``, checked like a recipe's own sections. Raises UserError."""
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
    """Check ``value`` against a field's type; int passes for float, nothing else is converted."""
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
    """Raise one UserError that says all ``problems``, one a line; nothing where there are none."""
    lines = list(problems)
    if lines:
        raise UserError(_NEXT.join(lines))


def problems_of(message: str) -> list[str]:
    """What :func:`refuse` made ``message`` of; any other message alone."""
    return message.split(_NEXT)


def unknown_key(name: str, key: str, owner: str, known: typing.Iterable[str]) -> str:
    """The message for a key of a pass-through section that its class ``owner`` does not have."""
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)[0]
    return f"{name}: {owner} has no such option: did you mean {nearest!r}?"
