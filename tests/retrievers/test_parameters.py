"""Parameters of every backend: a number outside its limits is refused in words that say what to do."""

import dataclasses
import math

import pytest

from retrievers.core.parameters import check_integer, check_number
from retrievers.registry import BACKENDS, backend_module

BAD = {"a text": "x", "a boolean": True, "not a number": math.nan, "infinite": math.inf, "far too small": -(10**9)}


def numbers():
    """Every parameter of every backend whose default is a number."""
    for kind in BACKENDS:
        parameters = backend_module(kind).params
        for one in dataclasses.fields(parameters) if parameters is not None else ():
            if type(one.default) in (int, float):
                yield kind, one.name


@pytest.mark.parametrize(("kind", "name"), numbers())
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_number_of_any_backend_is_refused_with_what_to_do(kind, name, value):
    needed = {"url": "postgresql://localhost/shop"} if kind == "postgres" else {}
    with pytest.raises(ValueError, match=rf"^retriever\.params\.{name}.*, got .*: .*\w") as caught:
        backend_module(kind).params(**needed, **{name: value})
    assert str(caught.value).endswith("is usual")


@pytest.mark.parametrize(("limits", "inside", "outside", "allowed"), [
    ({}, [0, 1e9], [-1e-9], "a number >= 0"),
    ({"above": True}, [1e-9], [0], "a number above 0"),
    ({"most": 1}, [0, 1], [-0.1, 1.1], "a number from 0 to 1"),
    ({"below": 1}, [0, 0.9], [-0.1, 1], "a number from 0 to below 1"),
    ({"above": True, "most": 1}, [0.1, 1], [0, 1.1], "a number above 0 and at most 1"),
    ({"above": True, "below": 2_000_000}, [0.1, 1_999_999], [0, 2_000_000], "a number above 0 and below 2,000,000"),
])  # fmt: skip
def test_the_limits_of_numbers(limits, inside, outside, allowed):
    assert [check_number("x", value, 0.5, **limits) for value in inside] == inside
    for value in outside:
        with pytest.raises(ValueError) as caught:
            check_number("x", value, 0.5, **limits)
        assert str(caught.value) == f"retriever.params.x must be {allowed}, got {value!r}: 0.5 is usual"


@pytest.mark.parametrize(("limits", "inside", "outside", "allowed"), [
    ({}, [1, 10**30], [0], "an integer >= 1"),
    ({"least": 0, "most": 63}, [0, 63], [-1, 64], "an integer from 0 to 63"),
    ({"optional": True}, [None, 1], [0], "null or an integer >= 1"),
])  # fmt: skip
def test_the_limits_of_integers(limits, inside, outside, allowed):
    for value in inside:
        check_integer("x", value, None, **limits)
    for value in [*outside, 1.0, True, "1"]:
        with pytest.raises(ValueError) as caught:
            check_integer("x", value, None, **limits)
        assert str(caught.value) == f"retriever.params.x must be {allowed}, got {value!r}: null is usual"


def test_a_huge_value_is_cut_in_the_message():
    with pytest.raises(ValueError) as caught:
        check_number("x", 10**5000, 1)
    assert len(str(caught.value)) < 300
