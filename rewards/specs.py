"""Builds the WeightedSum that a recipe's `rewards:` section describes."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rewards.lift import Lift, harm
from rewards.ranking import RankingReward, check_k
from rewards.shaping import FormatPenalty, LengthPenalty, RecR1, RepetitionPenalty, StuffingPenalty, WeightedSum
from rewards.types import Reward

REWARDS: dict[str, Callable[..., Reward]] = {
    "ndcg": RankingReward,
    "recall": RankingReward,
    "capped_recall": RankingReward,
    "precision": RankingReward,
    "mrr": RankingReward,
    "map": RankingReward,
    "hit": RankingReward,
    "lift": Lift,
    "harm": harm,
    "rec_r1": RecR1,
    "format": FormatPenalty,
    "length": LengthPenalty,
    "repetition": RepetitionPenalty,
    "stuffing": StuffingPenalty,
}


def from_spec(spec: Mapping[str, float | Mapping[str, Any]]) -> WeightedSum:
    """The weighted sum that a recipe's `rewards:` section describes.

    spec: a mapping, reward -> weight or parameters. In YAML::

        ndcg@10: 1.0                                            # a bare number is the weight
        ndcg@100: {weight: 0.5, gain: exponential}              # weight (default 1.0) and parameters
        length: {weight: 0.1, max_words: 12}
        my_package.my_module.MyReward: {weight: 1.0, alpha: 2}  # any class or function that can be imported

    A key is a name in REWARDS or a dotted path. A name is followed by @k where the reward has a k: the ranking metrics,
    lift and harm need it, and rec_r1 has 1000 by default. A class at a dotted path is called with the parameters; a
    function at a dotted path is the reward itself and takes no parameters.

        reward = rewards.from_spec({"ndcg@10": 1.0, "length": {"weight": 0.1, "max_words": 12}})
        reward.names     # ("ndcg@10", "length")
        reward(outcome)  # (B,) float32

    Raises ValueError for anything else: one line with the value and the fix.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise ValueError(f"rewards must map at least one name to a weight, got {spec!r}: such as ndcg@10: 1.0")
    parsed = [_parse(key, value) for key, value in spec.items()]
    return WeightedSum(tuple(reward for reward, _ in parsed), tuple(weight for _, weight in parsed))


def _parse(key: str, value: float | Mapping[str, Any]) -> tuple[Reward, float]:
    if not isinstance(key, str):
        raise ValueError(f"reward name {key!r} is not a string: write a name such as ndcg@10")
    params = dict(value) if isinstance(value, Mapping) else {"weight": value}
    weight = params.pop("weight", 1.0)
    # PyYAML reads 1e-3 as a string, and a Python bool is an int. Both are refused as weights.
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"weight of reward {key!r} must be a finite number, got {weight!r}: write it as 0.5 or 1.0e-3")
    dotted = "." in key.partition("@")[0]  # ndcg@1.5 is a bad k, not a path
    reward = _imported(key, params) if dotted else _built_in(key, params)
    return reward, float(weight)


def _built_in(key: str, params: dict[str, Any]) -> Reward:
    name, at, depth = key.partition("@")
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}: {_choose(name, REWARDS)}, or give the dotted path of your own")
    factory = REWARDS[name]
    cut = "k" in inspect.signature(factory).parameters
    if at and not cut:
        raise ValueError(f"reward {name!r} is not cut at k, got {key!r}: write {name!r}")
    if "k" in params and cut:
        raise ValueError(f"reward {key!r} has k as a parameter: write it in the name, '{name}@{params['k']}'")
    if needs_depth(name) and not at:
        raise ValueError(f"reward {name!r} needs a depth k: write '{name}@10'")
    # RankingReward says itself which metric has a gain.
    others = {name: value for name, value in params.items() if factory is not RankingReward or name != "gain"}
    _check_params(key, factory, others, hidden=_hidden(name))
    named = {"metric": name} if factory is RankingReward else {}
    return _made(key, factory, params | named | ({"k": _depth(key, name, depth)} if at else {}))


def needs_depth(name: str) -> bool:
    """Whether the reward of this name, a key of REWARDS, is always written with its depth: ndcg@10."""
    return REWARDS[name] in (RankingReward, Lift, harm)


def parameters(name: str) -> list[str]:
    """The parameters that a recipe may set of the reward of this name, a key of REWARDS, beside `weight`."""
    factory = REWARDS[name]
    return [parameter for parameter in inspect.signature(factory).parameters if parameter not in _hidden(name)]


def _hidden(name: str) -> tuple[str, ...]:
    """The parameters of a reward that its key sets, or that only another metric reads."""
    if REWARDS[name] is not RankingReward:
        return ("k", "losses_only")
    return ("metric", "k") if name == "ndcg" else ("metric", "k", "gain")


def _depth(key: str, name: str, depth: str) -> int:
    k = int(depth) if depth.isdecimal() else depth
    try:
        check_k(k)
    except ValueError as error:
        raise ValueError(f"reward {key!r}: k must be an integer >= 1, got {depth!r}: write '{name}@10'") from error
    return int(k)


def _imported(path: str, params: dict[str, Any]) -> Reward:
    if "@" in path:
        raise ValueError(f"reward {path!r}: a dotted path takes no @k: give k as a parameter of its class")
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything, and importlib raises for ".x" and "..x"
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        fix = "check the path, and that its package is installed or on PYTHONPATH"
        if missing and not f"{module_name}.".startswith(f"{missing}."):
            fix = f"install {missing.partition('.')[0]}, which it needs"
        raise ValueError(f"reward {path!r}: cannot import {module_name!r} ({_one_line(error)}): {fix}") from error
    if not hasattr(module, attribute):
        near = _similar(attribute, [name for name in vars(module) if not name.startswith("_")])
        fix = "correct its name" if near is None else f"did you mean {near!r}?"
        raise ValueError(f"reward {path!r}: {module_name!r} has no {attribute!r}: {fix}")
    target: Any = getattr(module, attribute)
    if inspect.isclass(target):
        _check_params(path, target, params)
        factory: Callable[..., Any] = target
        target = _made(path, factory, params)
    elif params:
        raise ValueError(
            f"reward {path!r} is not a class, so it takes no parameters, got {', '.join(map(str, params))}: "
            "make it a frozen dataclass with these fields, __call__ and __name__"
        )
    if not callable(target):
        raise ValueError(f"reward {path!r} is a {type(target).__name__}, which cannot be called: give it __call__")
    return target


def _check_params(key: str, factory: Callable[..., Any], params: Mapping[str, Any], hidden: Iterable[str] = ()) -> None:
    """Raises ValueError for a parameter that ``factory`` does not take.

    hidden: parameters of ``factory`` that the key sets, so that the mapping may not.
    """
    signature = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        return
    choices = ["weight", *(name for name in signature if name not in hidden)]
    for param in params:
        if param not in choices:
            raise ValueError(f"unknown parameter {param!r} of reward {key!r}: {_choose(param, choices)}")


def _made(key: str, factory: Callable[..., Reward], params: Mapping[str, Any]) -> Reward:
    try:
        return factory(**params)
    except Exception as error:  # a user's class may raise anything
        raise ValueError(f"reward {key!r}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _choose(name: object, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name. It suggests a choice only where one is similar."""
    choices = list(choices)
    near = _similar(name, choices)
    return f"{'choose' if near is None else f'did you mean {near!r}? Choose'} from {', '.join(choices)}"


def _similar(name: object, choices: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.65)), None)
