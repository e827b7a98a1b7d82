"""Numbers as text, for terminals and pages. A dash (–) stands for a missing number."""

from __future__ import annotations


def missing(value: float | None) -> bool:
    """Whether there is no number. JSON has null in place of NaN."""
    return value is None or value != value


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and the typographic minus sign."""
    return "–" if missing(value) else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """``value`` with its sign, for differences."""
    return "–" if missing(value) else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share from 0 to 1 as percent: 0.62 is 62%."""
    return "–" if value is None or missing(value) else f"{100 * value:.{digits}f}%".replace("-", "−")


def p_value(value: float) -> str:
    """A p value as text that follows the letter p: "<.001", "=1", "=.042"."""
    return "<.001" if value < 0.001 else "=1" if value > 0.9995 else "=" + f"{value:.3f}".lstrip("0")
