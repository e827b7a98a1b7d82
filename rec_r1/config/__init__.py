"""Read a recipe, a YAML file with `key=value` overrides, into dataclasses.

An unknown key is an error that names the nearest known one. The options of TRL and PEFT are not declared again here:
the sections `grpo` and `lora` pass through to `trl.GRPOConfig` and `peft.LoraConfig`, and their keys are checked
against these classes.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from rec_r1.config import engine_queries, schema, typed, values
from rec_r1.config.overrides import apply, blamed
from rec_r1.config.redaction import redact, secret_urls, settled, shown, without_marks
from rec_r1.config.sections import (
    BaselinesConfig,
    CacheConfig,
    EndpointConfig,
    EvaluationConfig,
    FormatConfig,
    GroundingConfig,
    ModelConfig,
    Recipe,
    RetrieverConfig,
    SpeedConfig,
    TaskConfig,
    TrainFilter,
)
from rec_r1.config.yaml_text import Dumper, parse
from retrievers.core.choices import similar
from retrievers.core.index_folder import naming
from retrievers.types import ToolkitError

__all__ = [
    "DOCUMENT_END",
    "RUN_FILE",
    "BaselinesConfig",
    "CacheConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "FormatConfig",
    "GroundingConfig",
    "ModelConfig",
    "Recipe",
    "RetrieverConfig",
    "SpeedConfig",
    "TaskConfig",
    "TrainFilter",
    "UserError",
    "cache_folder",
    "comparable",
    "copy_shipped",
    "dump",
    "find",
    "load",
    "problems_of",
    "read_params",
    "recipes_folder",
    "refuse",
    "shipped",
    "unknown_key",
]

RUN_FILE = "config.yaml"  # The file in a run's folder that holds the run's recipe.
DOCUMENT_END = "...\n"  # YAML's mark for the end of a document. A run's recipe without it is incomplete.


class UserError(ToolkitError):
    """A mistake that the user can fix.

    The message is one line that names the file, the field, its value and the fix. :func:`refuse` puts several mistakes
    into one message. Commands print the message and exit with code 2.
    """


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
    if str(recipe) and (Path(recipe) / RUN_FILE).is_file():
        raise UserError(
            f"recipe {str(recipe)!r}: is the folder of a run: give {Path(recipe) / RUN_FILE}, the recipe of the run "
            "(rec-r1 serve takes the folder with --policy)"
        )
    why = "is a folder" if str(recipe) and Path(recipe).is_dir() else "no such file"
    raise UserError(f"recipe {str(recipe)!r}: {why}: give the path of a file, or one of {', '.join(shipped())}")


def shipped() -> list[str]:
    """The names of the recipes that come with the toolkit, in the form that :func:`find` takes."""
    folder = recipes_folder()
    return [path.stem for path in sorted(folder.glob("*.yaml"))] + [
        f"cpu/{path.stem}" for path in sorted(folder.glob("cpu/*.yaml"))
    ]


def copy_shipped(name: str, file: Path | None = None) -> Path:
    """Copy a recipe that comes with the toolkit into a file that the user can change.

    name: a name of :func:`shipped`.
    file: the new file. None = a file of the recipe's name in the working folder.

    Returns the new file. A recipe that it names as its `base` stays where it is: :func:`load` finds it by name.

    Raises UserError for an unknown name, and for a file that exists or cannot be written.
    """
    if name not in shipped():
        raise UserError(f"--copy {name}: not a shipped recipe{_nearest(name, shipped())}")
    file = file or Path(f"{name.rpartition('/')[2]}.yaml")
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: a recipe's file ends in .yaml: name it {file.with_suffix('.yaml')}")
    try:
        new = file.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise UserError(f"{file}: it exists and is not overwritten: name another file after {name}") from error
    try:
        with naming(file), new:
            new.write(find(name).read_text(encoding="utf-8"))
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def load(recipe: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe, merge it into the recipe that its `base:` names, and apply the overrides.

    A base is looked for beside the recipe, then among the recipes that come with the toolkit.

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
        tree = _merged(_base(path, base), tree)
    changed = copy.deepcopy(tree)
    wrong = []
    for override in overrides:
        try:
            apply(changed, override)
        except ValueError as error:
            wrong.append(str(error))
    refuse(wrong)
    try:
        return _checked(changed, str(path))
    except UserError as error:
        if overrides and _is_sound(tree, str(path)):
            refuse(blamed(overrides, problem.removeprefix(f"{path}: ")) for problem in problems_of(str(error)))
        raise


def _base(path: Path, name: Any) -> dict[str, Any]:
    """The recipe that the one in ``path`` names as its base. Raises UserError where it is missing or has a base."""
    beside = path.parent / str(name)
    try:
        file = beside if beside.is_file() else find(str(name))
    except UserError as error:
        raise UserError(f"{path}: base: {str(error).removeprefix('recipe ')}") from error
    tree = _read(file)
    if "base" in tree:
        raise UserError(f"{path}: base: {name}: it has a base itself: write the keys of both into one file")
    return tree


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
            "environment: $HF_TOKEN, $REC_R1_TOKEN, $MILVUS_TOKEN, $REC_R1_OPENSEARCH_PASSWORD, $PGPASSWORD, or the "
            "variable of baselines.endpoint.key_variable"
        )
    _refuse_not_finite(tree, file)
    refuse(f"{file}: {problem}" for problem in engine_queries.problems(tree))
    result: Recipe = _read_section(Recipe, tree, "", file)
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
        tree = copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}: save it as UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if tree is None or tree == {}:
        raise UserError(f"{path}: the file is empty: a recipe has at least one section, such as task: {{name: emoji}}")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(tree).__name__}")
    return tree


@functools.lru_cache(maxsize=32)
def _parsed(text: str) -> Any:
    """The value of a recipe's text, for callers that do not change it.

    PyYAML takes longer for a recipe than all checks of its values, and a command reads the same one several times.
    """
    return parse(text)


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
    return _read_section(cls, given, f"{section}.", "recipe")


def _read_section(cls: type, tree: Any, prefix: str, file: str) -> Any:
    """``tree`` as an object of ``cls``, a dataclass. Raises UserError with all unknown keys and wrong types."""
    found: list[str] = []
    result = _dataclass(cls, tree, prefix, found)
    refuse(f"{file}: {problem}" for problem in found)
    return result


def _dataclass(cls: type, tree: Any, prefix: str, found: list[str]) -> Any:
    """``tree`` as an object of ``cls``; its problems are added to ``found``, and the result is None then."""
    if not isinstance(tree, dict):
        found.append(f"{prefix.rstrip('.')} must be a section with keys, got {shown(prefix[:-1], tree)}")
        return None
    hints = typed.hints(cls)
    values = {}
    known = len(found)
    for key, value in tree.items():
        if key in hints:
            values[key] = _value(hints[key], value, f"{prefix}{key}", found)
        else:
            found.append(f"unknown key {prefix}{key}{_nearest(str(key), hints)}")
    return cls(**values) if len(found) == known else None


def _value(hint: Any, value: Any, name: str, found: list[str]) -> Any:
    """``value``, checked against a field's type. An int becomes a float where a float is needed."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option):
            return _dataclass(typing.cast(type, option), value, f"{name}.", found)
    wrong = typed.mismatch(hint, value, name)
    if wrong:
        found.append(f"{name} {wrong}")
        return None
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
    near = similar(key, known)
    return f"{name}: {owner} has no such option: " + ("leave it out" if near is None else f"did you mean {near!r}?")
