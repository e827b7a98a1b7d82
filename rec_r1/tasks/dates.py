"""Dates as people and databases write them, where their order of day and month is certain."""

from __future__ import annotations

import datetime
import re

_DAY_FIRST = re.compile(r"(\d{1,2})\.(\d{1,2})\.(\d{4})(?:,?\s+(.+))?")  # 31.01.2024: the day is always first.
_EITHER_ORDER = re.compile(r"(\d{1,2})([/-])(\d{1,2})\2(\d{4})(?:,?\s+(.+))?")  # 31/01/2024 or 01/31/2024.
_YEAR_FIRST = re.compile(r"(\d{4})/(\d{1,2})/(\d{1,2})(?:,?\s+(.+))?")
_TWO_DIGITS = re.compile(r"\d{1,2}([./-])\d{1,2}\1\d{2}(\s.*)?")
_CLOCKS = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%I:%M %p", "%I:%M:%S %p")


def read_date(text: str) -> datetime.datetime:
    """The time that a text stands for, without a time zone where it names none.

    text: ISO 8601 (2024-01-31, 2024-01-31 12:00:00, 2024-01-31T12:00:00Z), also with " UTC" at the end;
        31.01.2024; 2024/01/31; 01/31/2024 or 31/01/2024, also with dashes. A time of day may follow.

    Raises ValueError with the reason: the order of day and month is not certain, the year has two digits, or the text
    is no date.
    """
    text = text.strip()
    try:
        return datetime.datetime.fromisoformat(re.sub(r"\s*UTC$", "+00:00", text))
    except ValueError:
        pass
    if _TWO_DIGITS.fullmatch(text):
        raise ValueError("its year has two digits")
    if found := _DAY_FIRST.fullmatch(text):
        day, month, year, clock = found.groups()
    elif found := _YEAR_FIRST.fullmatch(text):
        year, month, day, clock = found.groups()
    elif found := _EITHER_ORDER.fullmatch(text):
        one, mark, other, year, clock = found.groups()
        if int(one) <= 12 and int(other) <= 12 and one != other:
            raise ValueError(f"it may be day{mark}month or month{mark}day")
        day, month = (one, other) if int(one) > 12 else (other, one)
    else:
        raise ValueError("it is no date in a known form")
    at = _clock(clock) if clock else datetime.time()
    return datetime.datetime.combine(datetime.date(int(year), int(month), int(day)), at)


def _clock(text: str) -> datetime.time:
    for form in _CLOCKS:
        try:
            return datetime.datetime.strptime(text.strip(), form).time()
        except ValueError:
            continue
    raise ValueError(f"{text!r} is no time of day in a known form")
