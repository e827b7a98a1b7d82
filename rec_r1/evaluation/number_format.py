"""Numbers as text, for terminals and pages: one place for signs, percent and p-values. – stands for no number."""

from __future__ import annotations


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and a real minus sign."""
    return "–" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """A difference: ``value`` with its sign."""
    return "–" if value is None or value != value else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share of 1 as percent: 0.62 is 62%."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%".replace("-", "−")


def p_value(value: float) -> str:
    """The right side of "p": "<.001", "=1", "=.042"."""
    return "<.001" if value < 0.001 else "=1" if value > 0.9995 else "=" + f"{value:.3f}".lstrip("0")
