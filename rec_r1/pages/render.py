"""Pages that can be sent: one template in HTML and one in Markdown, rendered with the same values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.config.redaction import printable
from rec_r1.evaluation.number_format import number, p_value, percent, signed

LONGEST = 400  # characters of an answer on the page


def write(output: Path, template: str, context: Mapping[str, Any]) -> list[Path]:
    """templates/TEMPLATE.html.j2 as ``output``, TEMPLATE.md.j2 beside it, each atomically; the two paths."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    written = []
    for suffix in (".html", ".md"):
        env = Environment(
            loader=PackageLoader("rec_r1.pages", "templates"),
            autoescape=suffix == ".html",
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        env.filters |= {
            "number": number,
            "signed": signed,
            "p": lambda value: p_value(value).lstrip("="),
            "percent": percent,
            "md": _markdown,
            "cut": _cut,
        }
        path = output.with_suffix(suffix)
        runs.write_atomically(path, env.get_template(f"{template}{suffix}.j2").render(context))
        written.append(path)
    return written


def _cut(text: object, most: int = LONGEST) -> str:
    """``text`` on one line, its end cut off where it is long."""
    line = " ".join(printable(str(text)).split())
    return line if len(line) <= most else f"{line[:most]}…"


def _markdown(text: object) -> str:
    """``text`` as a table's cell or a list's item: on one line, nothing of it read as Markdown or HTML."""
    line = _cut(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "|`*_[]" else c for c in line)
