"""Write a page as HTML and as Markdown, from two templates with the same values. A page needs no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.config.redaction import printable
from rec_r1.evaluation.number_format import number, p_value, percent, signed

MAX_CHARACTERS = 400  # A longer completion is cut on the page.


def write(output: Path, template: str, context: Mapping[str, Any]) -> list[Path]:
    """Write a page atomically, in HTML and in Markdown.

    output: the HTML file. The Markdown file has the same name with the suffix .md.
    template: the name of the templates in templates/, without .html.j2 and .md.j2.
    context: the values that both templates show.

    Returns the paths of the two files.
    """
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


def _cut(text: object, most: int = MAX_CHARACTERS) -> str:
    """A text on one line, cut to ``most`` characters."""
    line = " ".join(printable(str(text)).split())
    return line if len(line) <= most else f"{line[:most]}…"


def _markdown(text: object) -> str:
    """A text for a cell of a table or an item of a list: on one line, with all Markdown and HTML escaped."""
    line = _cut(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "|`*_[]" else c for c in line)
