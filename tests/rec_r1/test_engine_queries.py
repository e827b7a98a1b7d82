"""The query of an engine is kept in every file as it was written, also where a field has the name of a secret."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from runs_ import INFO

from rec_r1 import cli, config, runs, tasks
from rec_r1.baselines.same_run import check_same_run
from rec_r1.config import UserError
from rec_r1.config.redaction import LITERAL, MARK, from_environment, redact, settled
from rec_r1.environment import cached_index
from rec_r1.runs import run_config
from retrievers import registry

CANARY = "cAnary-0123456789"
FILTER = [
    {"term": {"token": "x"}},
    {"terms": {"password": ["hunter2", "Bearer of news"]}},
    {"term": {"key": "$HOME"}},
    {"prefix": {"path": "/docs/a"}},
    {"term": {"model": "bm25"}},
    {"bool": {"filter": [{"term": {"api_key": 12}}, {"range": {"secret.level": {"gte": 2, "lt": 3.5}}}]}},
]
TEMPLATE = {"bool": {"must": [{"match": {"auth": "{query}"}}], "should": [{"match": {"pretrained": "{query}"}}]}}
OPENSEARCH = {"index": "shop", "filter": FILTER, "template": TEMPLATE}
INNER = {"kind": "opensearch", "params": OPENSEARCH}
NESTINGS = {
    "retriever": ("retriever", INNER),
    "other name": ("retriever", {"kind": "elasticsearch", "params": OPENSEARCH}),
    "in a fusion": ("retriever", {"kind": "hybrid", "params": {"retrievers": [{"kind": "bm25"}, INNER]}}),
    "in a reranker": ("retriever", {"kind": "rerank", "params": {"retriever": INNER}}),
    "for titles": ("grounding", INNER),
    "fields": ("retriever", {"kind": "postgres", "params": {"fields": {"token": "A", "password": "D"}}}),
    "weights": ("retriever", {"kind": "bm25", "params": {"fields": {"password": 3, "text": 1}}}),
}


def load(section: str, given: dict[str, Any], *more: str) -> config.Recipe:
    values = [f"{section}.{key}={json.dumps(value)}" for key, value in given.items()]
    return config.load("quickstart", [*values, *more])


@pytest.mark.parametrize("name", NESTINGS)
def test_the_file_of_a_run_has_the_query_as_it_was_written(name, tmp_path, monkeypatch):
    section, given = NESTINGS[name]
    monkeypatch.chdir(tmp_path)
    Path("bm25").mkdir()  # The value of a field may be the name of a file.
    recipe = run_config.absolute(load(section, given, "output_dir=run", f"task.params.token={CANARY}"))
    text = config.dump(recipe)
    assert CANARY not in text and MARK in text
    (tmp_path / "config.yaml").write_text(text)
    again = config.load(tmp_path / "config.yaml")
    assert getattr(again, section).params == given["params"] == getattr(recipe, section).params
    assert config.comparable(again) == config.comparable(recipe)
    assert from_environment(given, UserError, section) == given  # $HOME is a text here.


def test_secrets_beside_a_query_are_hidden():
    params = {**OPENSEARCH, "token": CANARY, "headers": {"Authorization": f"Bearer {CANARY}"}}
    hidden = redact({"kind": "opensearch", "params": params})
    assert CANARY not in json.dumps(hidden) and hidden["params"]["filter"] == FILTER
    # The same names of parameters may hold secrets where nothing says that they are the query of an engine.
    for tree in ({"filter": {"token": CANARY}}, {"kind": "my.shop", "params": {"filter": {"token": CANARY}}}):
        assert CANARY not in json.dumps(redact(tree)) and settled(tree) != tree


def test_a_grade_and_a_field_that_are_called_as_secrets_are(tmp_path):
    recipe = config.load("quickstart", ["task.name=catalog", "task.params.grades={pass: 1, fail: 0}"])
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    assert config.load(tmp_path / "config.yaml").task.params["grades"] == {"pass": 1, "fail": 0}


@pytest.mark.parametrize("kind", sorted(registry.BACKENDS))
def test_every_mapping_of_a_backend_is_literal_or_made_of_settings(kind):
    """A parameter that is added later is listed in LITERAL if the user chooses its keys."""
    settings = {"index", "search", "rm3", "weights", "tuned", "retrievers", "retriever", "backend", "text"}
    params = registry.backend_module(kind).params
    hints = get_type_hints(params) if params is not None and dataclasses.is_dataclass(params) else {}
    mappings = {name for name, hint in hints.items() if any(word in str(hint) for word in ("dict[", "Mapping["))}
    assert mappings - settings == set(LITERAL.get(kind, ())), kind


def test_indexes_with_other_queries_have_other_folders():
    task = tasks.load(config.load("quickstart").task)
    filters = [[{"term": {"token": value}}] for value in ("a", "b")]
    folders = {cached_index(task, "opensearch", {"index": "shop", "filter": one}) for one in filters}
    weights = {cached_index(task, "bm25", {"fields": {"password": weight}}) for weight in (1, 2)}
    assert len(folders) == len(weights) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{term: {note: hf_a1a1a1a1a1a1a1a1a1a1a1a1}}]", r"filter\[0\]\.term\.note holds an access key"),
        ("[{term: {note: 'Authorization: Bearer a1a1a1a1a1a1a1a1a1'}}]", "holds an access key"),
        (f"[{{term: {{note: 'https://me:{CANARY}@host/x'}}}}]", "is a URL with a user, password or key"),
        ("[{term: {token: <redacted>}}]", r"filter\[0\]\.term\.token is <redacted>, which stands for a value"),
        ("[{term: {sizes: !!set {s, m}}}]", r"filter\[0\]\.term\.sizes is of type set, which JSON does not have"),
        ("[{term: {7: x}}]", r"filter\[0\]\.term: the key 7 is no text: write it in quotes"),
        ("[{term: {true: x}}]", r"filter\[0\]\.term: the key True is no text"),
        ("[{term: {icon: !!binary aGk=}}]", r"filter\[0\]\.term\.icon is of type bytes"),
        ("[{range: {price: {gte: .inf}}}]", r"filter\[0\]\.range\.price\.gte is NaN or infinite"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_what_cannot_be_sent_or_kept_is_refused(verb, value, message, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: quickstart\nretriever: {{kind: opensearch, params: {{index: shop, filter: {value}}}}}\n")
    assert cli.main([verb, str(recipe), f"output_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rec-r1: {recipe}: retriever.params.filter") and said.count("\n") == 1
    assert CANARY not in said and "a1a1a1" not in said
    assert re.search(message, said)


def test_a_server_may_be_moved_and_a_query_may_not_change_on_resume(tmp_path):
    fused = {"kind": "hybrid", "params": {"retrievers": [{"kind": "bm25"}, INNER]}}
    recipe = load("retriever", fused, f"output_dir={tmp_path}")
    runs.begin(recipe, 0, INFO)
    moved = {**OPENSEARCH, "url": "http://other:9200", "timeout": 5.0, "batch_size": 7}
    now = {"kind": "hybrid", "params": {"retrievers": [{"kind": "bm25"}, {**INNER, "params": moved}]}}
    runs.prepare(load("retriever", now, f"output_dir={tmp_path}"), resume=True)
    check_same_run(load("retriever", now, f"output_dir={tmp_path}"), "random")
    # The fields of a query may have the names of settings that may change.
    changes = ({"template": {"match": {"url": "{query}"}}}, {"filter": [{"term": {"token": "y"}}]}, {"index": "shop2"})
    for change in changes:
        other = {**INNER, "params": {**OPENSEARCH, **change}}
        again = {"kind": "hybrid", "params": {"retrievers": [{"kind": "bm25"}, other]}}
        message = rf"retriever\.params\.retrievers\[1\]\.params\.{next(iter(change))}"
        with pytest.raises(UserError, match=f"started with another {message} "):
            runs.prepare(load("retriever", again, f"output_dir={tmp_path}"), resume=True)
        with pytest.raises(UserError, match=message):
            check_same_run(load("retriever", again, f"output_dir={tmp_path}"), "random")


def test_a_field_called_as_a_setting_is_no_setting(tmp_path):
    one, other = ({"params": {"params": {"url": text}}} for text in ("{query}", "{query} x"))
    recipe = load("retriever", {"kind": "opensearch", "params": {"template": one}}, f"output_dir={tmp_path}")
    runs.begin(recipe, 0, INFO)
    changed = load("retriever", {"kind": "opensearch", "params": {"template": other}}, f"output_dir={tmp_path}")
    with pytest.raises(UserError, match=r"started with another retriever\.params\.template "):
        runs.prepare(changed, resume=True)
