"""The action structured: its prompt, its parser, why completions are malformed, and how this is counted."""

import json
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
import rewards
from rec_r1.config import FormatConfig, UserError
from rec_r1.prompts import Action, Format, sent
from rec_r1.prompts.structured import MALFORMED, as_json
from rec_r1.scoring import Scorer
from rec_r1.scoring.batch_summary import summary
from retrievers import Catalog, Query, Schema, Structured

SCHEMA = Schema(("title", "text"), ("title", "text"), (("brand", ("Acme", 'Say "hi"')), ("color", ())))
FORMAT = Format(FormatConfig(action="structured", answer="json", chat=False), schema=SCHEMA)


def tagged(answer) -> str:
    return f"<answer>{answer if isinstance(answer, str) else json.dumps(answer)}</answer>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"query": "red shoes"}, Structured("red shoes")),
        ({"must": ["red", "shoe"], "should": "trail"}, Structured(must=("red", "shoe"), should=("trail",))),
        ({"query": "...", "must": ["red", "!"], "should": []}, Structured(must=("red",))),
        (
            {"query": "a", "filters": {"color": ["", "red"], "brand": "Acme"}, "boosts": {"title": 2, "text": 0.5}},
            Structured("a", (), (), (("brand", ("Acme",)), ("color", ("", "red"))), (("text", 0.5), ("title", 2.0))),
        ),
        ('{"query": "a", "query": "b"}', Structured("b")),
    ],
)
def test_a_query_in_parts_is_read(answer, expected):
    action = FORMAT.parse(tagged(answer), "the raw query")
    assert action.structured == expected and FORMAT.cause(tagged(answer)) is None
    assert action.text == action.written == expected.text and not action.items and not action.order
    assert FORMAT.parse(tagged(sent(action)), "") == action  # What is shown is what is read.


@pytest.mark.parametrize(
    ("completion", "cause"),
    [
        ("red shoes", "not_json"),
        (tagged("red"), "not_json"),
        (tagged(["red"]), "not_json"),
        (tagged({"query": "a"}) + " and more", "not_json"),
        (tagged('{"query": "a"'), "not_json"),
        (tagged("[" * 100_000), "not_json"),
        (tagged({"query": "a", "note": 1}), "unknown_key"),
        (tagged({"query": ["a"]}), "wrong_type"),
        (tagged({"query": None}), "wrong_type"),
        (tagged({"must": [1]}), "wrong_type"),
        (tagged({"must": {"title": "a"}}), "wrong_type"),
        (tagged({"query": "a", "filters": ["brand"]}), "wrong_type"),
        (tagged({"query": "a", "filters": {"brand": 3}}), "wrong_type"),
        (tagged({"query": "a", "filters": {"brand": []}}), "wrong_type"),
        (tagged({"query": "a", "boosts": 2}), "wrong_type"),
        (tagged({"query": "a", "filters": {"price": "3"}}), "unknown_field"),
        (tagged({"query": "a", "filters": {"title": "a"}}), "not_filterable"),
        (tagged({"query": "a", "boosts": {"brand": 2}}), "not_boostable"),
        (tagged({"query": "a", "boosts": {"title": "2"}}), "bad_boost"),
        (tagged({"query": "a", "boosts": {"title": True}}), "bad_boost"),
        (tagged({"query": "a", "boosts": {"title": 1e300}}), "bad_boost"),
        (tagged('{"query": "a", "boosts": {"title": NaN}}'), "bad_boost"),
        (tagged('{"query": "a", "boosts": {"title": -Infinity}}'), "bad_boost"),
        (tagged({"query": "word " * 65}), "too_long"),
        (tagged({"query": "x" * 1_000_000}), "too_long"),
        (tagged({"query": "a", "filters": {"brand": "x" * 1_000_000}}), "too_long"),
        (tagged('{"query": "\\ud83d a"}'), "bad_text"),
        (tagged({"query": "a\0"}), "bad_text"),
        (tagged({}), "no_words"),
        (tagged({"query": " ", "filters": {"brand": "Acme"}}), "no_words"),
    ],
)
def test_what_is_not_allowed_is_malformed_for_a_cause(completion, cause):
    assert FORMAT.parse(completion, "raw") is None
    assert FORMAT.cause(completion) == cause and cause in MALFORMED


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["brand", "title"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["brand", "title", "a"]), inner, max_size=2)
    ),
    max_leaves=6,
)
ANSWERS = st.dictionaries(st.sampled_from(["query", "must", "should", "filters", "boosts", "more"]), JSON, max_size=4)


