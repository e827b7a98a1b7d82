import json
import pickle
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rec_r1.config import FormatConfig, UserError
from rec_r1.prompts import PROMPTS, Action, Format, counted, parse_json, parse_line
from retrievers.text.analysis import words


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
    action = Format(FormatConfig(answer="think_json")).parse(completion, "")
    assert (None if action is None else action.text) == query


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


@pytest.mark.parametrize("action", ["replace", "items", "ranking"])
@pytest.mark.parametrize("answer", ["json", "think_json"])
def test_the_example_in_a_prompt_is_what_its_parser_reads(answer, action):
    format_ = Format(FormatConfig(answer=answer, action=action))
    example = re.search(r"<answer>.*</answer>", format_.template).group()
    example = example.replace("…", "2" if action == "ranking" else "x")
    parsed = format_.parse(f"<think>so</think>{example}" if answer == "think_json" else example, "a query")
    assert (
        parsed
        == {
            "replace": Action("x", "x"),
            "items": Action("", "x\nx", items=("x", "x")),
            "ranking": Action("", "3 1 2", order=(3, 1, 2)),
        }[action]
    )
    assert format_.parse(example if answer == "think_json" else f"<think>so</think>{example}", "a query") is None


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("answer", ["line", "json", "think_json"])
def test_named_prompts_are_whole(name, answer):
    action = {"items": "items", "rerank": "ranking", "edit": "edit"}.get(name, "replace")
    format_ = Format(FormatConfig(answer=answer, action=action, prompt=name, chat=False))
    shown = format_.prompt("QUERY", ["OLD ITEM", "NEW {query}"], ["CANDIDATE", "OTHER"])
    assert not re.search(r"\{(answer|history|candidates)\}", shown) and "{{" not in shown
    assert ("OLD ITEM\n- NEW {query}" in shown) == (
        name in ("sequential", "items", "edit")
    )  # a title's braces mean themselves
    assert ("1. CANDIDATE\n2. OTHER" in shown) == (name == "rerank")
    assert ("QUERY" in shown) == (name in ("words", "sparse", "dense", "rerank", "structured"))
    assert ("<think>" in shown) == (answer == "think_json" and name != "words")


def test_titles_are_cut_to_so_many_words():
    format_ = Format(FormatConfig(prompt="{history}", chat=False, title_words=2))
    assert format_.prompt("", ["one two three", "four"]) == "- one two\n- four"
    assert format_.prompt("", ["防水登山鞋 男款"]) == "- 防水"  # a letter each, where no blanks say more


def test_a_prompt_shows_the_last_titles_of_a_longer_history():
    format_ = Format(FormatConfig(prompt="{history_line}", chat=False, titles=2))
    assert format_.prompt("", ["one", "two", "three"]) == "two; three"
    assert format_.prompt("", ["one"]) == "one"


@pytest.mark.parametrize(
    ("completion", "order"),
    [
        ("3, 1, 2", (3, 1, 2)),
        ("Best first:\n[2] > [1]\n3", (2, 1)),
        ("2. 2. 9", (2, 2, 9)),
        ("none of them", None),
        ("", None),
    ],
)
def test_a_line_of_numbers(completion, order):
    parsed = Format(FormatConfig(action="ranking")).parse(completion, "")
    assert (parsed.order if parsed else None) == order


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ('["a", 3, "", "b", null]', ("a", "b")),
        ('["a", "a"]', ("a", "a")),
        ("[]", None),
        ('"a"', None),
        ('["\\ud83d"]', None),
        ("[[1]]", None),
    ],
)
def test_lists_of_items(answer, items):
    parsed = Format(FormatConfig(action="items", answer="json")).parse(f'<answer>{{"items": {answer}}}</answer>', "")
    assert (parsed.items if parsed else None) == items
    many = Format(FormatConfig(action="items", max_items=2)).parse("- a\n2. b\n\nc", "")
    assert many.items == ("a", "b") and many.text == ""


