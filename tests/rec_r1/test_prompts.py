import pickle

import pytest

from rec_r1.config import FormatConfig, UserError
from rec_r1.prompts import Action, Format, parse_line, parse_think_json


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        ("smile, joy", "smile, joy"),
        ("\n\n  smile \nmore", "smile"),
        ("1. smile", "smile"),
        ("- smile", "smile"),
        ("...\n• 3 wishes", "3 wishes"),
        ("笑顔", "笑顔"),
        ("", None),
        ("\n .,;\n", None),
    ],
)
def test_line(completion, query):
    assert parse_line(completion) == query


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        ('<think>a</think><answer>{"query": "red shoes"}</answer>', "red shoes"),
        ('  <think>\na\n</think>\n<answer>\n{"query": "red"}\n</answer>\n', "red"),
        ('<think></think><answer>{"query": "a", "note": 1}</answer>', "a"),
        ('<answer>{"query": "a"}</answer>', None),
        ('<think>a</think>{"query": "a"}', None),
        ('<answer>{"query": "a"}</answer><think>a</think>', None),
        ('<think>a<think></think><answer>{"query": "a"}</answer>', None),
        ('<think>a</think><answer>{"query": "a"}</answer> and more', None),
        ('<think>a</think><answer>{"query": "a"}</answer><answer>{"query": "b"}</answer>', None),
        ("<think>a</think><answer>red shoes</answer>", None),
        ('<think>a</think><answer>{"query": ["a"]}</answer>', None),
        ('<think>a</think><answer>{"query": "  "}</answer>', None),
        ('<think>a</think><answer>["query"]</answer>', None),
        ("<think>" * 2_000, None),
    ],
)
def test_think_json(completion, query):
    assert parse_think_json(completion) == query


def test_replace_and_expand():
    replace, expand = Format(FormatConfig()), Format(FormatConfig(action="expand", repeat=2))
    assert replace.parse("joy", "happy") == Action("joy", "joy")
    assert expand.parse("joy", "happy") == Action("happy happy joy", "joy")
    assert replace.parse("", "happy") is None and expand.parse("", "happy") is None


def test_prompts():
    assert Format(FormatConfig(prompt="Q: {query}", chat=False)).prompt("{query} {x}") == "Q: {query} {x}"
    assert Format(FormatConfig(prompt='{"a": "{query}"}', chat=False)).prompt("b") == '{"a": "b"}'
    chat = Format(FormatConfig(prompt="Q: {query}", system="Be brief.")).prompt("a")
    assert chat == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: a"}]
    assert [m["role"] for m in Format(FormatConfig(answer="think_json")).prompt("a")] == ["user"]


def test_the_prompt_of_an_answer_format_shows_what_its_parser_reads():
    for example in ("think_json", "line"):
        template = Format(FormatConfig(answer=example)).template
        assert "{query}" in template and "{{" not in template
    shown = Format(FormatConfig(answer="think_json")).template.split("Example: ")[1].splitlines()[0]
    assert parse_think_json(shown.replace("…", "x")) == "x"


def test_bad_formats():
    with pytest.raises(UserError, match="choose from line, think_json"):
        Format(FormatConfig(answer="xml"))
    with pytest.raises(UserError, match=r"lacks \{query\}"):
        Format(FormatConfig(prompt="no place"))


def test_picklable():
    format_ = pickle.loads(pickle.dumps(Format(FormatConfig(action="expand"))))
    assert format_.parse("joy", "happy").text == "happy joy"
