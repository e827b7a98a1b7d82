"""`rec-r1 ask`: where queries come from, what is refused, and how answers are shown and written."""

import io
import json

import pytest
from test_endpoint import running, server  # noqa: F401

from rec_r1 import Policy, UserError, cli
from rec_r1.policy import Answer, Hit, ask
from rec_r1.policy.ask import Questions, questions
from rec_r1.prompts import ENDS, up_to_end

NOTHING = io.StringIO("")


def test_queries_and_histories_of_the_command_line():
    assert questions(["lecturer", "rain"], [], None, NOTHING) == Questions(["lecturer", "rain"], None)
    assert questions(["shoes"], ["a, b"], None, NOTHING) == Questions(["shoes"], [["a", "b"]])
    assert questions([], ["a,b", "c"], None, NOTHING) == Questions(None, [["a", "b"], ["c"]])


@pytest.mark.parametrize("given", [[], ["-"]])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lecturer\n\n rain \n", Questions(["lecturer", "rain"], None)),
        ('{"query": "a"}\n{"query": "b"}\n', Questions(["a", "b"], None)),
        ('{"query": "a", "history": ["x", 7]}', Questions(["a"], [["x", "7"]])),
        ('{"history": "x,y"}', Questions(None, [["x", "y"]])),
    ],
)
def test_stdin_holds_lines_or_json(given, text, expected):
    assert questions(given, [], None, io.StringIO(text)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("q.txt", "red shoes\n\nhose\n"),
        ("q.jsonl", '{"query": "red shoes"}\n{"query": "hose"}\n'),
        ("q.csv", 'id,query\n1,"red shoes"\n2,hose\n'),
        ("q.tsv", "query\nred shoes\nhose\n"),
    ],
)
def test_a_file_of_queries(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert questions([], [], tmp_path / name, NOTHING) == Questions(["red shoes", "hose"], None)


def test_a_csv_file_of_histories(tmp_path):
    (tmp_path / "h.csv").write_text('history\n"x,y"\nz\n', encoding="utf-8")
    assert questions([], [], tmp_path / "h.csv", NOTHING) == Questions(None, [["x", "y"], ["z"]])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "no such file: write one query a line"),
        ("q.txt", "\n  \n", "no query in it: write one query a line"),
        ("q.jsonl", "", "no query in it"),
        ("q.jsonl", '{"query": "a"}\n{"text": "b"}\n', r"q\.jsonl:2: it has neither query nor history, and the first"),
        ("q.jsonl", '{"query": "a"}\n{"query": "b", "history": ["x"]}\n', "it has query and history, and the first"),
        ("q.jsonl", '{"query": 3}\n', r"q\.jsonl:1: query 3 is no text"),
        ("q.jsonl", "{broken\n", r"q\.jsonl:1: not valid JSON"),
        ("q.jsonl", '{"query": "half \\ud83d"}\n', r"q\.jsonl:1: half a character"),
        ("q.json", '[{"query": "a"}, {"query": "half \\uDE00"}]', r"q\.json: entry 2: half a character"),
        ("q.json", "[" * 100_000, r"q\.json: not valid JSON"),
        ("q.jsonl", '{"history": {"a": 1}}\n', "history {'a': 1}: give ids of the catalogue"),
        ("q.jsonl", '{"history": ["x", ""]}\n', "give ids of the catalogue, oldest first"),
        ("q.csv", "text\nshoes\n", r"q\.csv:2: it has neither query nor history"),
    ],
)
def test_a_file_that_cannot_be_asked(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        questions([], [], tmp_path / name, NOTHING)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_what_cannot_be_combined_is_refused(tmp_path):
    with pytest.raises(UserError, match="leave the queries and --history out, or the file"):
        questions(["a"], [], tmp_path / "q.txt", NOTHING)
    with pytest.raises(UserError, match="stdin: no query in it"):
        questions([], [], None, NOTHING)
    with pytest.raises(UserError, match="--endpoint and --model belong together"):
        ask.open_policy(tmp_path, True, "http://localhost:1/v1")
    with pytest.raises(UserError, match="--untrained: the endpoint decides"):
        ask.open_policy(tmp_path, False, "http://localhost:1/v1", "m")
    with pytest.raises(UserError, match="--k 0: give at least 1 hit"):
        ask.check(0, None)
    with pytest.raises(UserError, match=r"give a name that ends in \.jsonl"):
        ask.check(1, tmp_path / "answers.csv")


def test_the_table_and_the_json_of_answers():
    hits = (Hit("d1", "A\x1b[31m red\nshoe", 0), Hit("d2", "hose", 1))
    answers = [Answer("sneakers", "red shoe", "sneakers red shoe", False, hits), Answer("x", "", "x", True)]
    assert ask.table(answers).splitlines() == [
        "query       sneakers",
        "completion  red shoe",
        "sent        sneakers red shoe",
        "rank  title  [id]",
        "   1  A red shoe  [d1]",
        "   2  hose  [d2]",
        "",
        "query       x",
        "completion  ",
        "sent        x  (malformed, so the raw query)",
        "no hits",
    ]
    first, second = map(json.loads, ask.jsonl(answers).splitlines())
    assert first["hits"] == [
        {"id": "d1", "title": hits[0].title, "rank": 1},
        {"id": "d2", "title": "hose", "rank": 2},
    ]
    assert second == {"query": "x", "completion": "", "sent": "x", "malformed": True, "hits": []}


@pytest.mark.parametrize(
    ("end", "text", "kept"),
    [
        ("line", "\n - \nred shoes\nmore", "\n - \nred shoes\n"),
        ("line", "red shoes", "red shoes"),
        ("first line", "\nred", "\n"),
        ("numbers", "Sure:\n3, 1\n2", "Sure:\n3, 1\n"),
        ("tag", "<answer>{}</answer> I hope </answer>", "<answer>{}</answer>"),
        ("tag", "<answer>", "<answer>"),
        (None, "a\nb\n", "a\nb\n"),
    ],
)
def test_a_completion_of_a_server_ends_where_a_policy_stops(end, text, kept):
    assert up_to_end(text, end) == kept
    if end is not None and kept != text:  # no shorter text holds the action
        assert ENDS[end](kept) and not any(ENDS[end](text[:place]) for place in range(len(kept)))


@pytest.mark.slow
def test_the_command_asks_a_run(lora_run, tmp_path, capsys):
    policy = Policy.load(lora_run)
    (expected,) = policy.search(["birthday"], k=2)
    assert cli.main(["ask", str(lora_run), "--k", "2", "birthday"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "query       birthday" and shown == ask.table([expected]) + "\n"
    assert cli.main(["ask", str(lora_run), "birthday", "--json", "--k", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == ask.row(expected)
    output = tmp_path / "out.jsonl"
    assert cli.main(["ask", str(lora_run), "birthday", "rain", "--untrained", "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"2 answers in {output}\n"
    untrained = Policy.load(lora_run, trained=False).search(["birthday", "rain"])
    assert list(map(json.loads, output.read_text(encoding="utf-8").splitlines())) == list(map(ask.row, untrained))
    assert untrained[0].completion != expected.completion


@pytest.mark.slow
def test_a_mistake_is_one_line(lora_run, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    for words, message in [
        ([str(tmp_path), "x"], "not a run (no config.yaml): give the output_dir of a training"),
        ([str(lora_run), "--file", str(tmp_path / "empty.txt")], "no query in it: write one query a line"),
        ([str(lora_run), "x", "--history", "a,b"], "has no histories: leave histories out"),
    ]:
        assert cli.main(["ask", *words]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("rec-r1: ") and message in said


@pytest.mark.slow
def test_a_query_that_no_tokenizer_takes_is_refused_by_its_number(lora_run, capsys):
    """An argument of the command line that is not in UTF-8 has such characters, too."""
    assert cli.main(["ask", str(lora_run), "rain", "half \udcff"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rec-r1: query 2: 'half \\udcff' is no valid text") and said.endswith("write it in UTF-8")
    policy = Policy.load(lora_run)
    for call in (policy.rewrite, policy.search, policy.complete):
        with pytest.raises(UserError, match=r"query 1: .* is no valid text"):
            call(["\ud83d", "rain"])
        for nothing in (None, float("nan")):  # as of an empty cell of a table
            with pytest.raises(UserError, match=f"query 2: {nothing!r} is no text: give a list of texts"):
                call(["rain", nothing])
    assert [answer.query for answer in policy.search(["nul \0", "😀", ""], k=1)] == ["nul \0", "😀", ""]


@pytest.mark.slow
def test_an_endpoint_completes_the_very_prompts_of_the_run(lora_run, server):  # noqa: F811
    policy = ask.open_policy(lora_run, True, server.url, "mine")
    (answer,) = ask.ask(policy, Questions(["birthday"], None), 3)
    ((path, _, body),) = server.seen
    assert path == "/v1/completions" and [body["prompt"]] == policy.prompts(["birthday"])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("mine", 0.0, 6)
    assert answer.completion == body["prompt"].upper().partition("\n")[0] + "\n" and len(answer.hits) == 3