@pytest.mark.parametrize("answer", ['[1, true, 2.0, "3", 2]', "[2, 1]"])
def test_rankings_take_whole_numbers_only(answer):
    parsed = Format(FormatConfig(action="ranking", answer="json")).parse(
        f'<answer>{{"ranking": {answer}}}</answer>', ""
    )
    assert parsed.order in ((1, 2), (2, 1))


def test_bad_formats():
    with pytest.raises(UserError, match="choose from line, json, think_json"):
        Format(FormatConfig(answer="xml"))
    with pytest.raises(UserError, match=r"lacks \{query\}"):
        Format(FormatConfig(prompt="no place"))
    with pytest.raises(UserError, match=r"lacks \{candidates\}"):
        Format(FormatConfig(prompt="order {query}", action="ranking"))


def test_picklable():
    format_ = pickle.loads(pickle.dumps(Format(FormatConfig(action="expand"))))
    assert format_.parse("joy", "happy").text == "happy joy"


@given(st.text())
def test_a_line_is_a_part_of_the_completion_with_a_word_in_it(completion):
    line = parse_line(completion)
    if line is None:
        assert all(word.isdigit() for word in words(completion))  # the numbers of an empty list
    else:
        assert line in completion and line == line.strip() and len(line.splitlines()) == 1
        assert words(line)


@given(st.text().filter(words), st.text(), st.booleans())
def test_any_query_comes_through_think_json(query, thought, escape):
    assume("<" not in thought and "<" not in query)
    answer = json.dumps({"query": query}, ensure_ascii=escape)
    assert parse_json(f"<think>{thought}</think>\n<answer>{answer}</answer>", thinking=True) == {"query": query}


@given(st.text())
def test_braces_of_a_query_mean_themselves(query):
    format_ = Format(FormatConfig(prompt="{a} {query} {} {{b}}", chat=False))
    assert format_.prompt(query) == "{a} " + query + " {} {{b}}"


@pytest.mark.parametrize("action", ["replace", "expand"])
@pytest.mark.parametrize(
    ("answer", "completion", "keeps"),
    [
        ("line", "", True), ("line", "\n", True), ("line", "  \nred", True), ("line", "?!", False),
        ("line", "…\nred", False),
        ("json", '<answer>{"query": ""}</answer>', True), ("json", '<answer>{"query": " "}</answer>', True),
        ("json", '<answer>{"query": 1}</answer>', False), ("json", "<answer>", False), ("json", "", False),
    ],
)  # fmt: skip
def test_an_empty_answer_may_keep_the_query(action, answer, completion, keeps):
    kept = Format(FormatConfig(answer=answer, action=action, keep_query=True, repeat=3)).parse(completion, "rain")
    assert kept == (Action("rain", "") if keeps else None)
    if "red" not in completion:
        assert Format(FormatConfig(answer=answer, action=action)).parse(completion, "rain") is None


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
    assert parse_json(completion, thinking=True) is None


@pytest.mark.parametrize("opening", ["[", '{"query":'])
def test_deeply_nested_json_is_malformed(opening):
    assert parse_json(f"<think></think><answer>{opening * 5_000}</answer>", thinking=True) is None


@pytest.mark.parametrize("mark", ["1.", "2)"])
def test_a_list_mark_alone_on_its_line_is_no_query(mark):
    assert parse_line(f"{mark}\nsmile") == "smile"


@pytest.mark.parametrize(
    ("text", "query", "shown"),
    [
        ("lecturer lecturer lecturer teacher", "lecturer", "lecturer (×3) teacher"),
        ("good night good night moon", "good night", "good night (×2) moon"),
        ("lecturer teacher", "lecturer", "lecturer teacher"),
        ("lecturer lecturer, professor", "lecturer", "lecturer lecturer, professor"),
        ("a a", "a", "a (×2)"),
        ("words", "", "words"),
    ],
)
def test_a_repeated_query_is_shown_once(text, query, shown):
    assert counted(text, query) == shown
