import json
import pickle

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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


@given(st.text())
def test_a_line_is_a_part_of_the_completion_with_a_word_in_it(completion):
    line = parse_line(completion)
    if line is None:
        assert not any(c.isalnum() for c in completion)
    else:
        assert line in completion and line == line.strip() and len(line.splitlines()) == 1
        assert any(c.isalnum() or c == "_" for c in line)


@given(st.text().filter(lambda s: any(c.isalnum() for c in s)), st.text(), st.booleans())
def test_any_query_comes_through_think_json(query, thought, escape):
    assume("<" not in thought and "<" not in query)
    answer = json.dumps({"query": query}, ensure_ascii=escape)
    assert parse_think_json(f"<think>{thought}</think>\n<answer>{answer}</answer>") == query


@given(st.text())
def test_braces_of_a_query_mean_themselves(query):
    format_ = Format(FormatConfig(prompt="{a} {query} {} {{b}}", chat=False))
    assert format_.prompt(query) == "{a} " + query + " {} {{b}}"


@pytest.mark.parametrize("repeat", [1, 3])
def test_repeat_counts_the_query(repeat):
    action = Format(FormatConfig(action="expand", repeat=repeat)).parse("joy", "be happy")
    assert action.text.split() == ["be", "happy"] * repeat + ["joy"] and action.written == "joy"


def test_repeat_does_nothing_to_a_replacement():
    assert Format(FormatConfig(repeat=3)).parse("joy", "happy").text == "joy"


@pytest.mark.parametrize(
    "completion",
    [
        '<think>a</think></think><answer>{"query": "x"}</answer>',
        '<think>a</think>b</think><answer>{"query": "x"}</answer>',
        '<think>a</answer></think><answer>{"query": "x"}</answer>',
        '<think>a</think><answer>{"query": "x </answer>"}</answer>',
    ],
)
def test_a_repeated_closing_tag_is_malformed(completion):
    assert parse_think_json(completion) is None


@pytest.mark.parametrize("opening", ["[", '{"query":'])
def test_deeply_nested_json_is_malformed(opening):
    assert parse_think_json(f"<think></think><answer>{opening * 5_000}</answer>") is None


@pytest.mark.parametrize("mark", ["1.", "2)"])
def test_a_list_mark_alone_on_its_line_is_no_query(mark):
    assert parse_line(f"{mark}\nsmile") == "smile"
