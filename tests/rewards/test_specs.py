"""The `rewards:` section of a recipe: every valid form, and every error."""

import pickle
import sys

import numpy as np
import pytest
import yaml

import rewards
from rewards import (
    METRICS,
    REWARDS,
    FormatPenalty,
    LengthPenalty,
    Outcome,
    RankingReward,
    RecR1,
    RepetitionPenalty,
    from_spec,
)

MODULE = """
from dataclasses import dataclass
import numpy as np

def plain(outcome):
    return np.full(len(outcome.completions), 3.0, np.float32)

def stuffed(outcome, alpha=1):
    return plain(outcome)

@dataclass(frozen=True)
class Constant:
    value: float
    sign: int = 1
    @property
    def __name__(self):
        return f"constant_{self.value}"
    def __call__(self, outcome):
        return np.full(len(outcome.completions), self.sign * self.value, np.float32)

class Loose:
    __name__ = "loose"
    def __init__(self, **options):
        self.options = options
    def __call__(self, outcome):
        return np.full(len(outcome.completions), len(self.options), np.float32)

class Anonymous:
    def __call__(self, outcome):
        return plain(outcome)

class Inert:
    __name__ = "inert"

ready = Constant(7.0)
number = 5
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package `house_rewards` with a module `mine` that one test can import."""
    package = tmp_path / "house_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(MODULE)
    (package / "broken.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield "house_rewards.mine"
    for name in [name for name in sys.modules if name.startswith("house_rewards")]:
        del sys.modules[name]


SEEN = Outcome(["x", "y"], [None, None], np.array([[1], [0]], np.int32), np.ones((2, 1), np.float32))


def refused(spec):
    """The error message for ``spec``, which must be one line."""
    with pytest.raises(ValueError) as caught:
        from_spec(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_recipe_section():
    spec = yaml.safe_load(
        """
        ndcg@10: 1.0
        ndcg@100: {weight: 0.5, gain: exponential}
        length: {weight: 0.1, max_words: 12}
        repetition: {}
        format: 0
        rec_r1: -1.0e-3
        """
    )
    total = from_spec(spec)
    assert total.rewards == (
        RankingReward("ndcg", 10),
        RankingReward("ndcg", 100, "exponential"),
        LengthPenalty(12),
        RepetitionPenalty(),
        FormatPenalty(),
        RecR1(1000),
    )
    assert total.weights == (1.0, 0.5, 0.1, 1.0, 0.0, -0.001)
    assert all(type(weight) is float for weight in total.weights)
    assert total.names == ("ndcg@10", "ndcg_exp@100", "length", "repetition", "format", "rec_r1@1000")
    assert pickle.loads(pickle.dumps(total)) == total


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_name_in_recipes(metric):
    assert from_spec({f"{metric}@7": 1}).rewards == (RankingReward(metric, 7),)


def test_rec_r1_takes_a_depth():
    assert from_spec({"rec_r1@100": 1}).rewards == (RecR1(100),)


def test_a_spec_is_not_changed_by_reading_it():
    spec = {"length": {"weight": 0.5, "max_words": 3}}
    from_spec(spec)
    assert spec == {"length": {"weight": 0.5, "max_words": 3}}


@pytest.mark.parametrize("spec", [{}, None, [], "ndcg@10"])
def test_an_empty_spec_is_refused(spec):
    assert refused(spec) == f"rewards must map at least one name to a weight, got {spec!r}: such as ndcg@10: 1.0"


def test_unknown_name():
    message = refused({"ncdg@10": 1})
    assert "unknown reward 'ncdg': did you mean 'ndcg'?" in message
    assert f"Choose from {', '.join(REWARDS)}" in message
    assert "did you mean 'length'?" in refused({"lenght": 1})
    assert "unknown reward 'nonsense': choose from ndcg, " in refused({"nonsense": 1})


@pytest.mark.parametrize("key", [10, None, True])
def test_a_name_that_is_not_a_string(key):
    assert refused({key: 1.0}) == f"reward name {key!r} is not a string: write a name such as ndcg@10"


@pytest.mark.parametrize("key", ["ndcg", "map", "hit"])
def test_a_metric_without_depth(key):
    assert refused({key: 1.0}) == f"reward '{key}' needs a depth k: write '{key}@10'"


@pytest.mark.parametrize("depth", ["0", "ten", "", "-5", "1.5", "10@5", " 10", "1e2", "²"])
@pytest.mark.parametrize("name", ["ndcg", "rec_r1"])
def test_a_bad_depth(name, depth):
    expected = f"reward '{name}@{depth}': k must be an integer >= 1, got {depth!r}: write '{name}@10'"
    assert refused({f"{name}@{depth}": 1.0}) == expected


def test_a_depth_where_none_belongs():
    assert refused({"format@3": 1.0}) == "reward 'format' is not cut at k, got 'format@3': write 'format'"


@pytest.mark.parametrize("key", ["ndcg", "ndcg@5", "rec_r1"])
def test_k_belongs_in_the_name(key):
    message = refused({key: {"k": 20}})
    assert message == f"reward {key!r} has k as a parameter: write it in the name, '{key.split('@')[0]}@20'"


@pytest.mark.parametrize("value", ["1e-3", None, True, [1.0], float("nan"), float("inf")])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"weight": value}])
def test_a_weight_that_is_no_number(value, wrap):
    message = refused({"ndcg@10": wrap(value)})
    assert message == (f"weight of reward 'ndcg@10' must be a finite number, got {value!r}: write it as 0.5 or 1.0e-3")


