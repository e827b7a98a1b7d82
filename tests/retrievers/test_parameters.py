"""Parameters of every backend: a number outside its limits is refused in words that say what to do."""

import dataclasses
import math
import typing

import pytest

from retrievers.core.parameters import Checks, check_address, check_integer, check_number
from retrievers.registry import BACKENDS, backend_module, check_parameters

NEEDED = {"postgres": {"url": "postgresql://localhost/shop"}}


def numbers(kind):
    """Every parameter of a backend whose default is a number."""
    parameters = backend_module(kind).params
    for one in dataclasses.fields(parameters) if parameters is not None else ():
        if type(one.default) in (int, float):
            yield one.name


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_bad_number_is_refused_with_what_to_do(kind):
    for name in numbers(kind):
        for value in ("x", True, math.nan, math.inf, -(10**9)):
            with pytest.raises(ValueError, match=rf"^retriever\.params\.{name} must .*, got .*: .*\w") as caught:
                backend_module(kind).params(**NEEDED.get(kind, {}), **{name: value})
            assert str(caught.value).endswith("is usual")


@pytest.mark.parametrize("kind", BACKENDS)
def test_an_integer_that_no_library_takes_is_refused(kind):
    parameters = backend_module(kind).params
    hints = typing.get_type_hints(parameters) if parameters is not None else {}
    for name in (name for name, hint in hints.items() if hint in (int, int | None)):
        allowed = rf"retriever\.params\.{name} must be .*an integer from \d+ to \d+, got 9+\b"
        with pytest.raises(ValueError, match=allowed):
            check_parameters(kind, NEEDED.get(kind, {}) | {name: 10**40 - 1})


@pytest.mark.parametrize("kind", BACKENDS)
def test_all_bad_numbers_of_a_backend_are_refused_at_once(kind):
    names = list(numbers(kind))
    if names:
        with pytest.raises(ValueError) as caught:
            check_parameters(kind, {**NEEDED.get(kind, {}), **dict.fromkeys(names, "x")})
        assert [name for name in names if f"retriever.params.{name} must be" not in str(caught.value)] == []


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
    ({}, [1, 2**31 - 1], [0], "an integer >= 1"),
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


@pytest.mark.parametrize(("value", "secret"), [
    ("ftp://me:hunter2@shop", "hunter2"), ("http://me:hunter2@shop", "hunter2"), ("http://shop?key=hunter2", "hunter2"),
    ("me:hunter2@shop", "hunter2"), ("shop:9200", None), (9200, None), ("http://", None),
])  # fmt: skip
def test_an_address_with_a_secret_is_not_repeated(value, secret):
    with pytest.raises(ValueError, match=r"^retriever\.params\.url must be http.*: set \$TOKEN$") as caught:
        check_address("url", value, "set $TOKEN")
    assert (secret is None) == (repr(value) in str(caught.value))
    assert secret is None or secret not in str(caught.value)


def test_all_checks_are_raised_together_and_other_errors_at_once():
    checks = Checks()
    checks.raise_all()
    for number in (0, 5, -1):
        with checks:
            check_integer("x", number, 1)
    with pytest.raises(ValueError, match=r"got 0: 1 is usual; retriever\.params\.x must be .*got -1: 1 is usual"):
        checks.raise_all()
    with pytest.raises(KeyError), checks:
        raise KeyError("x")


@pytest.mark.parametrize("kind", BACKENDS)
def test_what_is_no_text_is_refused_where_the_parameters_are_checked(kind):
    """Whether a parameter is read with the other settings or not: nothing is found out after an index is built."""
    parameters = backend_module(kind).params
    hints = typing.get_type_hints(parameters) if parameters is not None else {}
    for name in (name for name, hint in hints.items() if hint in (str, str | None)):
        for value in (3, 2.5, True, ["x"], {"a": 1}):
            with pytest.raises(ValueError, match=rf"(^|; )retriever\.params\.{name}\b.*\w"):
                check_parameters(kind, NEEDED.get(kind, {}) | {name: value})


@pytest.mark.parametrize("kind", ["bm25", "tantivy", "postgres", "opensearch", "elasticsearch"])
def test_names_of_fields_are_texts(kind):
    """YAML reads the names 1 and no, which stand in no quotes, as a number and as false."""
    weight = "A" if kind == "postgres" else 1
    check_parameters(kind, NEEDED.get(kind, {}) | {"fields": {"naïve Größe": weight}, "structured": {"filters": ["x"]}})
    for name in (1, 2.5, None, False, "", " ", "a\0b", "\ud83d"):
        with pytest.raises(
            ValueError, match=r"^retriever\.params\.fields must map fields to .*: write them as \{title: "
        ):
            check_parameters(kind, NEEDED.get(kind, {}) | {"fields": {"text": weight, name: weight}})
        with pytest.raises(ValueError, match=r"^retriever\.params\.structured\.filters must be .*: write them as \["):
            check_parameters(kind, NEEDED.get(kind, {}) | {"structured": {"filters": ["brand", name]}})


@pytest.mark.parametrize("kind", ["bm25", "tantivy", "opensearch"])
@pytest.mark.parametrize("weight", [10**400, 10**9, 0, -1, math.nan, "3", None, True])
def test_weights_of_fields_that_no_index_can_have(kind, weight):
    with pytest.raises(ValueError, match=r"^retriever\.params\.fields must map fields to ") as caught:
        check_parameters(kind, {"fields": {"text": weight}})
    assert len(str(caught.value)) < 400


def test_a_certificate_in_place_of_its_path():
    pasted = "-----BEGIN CERTIFICATE-----\n" + "MIIB" * 500
    with pytest.raises(ValueError, match=r"^retriever\.params\.ca_certs: there is no file .*: give the path") as caught:
        check_parameters("opensearch", {"url": "https://shop:9200", "ca_certs": pasted})
    assert len(str(caught.value)) < 300
