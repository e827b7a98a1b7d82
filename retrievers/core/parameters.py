"""Checks of the values of a retriever's parameters: every backend refuses the same mistake in the same words.

Each message names the parameter, what is allowed, the value, and one that is usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from retrievers.core.requests import is_plain_address

MAX_SEED = 2**32 - 1  # The largest seed that numpy takes.
MAX_INTEGER = 2**31 - 1  # Of integers without a limit of their own, since libraries keep them in 32 bits.


class ParametersError(ValueError):
    """Several parameters are wrong.

    problems: a message for each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[ParametersError], tuple[tuple[str, ...]]]:
        return ParametersError, (self.problems,)


def problems_of(error: Exception) -> tuple[str, ...]:
    """The messages of an error that a backend raised for its parameters."""
    return error.problems if isinstance(error, ParametersError) else (str(error),)


class Checks:
    """Checks of a retriever's parameters, which show a user all bad values at once.

        @dataclass(frozen=True)
        class Params:
            depth: int = 1000
            timeout: float = 30.0
            fields: tuple[str, ...] = ("title",)

            def __post_init__(self) -> None:
                checks = Checks(self)
                checks.integers("depth")
                checks.numbers("timeout", above=True)
                with checks:  # A ValueError ends such a block, and is kept.
                    check_fields(self.fields)
                checks.raise_all()

    params: the dataclass. The default of a field is the usual value in the message about it. None = all checks are
        blocks.
    prefix: stands before the names in messages, such as "tuned.".
    """

    def __init__(self, params: Any = None, prefix: str = "") -> None:
        self._params = params
        self._values = {} if params is None else vars(params)
        self._usual = {} if params is None else {one.name: one.default for one in fields(params)}
        self._prefix = prefix
        self.found: list[str] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, ValueError):
            self.found.extend(problems_of(error))
            return True
        return False

    def raise_all(self) -> None:
        """Raise ParametersError, a ValueError, with all messages, if there is one."""
        if self.found:
            raise ParametersError(self.found)

    def integers(self, *names: str, least: int = 1, most: int | None = None, optional: bool = False) -> None:
        """Check fields by :func:`check_integer`."""
        for name in names:
            with self:
                check_integer(self._prefix + name, self._values[name], self._usual[name], least, most, optional)

    def numbers(
        self,
        *names: str,
        above: bool = False,
        most: float | None = None,
        below: float | None = None,
        as_float: bool = False,
    ) -> None:
        """Check fields by :func:`check_number`, from 0.

        as_float: whether they become floats, so that 1 and 1.0 give the same fingerprint. Default False.
        """
        for name in names:
            with self:
                value, usual = self._values[name], self._usual[name]
                number = check_number(self._prefix + name, value, usual, above=above, most=most, below=below)
                if as_float:
                    object.__setattr__(self._params, name, number)

    def flags(self, *names: str) -> None:
        """Check fields by :func:`check_flag`."""
        for name in names:
            with self:
                check_flag(self._prefix + name, self._values[name])

    def texts(self, *names: str) -> None:
        """Check fields by :func:`check_text`."""
        for name in names:
            with self:
                check_text(self._prefix + name, self._values[name], self._usual[name])

    def choice(self, name: str, choices: Sequence[str]) -> None:
        """Check a field by :func:`check_choice`."""
        with self:
            check_choice(self._prefix + name, self._values[name], choices)


def check_integer(
    name: str, value: Any, usual: Any, least: int = 1, most: int | None = None, optional: bool = False
) -> None:
    """Raise ValueError unless ``value`` is an integer from ``least`` to ``most``.

    name: the name of the parameter, such as "depth".
    usual: a value for the advice.
    least: the smallest value. Default 1.
    most: the largest value. None = `MAX_INTEGER`.
    optional: whether None is allowed, too. Default False.
    """
    if optional and value is None:
        return
    largest = MAX_INTEGER if most is None else most
    too_large = type(value) is int and value > largest
    if type(value) is not int or value < least or too_large:
        unlimited = most is None and not too_large
        allowed = f"an integer >= {least}" if unlimited else f"an integer from {least} to {largest}"
        raise wrong(name, f"{'null or ' if optional else ''}{allowed}", value, usual)


def check_number(
    name: str,
    value: Any,
    usual: Any,
    least: float = 0,
    above: bool = False,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """A parameter as a float.

    name: the name of the parameter, such as "k1".
    usual: a value for the advice.
    least: the smallest value. Default 0.
    above: whether ``least`` itself is too small. Default False.
    most: the largest value. None = any.
    below: what the value must be less than. None = anything. At most one of ``most`` and ``below`` is given.

    Raises ValueError where the value is not a finite number, or is outside the limits.
    """
    number = type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    low = number and (value > least if above else value >= least)
    if not low or (most is not None and value > most) or (below is not None and value >= below):
        if most is not None:
            upper = f"{' and at most' if above else ' to'} {most:g}"
        elif below is not None:
            upper = f"{' and' if above else ' to'} below {_plain(below)}"
        else:
            upper = ""
        allowed = f"above {least:g}{upper}" if above else f"from {least:g}{upper}" if upper else f">= {least:g}"
        raise wrong(name, f"a number {allowed}", value, usual)
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        named = " or ".join(choices) if len(choices) == 2 else f"from {', '.join(choices)}"
        raise ValueError(f"retriever.params.{name}: unknown {value!r:.100}: choose {named}")


def check_address(name: str, value: Any, credentials: str) -> None:
    """Raise ValueError unless ``value`` is the HTTP address of a server, without user, password and query.

    credentials: where they belong, for the advice, such as "set the token in $REC_R1_TOKEN".
    """
    if not isinstance(value, str) or not value.startswith(("http://", "https://")) or not is_plain_address(value):
        shown = f", got {value!r}" if not {"@", "?"} & set(str(value)) else ""  # These may show a secret.
        raise ValueError(
            f"retriever.params.{name} must be http(s)://HOST:PORT without user, password and ?query{shown}: "
            f"{credentials}"
        )


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if type(value) is not bool:
        raise ValueError(f"retriever.params.{name} must be true or false, got {value!r}: write one of the two")


def check_text(name: str, value: Any, usual: Any) -> None:
    """Raise ValueError unless ``value`` is a text. Where None is usual, it is allowed, too."""
    if not isinstance(value, str) and not (value is None and usual is None):
        raise wrong(name, f"a text{' or null' if usual is None else ''}", value, '""' if usual == "" else usual)


def is_name(value: Any) -> bool:
    """Whether a value can name a field of a catalogue, an index or a table: a text that is not blank.

    YAML reads 1 and no, without quotes, as a number and as false.
    """
    try:  # Half of a surrogate pair can be stored nowhere, and no engine reads NUL.
        return isinstance(value, str) and bool(value.strip() and value.encode()) and "\0" not in value
    except ValueError:
        return False


def check_mapping(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a mapping."""
    if not isinstance(value, Mapping):
        raise wrong(name, "a mapping", value, "{}")


def wrong(name: str, allowed: str, value: Any, usual: Any) -> ValueError:
    """The error for a parameter that is not as ``allowed`` says.

    usual: a value for the advice. None = null.
    """
    shown = f"{value!r:.100}"
    return ValueError(
        f"retriever.params.{name} must be {allowed}, got {shown}: {'null' if usual is None else usual} is usual"
    )


def _plain(number: float) -> str:
    """A limit in digits, such as 2,000,000, which :g would write as 2e+06."""
    return f"{number:,.0f}" if number == int(number) else f"{number:g}"