def test_yaml_reads_1e_3_as_a_string_and_we_say_so():
    assert "got '1e-3': write it as 0.5 or 1.0e-3" in refused(yaml.safe_load("ndcg@10: 1e-3"))


@pytest.mark.parametrize(
    ("key", "param", "expected"),
    [
        ("length", "max_word", "did you mean 'max_words'? Choose from weight, max_words"),
        ("length", "wieght", "did you mean 'weight'? Choose from weight, max_words"),
        ("ndcg@10", "gian", "did you mean 'gain'? Choose from weight, gain"),
        ("recall@10", "gian", ": choose from weight"),  # Only ndcg has a gain.
        ("ndcg@10", "metric", ": choose from weight, gain"),
        ("rec_r1@10", "gain", ": choose from weight"),
        ("format", "k", ": choose from weight"),
    ],
)
def test_unknown_parameter(key, param, expected):
    message = refused({key: {param: 1}})
    assert message.startswith(f"unknown parameter {param!r} of reward {key!r}: ")
    assert message.endswith(expected)


def test_a_refused_value_names_the_reward():
    assert refused({"length": {"max_words": "12"}}).startswith("reward 'length': max_words must be an integer")
    assert refused({"recall@10": {"gain": "exponential"}}).startswith("reward 'recall@10': recall has no gain")
    assert "unknown gain 'exp': choose from linear, exp" in refused({"ndcg@10": {"gain": "exp"}})


def test_two_keys_of_one_name_are_refused():
    assert "'ndcg@10' is used twice" in refused({"ndcg@10": 1, "ndcg@010": 1})


# ---------------------------------------------------------------- dotted paths


def test_dotted_paths(plugin):
    spec = {
        f"{plugin}.plain": 0.5,
        f"{plugin}.Constant": {"weight": 2.0, "value": 1.5, "sign": -1},
        f"{plugin}.Loose": {"anything": 1, "at_all": 2},
        f"{plugin}.ready": 1.0,
        "format": 1.0,
    }
    total = from_spec(spec)
    assert total.weights == (0.5, 2.0, 1.0, 1.0, 1.0)
    components = total.components(SEEN)
    assert {name: values.tolist() for name, values in components.items()} == {
        "plain": [3, 3],
        "constant_1.5": [-1.5, -1.5],
        "loose": [2, 2],
        "constant_7.0": [7, 7],
        "format": [-1, -1],
    }


def test_a_function_is_taken_as_it_is(plugin):
    reward = from_spec({f"{plugin}.plain": {"weight": 1.0}}).rewards[0]
    assert reward is sys.modules[plugin].plain


@pytest.mark.parametrize(
    ("attribute", "params", "expected"),
    [
        (
            "stuffed",
            {"alpha": 2},
            "is not a class, so it takes no parameters, got alpha: make it a frozen dataclass",
        ),
        ("ready", {"value": 2}, "is not a class, so it takes no parameters, got value"),
        ("Constnat", {}, "has no 'Constnat': did you mean 'Constant'?"),
        ("Constant", {}, "missing 1 required positional argument: 'value'"),
        ("Constant", {"vlaue": 1}, "did you mean 'value'? Choose from weight, value, sign"),
        ("Loose", {3: 1}, "keywords must be strings"),
        ("number", {}, "is a int, which cannot be called: give it __call__"),
        ("Inert", {}, "is a Inert, which cannot be called: give it __call__"),
        ("Anonymous", {}, "has no name: give its class a __name__ property"),
        ("plain@10", {}, "a dotted path takes no @k: give k as a parameter of its class"),
    ],
)
def test_bad_dotted_paths(plugin, attribute, params, expected):
    message = refused({f"{plugin}.{attribute}": params})
    assert expected in message
    assert plugin in message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("house_rewards.absent.plain", "cannot import 'house_rewards.absent' (No module named"),
        ("house_rewards.broken.x", "cannot import 'house_rewards.broken' (No module named 'a_package_that"),
        ("no_such_package_at_all.x", "cannot import 'no_such_package_at_all' (No module named"),
        (".x", "cannot import '' ("),
        ("..x", "cannot import '.' ("),
    ],
)
def test_paths_that_cannot_be_imported(plugin, path, expected):
    message = refused({path: 1.0})
    assert message.startswith(f"reward {path!r}: {expected}")
    fix = "install a_package_that_is_not_there, which it needs" if "broken" in path else "installed or on PYTHONPATH"
    assert message.endswith(fix)


def test_public_names():
    assert sorted(rewards.__all__) == sorted(set(rewards.__all__))
    assert all(hasattr(rewards, name) for name in rewards.__all__)
