"""What `rec-r1 options` prints: the keys of a recipe, and the parameters of tasks, retrievers and rewards."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import rewards
from rec_r1 import tasks, trl_options
from rec_r1.config import Recipe, TaskConfig, UserError, described, passthrough, typed, values
from rec_r1.config.described import Key
from retrievers import BACKENDS, registry
from retrievers.core.choices import similar
from rewards import specs

WIDEST_NAME, WIDEST_KIND = 44, 30  # Longer names and types are not aligned, or are cut.
# The sections that pass through to a class of a library: name -> module and class.
CLASSES = {
    "grpo": ("trl", "GRPOConfig"),
    "lora": ("peft", "LoraConfig"),
    "warm_start.sft": ("trl", "SFTConfig"),
    "baselines.sft": ("trl", "SFTConfig"),
    "baselines.reward_weighted_sft": ("trl", "SFTConfig"),
    "baselines.dpo": ("trl", "DPOConfig"),
    "baselines.rloo": ("trl", "GRPOConfig"),
}


@dataclass(frozen=True)
class Section:
    """What is printed about a section: its title, its keys, and further lines."""

    title: str
    keys: list[Key] = field(default_factory=list)
    more: list[str] = field(default_factory=list)


def sections(name: str | None) -> list[Section]:
    """What `rec-r1 options NAME` prints.

    name: a section or a key of a recipe, such as format; a task, retriever or reward, such as task.sequential,
        retriever.bm25 or rewards.ndcg; or None for all keys of a recipe.

    Raises UserError for an unknown name, with the nearest known one.
    """
    if name is None:
        first = [key for key in described.keys(Recipe) if "." not in key.name]
        return [Section("A recipe has these keys and sections.", first), *map(_of_recipe, _section_classes())]
    if name in CLASSES:
        return [_passed_on(name, *CLASSES[name])]
    if name == "rewards":
        return [_all_rewards()]
    owned = [key for key in described.keys(Recipe) if key.name == name or key.name.startswith(f"{name}.")]
    if owned:
        return [_of_recipe(name) if name in _section_classes() else Section(f"{name}:", owned)]
    kind, _, one = name.partition(".")
    if one and kind == "retriever":
        return _retriever(one)
    if one and kind == "task":
        return [_task(one)]
    if kind == "rewards" and one.partition("@")[0] in rewards.REWARDS:
        return [_reward(one.partition("@")[0])]
    near = _nearest(name)
    fix = "`rec-r1 options` lists all" if near is None else f"did you mean {near!r}?"
    raise UserError(f"options: no section {name!r}: {fix}")


def lines(found: list[Section], markdown: bool = False) -> Iterator[str]:
    """The lines of sections: one line for each key, in columns or as a table in Markdown."""
    for number, section in enumerate(found):
        yield from ["", section.title] if number else [section.title]
        if markdown and section.keys:
            yield from ["", "| key | default | what it sets |", "|---|---|---|", *described.table(section.keys)]
        else:
            yield from _columns(section.keys)
        yield from section.more


def _columns(found: list[Key]) -> Iterator[str]:
    shown = []
    for key in found:
        kind = key.kind if len(key.kind) <= WIDEST_KIND else f"{key.kind[: WIDEST_KIND - 1]}…"
        shown.append((key.name, f"{kind} = {key.default}" if key.default else kind, key.text.replace("**", "")))
    name_width = max((len(name) for name, _, _ in shown if len(name) <= WIDEST_NAME), default=0)
    kind_width = max((len(kind) for _, kind, _ in shown if len(kind) <= WIDEST_KIND), default=0)
    for name, kind, text in shown:
        yield f"  {name:<{name_width}}  {kind:<{kind_width}}  {text}".rstrip()


def _section_classes() -> dict[str, type]:
    """The sections of a recipe that have keys of their own, by name."""
    hints = typing.get_type_hints(Recipe)
    return {name: typing.cast(type, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _of_recipe(name: str) -> Section:
    """A section of a recipe, with a pointer to the parameters of what it names."""
    cls = _section_classes()[name]
    more = {
        "task": f"tasks: {', '.join(tasks.TASKS)}; rec-r1 options task.NAME lists the parameters of one",
        "retriever": f"retrievers: {', '.join(BACKENDS)}; rec-r1 options retriever.KIND lists the parameters of one",
    }
    closing = [f"  {more[name]}"] if name in more else []
    return Section(f"{name}: {_first_line(cls)}", described.keys(cls, f"{name}."), closing)


def _retriever(kind: str) -> list[Section]:
    """The parameters of a retriever, and the keys of each parameter that is a mapping with keys of its own."""
    try:
        backend = registry.backend_module(kind)
        hints = registry.parameters(kind)
    except ValueError as error:
        raise UserError(str(error)) from error
    prefix = "retriever.params."
    if backend.params is not None:
        found = described.keys(backend.params, prefix)
    else:
        found = _of_signature(backend.build, hints, prefix)
    first = Section(f"retriever.kind={kind}: {_module_line(backend.build)}", found, _none_at_all(found))
    nested = [
        Section(f"{prefix}{name}: {_first_line(cls)}", described.keys(cls, f"{prefix}{name}."))
        for name, hint in hints.items()
        for cls in typing.get_args(hint)
        if dataclasses.is_dataclass(cls) and isinstance(cls, type)
    ]
    return [first, *nested]


def _task(name: str) -> Section:
    module = tasks.find(TaskConfig(name=name))
    params = getattr(module, "Params", None)  # A task of the user's own need not have any.
    found = described.keys(params, "task.params.") if isinstance(params, type) else []
    reads = [f"  task.{setting} is read, too: rec-r1 options task" for setting in getattr(module, "READS", ())]
    return Section(f"task.name={name}: {_first_line(module)}", found, _none_at_all(found) + reads)


def _none_at_all(found: list[Key]) -> list[str]:
    return [] if found else ["  It has no parameters."]


def _all_rewards() -> Section:
    width = max(map(len, rewards.REWARDS)) + 2
    listed = [f"  {_written(name):<{width}}  {_reward_line(name)}" for name in rewards.REWARDS]
    closing = ["  rec-r1 options rewards.NAME lists the parameters of one; rewards/README.md shows how to write yours"]
    return Section("rewards: Rewards and their weights, such as {ndcg@10: 1.0}.", [], listed + closing)


def _reward(name: str) -> Section:
    factory = rewards.REWARDS[name]
    cls = factory if inspect.isclass(factory) else typing.get_type_hints(factory)["return"]
    own = specs.parameters(name)
    weight = Key("weight", "float", "1.0", "The weight of the reward in the sum.")
    example = f"rewards: {{{_written(name).replace('@k', '@10')}: {{weight: 0.5}}}}"
    found = [weight, *(key for key in described.keys(cls) if key.name in own)]
    return Section(f"rewards.{_written(name)}: {_reward_line(name)}", found, [f"  example: {example}"])


def _written(name: str) -> str:
    return f"{name}@k" if specs.needs_depth(name) else name


def _reward_line(name: str) -> str:
    return _first_line(rewards.METRICS.get(name, rewards.REWARDS[name]))


def _passed_on(section: str, module: str, name: str) -> Section:
    """The options of a library's class: type, default, and the first sentence of the help that the class has."""
    cls = getattr(importlib.import_module(module), name)
    ours = {**trl_options.DEFAULTS} if section == "grpo" else {}
    elsewhere: Mapping[str, str] = {
        **passthrough.SET_ELSEWHERE.get(section.rpartition(".")[2], {}),
        **(values.SET_ELSEWHERE if name == "GRPOConfig" else {}),
    }
    hints = typing.get_type_hints(cls)
    found = []
    for one in dataclasses.fields(cls):
        if one.init and one.name not in elsewhere:
            default = ours.get(one.name, described.default(one))
            text = _first_sentence(str(one.metadata.get("help", "")))
            kind = typed.described(typed.writable(hints[one.name]))
            found.append(Key(f"{section}.{one.name}", kind, described.as_yaml(default), text))
    more = [f"  not here, because the toolkit sets them: {', '.join(key for key in elsewhere if key in hints)}"]
    if section == "grpo":
        gpu = ", ".join(f"{key}={described.as_yaml(value)}" for key, value in trl_options.DEFAULTS_WITHOUT_GPU.items())
        more.append(f"  our own defaults: {', '.join(trl_options.DEFAULTS)}, and on a machine without a GPU {gpu}")
    return Section(f"{section}: Options of {module}.{name} and their defaults there.", found, more)