@given(ANSWERS)
def test_any_json_is_a_query_that_the_schema_allows_or_malformed(answer):
    completion = tagged(json.dumps(answer))
    action, cause = FORMAT.parse(completion, "raw"), FORMAT.cause(completion)
    assert (action is None) == (cause is not None)
    if action is None:
        assert cause in MALFORMED
        return
    assert retrievers.text.structured.problem(action.structured, SCHEMA) is None
    assert FORMAT.parse(tagged(as_json(action.structured)), "raw") == action


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(completion):
    for text in (completion, tagged(completion), tagged({"query": completion, "must": [completion]})):
        assert (FORMAT.parse(text, "") is None) == (FORMAT.cause(text) is not None)


PROMPT = """You write queries for a search engine. Rewrite the user's query so that the engine ranks what the user \
needs first: keep the words that matter, add words that relevant documents are likely to contain, and require \
only what is certain.
Answer with JSON, like this: <answer>{"query": "…", "must": ["…"], "should": ["…"], "filters": {"brand": ["…"]}, \
"boosts": {"title": 2}}</answer>
query: words to search for. must: words that every result has. should: words that move a result up. Leave out what you \
do not need.
filters: every result has one of these exact values in the field. Fields: brand (such as "Acme", "Say \\"hi\\""); color.
boosts: how much a word in the field counts, from 0.1 to 10; 1 is usual. Fields: title, text.

User query: red {query} shoes"""


def test_the_prompt_names_the_fields_and_some_values():
    assert FORMAT.prompt("red {query} shoes") == PROMPT
    bare = Format(FormatConfig(action="structured", answer="think_json", chat=False), schema=Schema(("text",)))
    assert "filters" not in bare.template and "boosts" not in bare.template and "<think>" in bare.template
    tricky = Format(FormatConfig(action="structured", answer="json"), schema=Schema(filters=(("a", ("{query}", "b")),)))
    assert 'a (such as "b")' in tricky.template
    assert Format(FormatConfig(action="structured", answer="json", prompt="{query}: {answer}"), schema=SCHEMA).template
    assert pickle.loads(pickle.dumps(FORMAT)) == FORMAT


@pytest.mark.parametrize("answer", ["json", "think_json"])
def test_the_example_in_a_prompt_is_what_its_parser_reads(answer):
    format_ = Format(FormatConfig(answer=answer, action="structured"), schema=SCHEMA)
    example = re.search(r"<answer>.*</answer>", format_.template).group().replace("…", "x")
    action = format_.parse(f"<think>so</think>{example}" if answer == "think_json" else example, "raw")
    expected = Structured("x", ("x",), ("x",), (("brand", ("x",)),), (("title", 2),))
    assert action == Action("x x x", "x x x", structured=expected)


def test_what_is_written_is_read_again_however_long_it_is():
    for parts in (["red  shoe"], ["a title of some words", "another"], ["word " * 500], ["登山鞋" * 300], ["x" * 3000]):
        written = FORMAT.write(parts)
        assert FORMAT.cause(written) is None, written[:80]
    assert FORMAT.parse(FORMAT.write(["red  shoe", "light"]), "").structured == Structured("red shoe light")


