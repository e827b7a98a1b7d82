"""HTML in a text becomes plain text, by selectolax, whose parser follows the HTML standard as browsers do."""

from __future__ import annotations

import html
import re

from selectolax.lexbor import LexborHTMLParser

# A tag is "<" and a letter, up to the next ">". Any other "<" is a character of the text, as in "fits <XL": it is
# escaped, because a parser drops an unclosed tag with all that follows it.
_TAG = re.compile(r"<[a-zA-Z/!?][^<>]*>")
_STRAY = re.compile(r"<(?![a-zA-Z/!?][^<>]*>)")
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]+);")
# What a text that has been resolved once must contain to be resolved again: a whole tag of HTML, not "<y and z>".
_HTML_TAG = re.compile(
    r"</?(?:a|abbr|article|b|big|blockquote|br|center|code|dd|div|dl|dt|em|font|footer|h[1-6]|header|hr|i|iframe|img|"
    r"ins|label|li|link|main|mark|meta|nav|ol|p|pre|s|script|section|small|span|strike|strong|style|sub|sup|table|tbody|"
    r"td|tfoot|th|thead|tr|tt|u|ul|video)(?:\s+[\w:-]+\s*=[^<>]*)?\s*/?>",
    re.IGNORECASE,
)
_NOT_TEXT = ["script", "style"]
_LEVELS = 4  # Escapes of escapes that are resolved: shops export "&amp;lt;li&amp;gt;".


def without_markup(text: str) -> str:
    """``text`` without HTML tags, comments, scripts and styles, and with its entities resolved.

    A tag separates words, as browsers separate blocks. Escaped markup, such as "&lt;br&gt;" and "&amp;nbsp;", is markup
    as well; an escaped bracket that makes no tag of HTML is text.

    Example: without_markup("<li>&lt; 5&nbsp;kg</li>") is "< 5\\xa0kg" with white space around it.
    """
    for level in range(_LEVELS):
        if "<" not in text and "&" not in text:  # most texts, of which there may be a million
            break
        if level and not (_HTML_TAG.search(text) or _ENTITY.search(text)):
            break
        text = _once(text)
    return text


def first_markup(text: str) -> str | None:
    """The first tag or entity of ``text``, for messages; None where there is none."""
    found = _TAG.search(text) or _ENTITY.search(text)
    return found[0] if found else None


def _once(text: str) -> str:
    if not _TAG.search(text):
        return html.unescape(text)
    # The parser ignores table cells outside a table, and joins the words that they separate: hence the spaces.
    parser = LexborHTMLParser(_STRAY.sub("&lt;", text).replace("<", " <"))
    parser.strip_tags(_NOT_TEXT)
    root = parser.root
    return "" if root is None else root.text(separator=" ")
