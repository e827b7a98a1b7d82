"""`rec-r1 fit --write`: what a model is asked, what is kept of its completions, and a fit with them."""

import json

import pytest
from datasets_ import plain_folder
from test_endpoint import running, server, usual  # noqa: F401

from rec_r1 import cli, config, tasks
from rec_r1.config import UserError
from rec_r1.generation import written_negatives as module
from rec_r1.generation.written_negatives import parsed, prompt, write
from retrievers.text.tuning import job, train, written
from retrievers.text.tuning.settings import Tuned


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asking(path, *more, count=1, tuned="epochs: 1, positives: 1, max_tokens: 8") -> list[str]:
    """The settings of a recipe whose encoder reads ``path``."""
    given = f"{{{tuned}, written: {count}, written_file: '{path}'}}"
    return ["retriever.kind=dense", f"retriever.params={{device: cpu, tuned: {given}}}", *more]


def loaded(*settings, name="quickstart"):
    recipe = config.load(name, list(settings))
    return recipe, tasks.load(recipe.task)


# ---- One completion


@pytest.mark.parametrize(
    ("completion", "count", "negatives", "problem"),
    [
        ("a snake\nand more", 1, ["a snake"], None),
        ('1. "a snake"\n- a sock\n\n3) “a ring”', 3, ["a snake", "a sock", "a ring"], None),
        ("a snake\na sock", 3, ["a snake", "a sock"], None),
        ("", 1, [], "empty"),
        (" \n\n", 1, [], "empty"),
        ("?!\n...", 1, [], "malformed"),
        ("Search query: hose\nA relevant document: garden hose", 1, [], "malformed"),
        ("search query: HOSE\na snake", 1, ["a snake"], None),
        ("a \ud83d snake", 1, ["a ? snake"], None),
    ],
)
def test_every_line_with_a_word_is_a_text_unless_it_repeats_the_prompt(completion, count, negatives, problem):
    shown = prompt("judgments", "hose", "garden hose", count, chat=False)
    found = parsed(completion, shown, count)
    assert (found["negatives"], found["problem"]) == (negatives, problem)
    assert found["completion"] == completion.replace("\ud83d", "?")


def test_prompts_name_the_query_the_document_and_how_to_answer():
    single = prompt("interactions", "tent {x}", "sleeping bag", 1, chat=True)
    assert single[0]["content"].startswith("A customer chose: tent {x}\nThe same customer then chose: sleeping bag\n")
    assert "Write another item" in single[0]["content"] and "one line and nothing else" in single[0]["content"]
    several = prompt("judgments", "tent", "word " * 100, 4, chat=False)
    assert "Write 4 other documents" in several and "4 lines, one text a line" in several
    assert several.count("word ") == module.SHOWN_WORDS - 1


# ---- The local model


@pytest.fixture
def small(tiny_model) -> list[str]:
    return [f"model.name={tiny_model}", "lora=null", "model.dtype=float32", "evaluation.batch_size=4"]