def test_lines_and_a_missing_schema_are_refused():
    with pytest.raises(UserError, match="a structured action is JSON: set format"):
        Format(FormatConfig(action="structured"))
    without = Format(FormatConfig(action="structured", answer="json"))  # Enough to check a recipe.
    assert "{query}" in without.template
    for use in (lambda: without.parse("x", ""), lambda: without.write(["x"]), lambda: without.cause("x")):
        with pytest.raises(ValueError, match="schema is not set"):
            use()
    assert Format(FormatConfig()).cause("") is None  # Causes are told apart for structured queries only.


CATALOG = Catalog.from_records(
    {"id": f"d{i}", "text": text, "brand": brand}
    for i, (text, brand) in enumerate([("red shoe", "Acme"), ("red boot", "Solvei"), ("blue shoe", "Acme")])
)


class Counting:
    """A retriever that remembers what it was asked."""

    def __init__(self):
        self.inner = retrievers.open("bm25", CATALOG, structured={"filters": ["brand"]})
        self.fingerprint, self.asked = self.inner.fingerprint, []

    def search(self, queries, k):
        return self.inner.search(queries, k)

    def ranks(self, queries, targets):
        self.asked.append(list(queries))
        return self.inner.ranks(queries, targets)


def test_completions_are_scored_and_counted(tmp_path):
    retriever = Counting()
    format_ = Format(FormatConfig(action="structured", answer="json"), schema=retrievers.schema_of(retriever.inner))
    scorer = Scorer(
        format_.parse, retriever, rewards.from_spec({"mrr@10": 1.0, "format": 0.5}), catalog=CATALOG,
        transcript=tmp_path / "rollouts.jsonl", causes=format_.cause,
    )  # fmt: skip
    completions = [
        tagged({"query": "red"}),  # The target is second.
        tagged({"query": "red", "must": ["boot"]}),
        tagged({"query": "red", "filters": {"brand": "Acme"}}),  # A filter that leaves the target out.
        tagged({"query": "red", "filters": {"brand": "Acme"}}),
        tagged({"query": "red", "filters": {"size": "1"}}),
        "no JSON",
    ]
    logged = {}
    got = scorer(
        ["p"] * 6, completions, query=["q"] * 6, target_rows=[[1]] * 6, target_grades=[[1.0]] * 6,
        log_metric=logged.__setitem__,
    )  # fmt: skip
    assert got == pytest.approx([0.5, 1.0, 0.0, 0.0, -0.5, -0.5])
    expected = [
        Structured("red"),
        Structured("red", must=("boot",)),
        Structured("red", filters=(("brand", ("Acme",)),)),
    ]
    assert retriever.asked == [[Query(one.text, structured=one) for one in expected]]  # Equal queries are asked once.
    causes = {name.rpartition("/")[2]: value for name, value in logged.items() if name.startswith("scorer/malformed/")}
    assert set(causes) == set(MALFORMED) and logged["scorer/malformed"] == pytest.approx(2 / 6)
    assert {name: value for name, value in causes.items() if value} == {
        "not_json": pytest.approx(1 / 6), "unknown_field": pytest.approx(1 / 6),
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["malformed"] for row in rows] == [None] * 4 + ["unknown_field", "not_json"]
    assert rows[2]["action"] == '{"query": "red", "filters": {"brand": ["Acme"]}}'
    assert [hit["id"] for hit in rows[2]["hits"]] == ["d0"] and rows[1]["ranks"] == [1]


def test_other_actions_have_no_causes():
    plain = Scorer(Format(FormatConfig()).parse, retrievers.open("bm25", CATALOG), rewards.from_spec({"mrr@10": 1.0}))
    scored = plain.score(["red", ""], ["q"] * 2, [[0]] * 2, [[1.0]] * 2)
    assert not [name for name in summary(scored, ["q"] * 2) if name.startswith("scorer/malformed/")]
    assert np.isfinite(scored.rewards).all()
