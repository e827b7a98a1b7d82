"""Parsing reads what a model wrote, however long and odd: the old patterns' answers, in time linear in the length."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rec_r1.prompts import edit_line, parse_json
from rec_r1.prompts.completions import TAGS as _TAGS
from rec_r1.tasks.trec import _TAG

# What was there before: right, and quadratic.
JSON = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)
THINK_JSON = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
EDIT_LINE = re.compile(r"\s*[-*•]?\s*(more|less)(?:[ _]like)?\s*:(.*)", re.IGNORECASE | re.ASCII)
TOPIC_TAG = re.compile(r"<(/?)(\w+)[^<>]*>")

PIECES = [*_TAGS, *_TAGS, '{"a": 1}', "{}", "1", "x", " ", "\n", "\x85", "<", ">", "/"]


def json_before(completion: str, thinking: bool) -> bool:
    match = (THINK_JSON if thinking else JSON).fullmatch(completion)
    return match is not None and not any(tag in part for part in match.groups() for tag in _TAGS)


@pytest.mark.slow
@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), st.booleans())
@example("<think>x</think> <answer>{}</answer>\n", True)
@example("<answer>{}</answer>", False)
@example("<answer></answer>{}</answer>", False)
def test_the_same_answers_are_well_formed_as_before(completion, thinking):
    well_formed = json_before(completion, thinking)
    answer = parse_json(completion, thinking)
    assert answer is None or well_formed
    if well_formed:
        inner = (THINK_JSON if thinking else JSON).fullmatch(completion).groups()[-1].strip()
        assert (answer is None) == (inner not in ('{"a": 1}', "{}"))


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.lists(
        st.sampled_from(["more", "LESS", "lik", "e", " like", "_like", " ", "\t", "-", "*", "•", ":", ";", "x"]),
        max_size=8,
    ).map("".join)
)
@example("•  More_like : a; b:c")
def test_the_same_lines_are_edits_as_before(line):
    match = EDIT_LINE.match(line)
    before = None if match is None else (match[1].lower() + "_like", match[2])
    assert edit_line(line) == before


def test_a_letter_that_only_folds_to_ascii_is_no_edit():
    assert edit_line("le\u017fs: a") is None  # its lower-case form names no sign


@given(st.text("<>/ab =", max_size=12))
def test_the_same_tags_are_found_in_topics(line):
    assert [m.groups() for m in _TAG.finditer(line)] == [m.groups() for m in TOPIC_TAG.finditer(line)]


LONG = """
from rec_r1.config import FormatConfig
from rec_r1.prompts import ACTIONS, STYLES, Format
from rec_r1.tasks.markup import without_markup
from rec_r1.tasks.trec import _TAG as TOPIC_TAG
from retrievers.types import Schema

n = 100_000
long = [
    " " * n, "\\t" * n + "x", "- " * n, "-" + " " * n + "more", "more" + " " * n, "more" + " " * n + ":x", "more:" * n,
    "more:" + ";" * n, "1" * n, "1" * n + ".", "1. " * n, "1 " * n, "\\n" * n, "x\\n" * n, "<think>" + " " * n,
    "<think></think>" + " " * n, "<think></think>" + " " * n + "<answer>", "<think></think>" + " " * n + "<answer>x",
    "</think> " * n, "<think>" + "</think> " * n + "</answer>", "<answer>" + "[" * n + "</answer>",
    "<answer>" + '{"a":' * n + "</answer>", "<answer>" * n, "<answer>" + "9" * n + "</answer>",
    '<answer>{"query": "' + "\\\\u0020" * n + '"}</answer>', "<think></think><answer>" + " " * n + "</answer>",
    "<" + "a" * n, "<a" + " " * n, "<" * n,
]
for action in ACTIONS:
    for answer in STYLES[1:] if action == "structured" else STYLES:  # A structured query is never a line.
        schema = Schema(("text",)) if action == "structured" else None
        format_ = Format(FormatConfig(action=action, answer=answer), schema=schema)
        for completion in long:
            format_.parse(completion, "query")
for text in long:
    without_markup(text)
    list(TOPIC_TAG.finditer(text))
print("done")
"""


@pytest.mark.slow
def test_a_hundred_thousand_characters_are_read_at_once():
    """The bound is no measure of speed: quadratic reading of these takes minutes each, linear reading a second."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, timeout=240)
    assert done.stdout == "done\n", done.stderr