@pytest.mark.slow
def test_an_interrupted_call_continues_and_nothing_is_written_twice(small, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    recipe, task = loaded(*asking(whole, *small))
    (said,) = write(recipe, task, "policy", 20)
    rows = rows_of(whole)
    assert said.startswith(f"{whole}: 20 of 336 pairs of query and document; 20 completions by ") and len(rows) == 20
    relevant = {(q, task.catalog.ids[r]) for q, rs in zip(task.train.queries, task.train.rows, strict=True) for r in rs}
    assert {(row["query"], row["positive"]) for row in rows} <= relevant  # And none of validation or test.
    assert all(set(row) == {"query", "positive", "negatives", "completion", "problem", "by"} for row in rows)

    real, calls = module.generate, []

    def interrupted(*given):
        calls.append(len(given[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    recipe, _ = loaded(*asking(cut, *small))
    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(recipe, task, "policy", 20)
    assert rows_of(cut) == rows[:8] and calls == [4, 4, 4]
    write(recipe, task, "policy", 20)
    assert rows_of(cut) == rows and sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "generate", lambda *_: pytest.fail("written again"))
        assert write(recipe, task, "policy", 20)[0].endswith("; nothing was missing")
    other, _ = loaded(
        *asking(tmp_path / "other.jsonl", *small, tuned="epochs: 1, positives: 1, max_tokens: 8, seed: 1")
    )
    write(other, task, "policy", 20)
    assert rows_of(tmp_path / "other.jsonl") != rows


@pytest.mark.slow
def test_fit_writes_and_tunes_in_one_command(small, tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_run", lambda folder, device: train.run(folder))
    folder, path = plain_folder(tmp_path / "shop"), tmp_path / "n.jsonl"
    settings = [f"task.path={folder}", *asking(path, *small), f"retriever.params.model={tiny_encoder}"]
    for verb in ("fit", "check", "index"):  # Without the file, each of their messages names the command that writes it.
        assert cli.main([verb, "cpu/sequential", *settings, "task.params.fit_share=0.5"]) == 2
        message = f"rec-r1: retriever.params.tuned.written_file: {path} does not exist: `rec-r1 fit RECIPE --write "
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(message)
    monkeypatch.setattr(module, "generate", lambda m, t, prompts, *_: [f"text {i}" for i in range(len(prompts))])
    assert cli.main(["fit", "cpu/sequential", *settings, "--write", "policy", "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 4 of 6 pairs" in out and '"probe": {"auc": null' in out
    rows = rows_of(path)
    assert len(rows) == 4 and written.read(path).keys() == {(row["query"], row["positive"]) for row in rows}
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("tuned again"))
    assert cli.main(["fit", "cpu/sequential", *settings]) == 0
    with pytest.raises(pytest.fail.Exception, match="tuned again"):  # Another content is another index.
        cli.main(["fit", "cpu/sequential", *settings, "--write", "policy", "--limit", "5"])
    assert rows_of(path)[:4] == rows and len(rows_of(path)) == 5


# ---- An endpoint


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_an_endpoint_writes_and_its_completions_are_kept(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REC_R1_CACHE", str(tmp_path / "cache"))
    server.play = lambda number, body: usual(body, f"1. text {number}\n2. text {number}b\n3. no")
    ours = [f"baselines.endpoint.url={server.url}", "baselines.endpoint.model=m1", "format.chat=true"]
    path = tmp_path / "n.jsonl"
    path.write_text('{"query": "by hand", "positive": "x", "negatives": []}')  # Without a line feed.
    recipe, task = loaded(*asking(path, *ours, count=2))
    (said,) = write(recipe, task, "endpoint", 5)
    first, *rows = rows_of(path)
    assert first["query"] == "by hand" and said.endswith("; 5 completions by m1 (0 empty, 0 malformed)")
    assert all(len(row["negatives"]) == 2 and row["by"] == "m1" for row in rows) and len(rows) == 5
    bodies = [body for _, _, body in server.seen]
    assert {body["max_tokens"] for body in bodies} == {16} and {body["temperature"] for body in bodies} == {0.0}
    assert all("Write 2 other documents" in body["messages"][0]["content"] for body in bodies)
    write(recipe, task, "endpoint", 7)
    assert rows_of(path)[:6] == [first, *rows] and len(server.seen) == 7


@pytest.mark.slow
@pytest.mark.usefixtures("running")
def test_fits_with_other_seeds_have_other_pairs_which_are_written_too(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("REC_R1_CACHE", str(tmp_path / "cache"))
    ours = [f"baselines.endpoint.url={server.url}", "baselines.endpoint.model=m1", "format.chat=true"]
    settings = [f"task.path={plain_folder(tmp_path / 'shop')}", *asking(tmp_path / "n.jsonl", *ours)]
    recipe, task = loaded(*settings, name="cpu/sequential")
    own = [
        set(written.keys_of(job.pairs_of(Tuned(epochs=1, positives=1, seed=seed), task.interactions, task.catalog),
                            task.catalog.ids))
        for seed in (0, 1)
    ]  # fmt: skip
    assert own[0] - own[1] and own[1] - own[0]
    write(recipe, task, "endpoint", None, range(2))
    assert set(written.read(tmp_path / "n.jsonl")) == own[0] | own[1]
    few = tmp_path / "few.jsonl"
    recipe, _ = loaded(f"task.path={tmp_path / 'shop'}", *asking(few, *ours), name="cpu/sequential")
    write(recipe, task, "endpoint", 3, range(2))
    before = set(written.read(few))
    (said,) = write(recipe, task, "endpoint", 4)  # The limit counts what is there, whichever fit it was written for.
    assert (
        len(set(written.read(few)) & own[0]) == 4
        and before <= set(written.read(few))
        and f": 4 of {len(own[0])} " in said
    )
    assert all(body["messages"][0]["content"].startswith("A customer chose: title ") for _, _, body in server.seen)


# ---- What is refused


@pytest.mark.parametrize(
    ("settings", "by", "limit", "message"),
    [
        ([], "policy", None, "--write: no encoder of this recipe reads written negatives: set retriever.kind=dense"),
        (["retriever.kind=dense"], "policy", None, "no encoder of this recipe reads written negatives"),
        (asking("n.jsonl"), "me", None, "--write me: choose from policy, endpoint"),
        (asking("n.jsonl"), "policy", 0, "--limit must be at least 1, got 0"),
        (asking("nowhere/n.jsonl"), "policy", None, "the folder nowhere does not exist: make it first"),
        (asking("n.jsonl"), "endpoint", None, r"baselines\.endpoint\.model: not set"),
        (asking("n.jsonl", tuned="on: interactions"), "policy", None, "tuned on interactions, but there are none"),
        (asking("README.md"), "policy", None, "README.md: line 1 is no JSON"),
    ],
)
def test_what_cannot_be_written_is_refused(settings, by, limit, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("# A page")
    recipe, task = loaded(*settings)
    with pytest.raises(UserError, match=message):
        write(recipe, task, by, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# A page"


def test_a_limit_without_a_writer_is_refused(capsys):
    assert cli.main(["fit", "quickstart", "--limit", "3"]) == 2
    assert "--limit: nothing reads it without --write" in capsys.readouterr().err


def test_a_file_that_another_process_writes_is_refused(tmp_path):
    from filelock import FileLock

    recipe, task = loaded(*asking(tmp_path / "n.jsonl"))
    with FileLock(tmp_path / ".n.jsonl.lock"), pytest.raises(UserError, match=r"another process is writing .*n\.jsonl"):
        write(recipe, task, "policy", 1)