def _of_signature(build: Any, hints: Mapping[str, Any], prefix: str) -> list[Key]:
    """The parameters of a function that declares no dataclass for them."""
    given = inspect.signature(build).parameters
    found = []
    for name, hint in hints.items():
        default = given[name].default
        shown = "" if default is inspect.Parameter.empty else described.as_yaml(default)
        found.append(Key(prefix + name, typed.described(hint), shown, ""))
    return found


def _first_line(documented: Any) -> str:
    """The first sentence of the docstring of a module, class or function."""
    return _first_sentence(inspect.getdoc(documented) or "")


def _module_line(function: Any) -> str:
    return _first_line(inspect.getmodule(function))


def _first_sentence(text: str) -> str:
    text = " ".join(text.partition("\n\n")[0].split())
    found = re.match(r"(.+?(?<!et al)[.!?])(\s|$)", text)
    return found.group(1) if found else text


def key_names() -> list[str]:
    """The names of all keys of a recipe, in its order."""
    return [key.name for key in described.keys(Recipe)]


def names() -> list[str]:
    """What :func:`sections` takes beside single keys: sections, tasks, retrievers and rewards."""
    kinds = [
        *(f"task.{one}" for one in tasks.TASKS),
        *(f"retriever.{one}" for one in BACKENDS),
        *(f"rewards.{one}" for one in rewards.REWARDS),
    ]
    return [*_section_classes(), *CLASSES, "rewards", *kinds]


def _nearest(name: str) -> str | None:
    """The known name that is nearest to ``name``; first, one that ends with it: bm25 -> retriever.bm25. None = none is
    similar."""
    known = [*names(), *key_names()]
    ends = [one for one in known if one.endswith(f".{name}")]
    return ends[0] if ends else similar(name, known)
