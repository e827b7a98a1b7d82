"""No secret of a recipe is in anything that is written or printed, and what was redacted reads as not set."""

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rec_r1 import cli, config, console, runs, trl_options
from rec_r1.config import UserError, overrides
from rec_r1.config.redaction import MARK, from_environment, is_secret, printable, redact, redact_text, settled
from rec_r1.pages import cards, hub, run_report
from rec_r1.similarity_gap import measure
from retrievers import registry

CANARY = "cAnary-0123456789"


@pytest.mark.parametrize(
    "name",
    [
        "hub_token", "push_to_hub_token", "token", "api_key", "apiKey", "APIKey", "apikey", "X-Api-Key", "x-auth-token",
        "Authorization", "Proxy-Authorization", "password", "db_password", "PGPASSWORD", "passwd", "pass", "secret",
        "client_secret", "CLIENT_SECRET", "credentials", "aws_secret_access_key", "private_key", "key", "access_tokens",
        "openai_api_key", "wandb_key", "auth", "bearer", "retriever.params.token", "secrets", "token_value", "cookie",
        "milvus_token", "OPENAI_API_KEY", "accessToken", "set-cookie", "passphrase",
    ],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer", "max_completion_length", "key_variable", "mask_truncated_completions", "image_token", "eos_token",
        "pad_token_id", "max_tokens", "max_completion_tokens", "tokens", "sort_key", "label_key", "public_key",
        "secretary", "monkey", "compass", "passes", "author", "token_type", "primary_key", "keyword", "authorize",
        "dollars_per_million", "tokens_per_second", "path", "user", "", "vllm_importance_sampling_correction",
    ],
)  # fmt: skip
def test_names_of_no_secrets(name):
    assert not is_secret(name)


@pytest.mark.slow
def test_of_the_trainers_options_one_is_a_secret():
    from peft import LoraConfig
    from trl import DPOConfig, GRPOConfig, SFTConfig

    kinds = [registry.backend_module(kind) for kind in registry.BACKENDS]
    classes = [GRPOConfig, SFTConfig, DPOConfig, LoraConfig, *(kind.params for kind in kinds)]
    classes += [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
    names = {field.name for cls in classes if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)}
    assert {name for name in names if is_secret(name)} == {"hub_token"}


# Where a person may write a secret, as overrides.
PLANTED = [
    f"grpo.hub_token={CANARY}",
    f"baselines.endpoint.extra={{api_key: {CANARY}, extra_headers: {{Authorization: Bearer {CANARY}}}}}",
    f"baselines.sft.hub_token={CANARY}",
    f"retriever.params.token={CANARY}",
    f"task.params={{deep: [{{password: '{CANARY} {CANARY}'}}], note: 'x-api-key=1 Bearer {CANARY}'}}",
    f"grounding.params.credentials={{user: me, secret: {CANARY}}}",
]


def planted(*more):
    return config.load("quickstart", [*PLANTED, *more])


def test_a_recipe_that_is_written_holds_no_secret_and_reads_as_one_without(tmp_path):
    recipe = planted()
    assert recipe.grpo["hub_token"] == CANARY  # in memory it is there
    text = config.dump(recipe)
    assert CANARY not in text and text.count(MARK) >= 7
    path = tmp_path / "config.yaml"
    path.write_text(text)
    again = config.load(path)
    assert "hub_token" not in again.grpo and again.baselines.endpoint.extra == {"extra_headers": {}}
    assert again.task.params["deep"] == [{}]
    assert config.comparable(again) == config.comparable(recipe)
    assert config.load(path, [PLANTED[0]]).grpo["hub_token"] == CANARY  # given again
    assert config.load(path, [f"grpo.hub_token={MARK}"]).grpo.get("hub_token") is None


@pytest.mark.parametrize(
    "override",
    [
        "format.prompt='Authorization: answer {query}'", "format.system='bearer 0123456789abcdefghij'",
        "output_dir=runs/sk-baseline-experiment1", "model.name=sk-my-long-model-name",
        "task.params={columns: {key: a}, fields: {title: 1, keys: 2}}", "rewards={my_rewards.signature: 1.0}",
        "grpo.max_completion_length=12", "retriever.params={tokenizer: words, max_tokens: 3}",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays_as_it_is(override):
    tree = {}
    overrides.apply(tree, override)
    assert redact(tree) == tree and settled(tree) == tree


@pytest.mark.parametrize(
    "line",
    [
        "api_key: zz9zzz", "x-api-key: 0123456789abcdef", "api_key = 'abc'", '"api_key": ["abc", "zz9zzz"]',
        "--password hunter2x",
        'api_key=\\"zz9zzz\\"', "https://user:pa/zz9zzz@host/x",
    ],
)  # fmt: skip
def test_what_servers_and_libraries_print(line):
    shown = redact_text(line)
    assert MARK in shown and not any(secret in shown for secret in ("zz9zzz", "0123456789abcdef", "hunter2x", "'abc'"))


@pytest.mark.parametrize(
    "line", ["write key=value, such as grpo.beta=0", "token: unknown parameter of 'bm25'", "api_key: is not set"]
)
def test_what_is_said_about_settings_stays_readable(line):
    assert redact_text(line) == line


def test_references_in_lists_are_followed(monkeypatch):
    monkeypatch.setenv("CANARY", CANARY)
    tree = {"parts": [{"params": {"token": "$CANARY"}}], "api_key": ["$CANARY"]}
    assert from_environment(tree, UserError) == {"parts": [{"params": {"token": CANARY}}], "api_key": [CANARY]}


def test_resume_does_not_stumble_over_a_secret(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text(config.dump(planted(f"output_dir={out}")))
    for recipe in (planted(f"output_dir={out}"), config.load(out / "config.yaml")):
        assert runs.prepare(recipe, resume=True) is None  # no checkpoint: from the beginning
    with pytest.raises(UserError, match="another task") as error:
        runs.prepare(planted(f"output_dir={out}", "task.params.deep=[]"), resume=True)
    assert CANARY not in str(error.value)


def test_an_older_run_is_reported_and_exported_without_its_secrets(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    plain = yaml.safe_dump(dataclasses.asdict(planted(f"output_dir={run}")))
    assert CANARY in plain
    (run / "config.yaml").write_text(plain)  # as a release wrote it that redacted nothing
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    for path in run_report.write([run], tmp_path / "page.html"):
        assert CANARY not in path.read_text() and MARK in path.read_text().replace("&lt;", "<").replace("&gt;", ">")

    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
    ):
        (run / "best" / name).write_text(CANARY if "." not in name or name.endswith(("bin", "pt", "pth")) else "{}")
    save_file({"weight": np.zeros(1, np.float32)}, run / "best" / "model.safetensors")
    (run / "best.json").write_text(json.dumps({"step": 1, "metric": "ndcg@10", "value": 0.5}))
    record = run / "evaluation" / "test" / "comparison.json"
    record.parent.mkdir(parents=True)
    empty = {"metrics": [], "reference": "trained", "tables": [], "systems": {"trained": {}}, "queries": 0}
    more = {"part": "test", "created": "2026-11-28", "changed": {}, "best_baseline": None}
    record.write_text(json.dumps(empty | more))
    monkeypatch.setattr(cards, "card", lambda *_: "card")
    folder = hub.export(run, tmp_path / "export")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "recipe.yaml", "model.safetensors", "tokenizer_config.json", "config.json",
        "generation_config.json",
    }  # fmt: skip
    assert all(CANARY.encode() not in path.read_bytes() for path in folder.iterdir())


def test_what_is_uploaded_are_the_kinds_of_files_that_belong_there(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    sent = {}

    class Hub:
        def create_repo(self, name, **_):
            return f"https://example.org/{name}"

        def upload_folder(self, folder_path, allow_patterns, **_):
            names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
            sent["names"] = {n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in allow_patterns)}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for name in ("model.safetensors", "training_args.bin", "optimizer.pt", "x.pkl", "README.md", ".env", "recipe.yaml"):
        (tmp_path / name).write_text("x")
    hub.push(tmp_path, "me/policy", True)
    assert sent["names"] == {"model.safetensors", "README.md", "recipe.yaml"}


@pytest.mark.slow
def test_the_hubs_token_goes_to_the_environment_not_into_the_trainers_options(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "before")
    import os

    args = trl_options.grpo_config(planted())
    assert args.hub_token is None and os.environ["HF_TOKEN"] == CANARY
    assert CANARY not in json.dumps(args.to_dict(), default=str)
    monkeypatch.setenv("MY_TOKEN", "from-there")
    trl_options.grpo_config(config.load("quickstart", ["grpo.hub_token=$MY_TOKEN"]))
    assert os.environ["HF_TOKEN"] == "from-there"
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(UserError, match=r"grpo\.hub_token: \$MY_TOKEN is not set"):
        trl_options.grpo_config(config.load("quickstart", ["grpo.hub_token=${MY_TOKEN}"]))


def test_a_variable_is_named_where_its_secret_would_stand(tmp_path, monkeypatch):
    recipe = config.load("quickstart", ["baselines.endpoint.extra.api_key=$MY_KEY", "task.params.token=$MY_KEY"])
    text = config.dump(recipe)
    assert text.count("$MY_KEY") == 2 and MARK not in text  # it is no secret, and works again when it is read


@pytest.mark.parametrize(
    "override",
    [
        f"baselines.endpoint.url=https://me:{CANARY}@example.org/v1",
        f"baselines.endpoint.url=https://{CANARY}@example.org/v1",
        f"retriever.params={{url: 'http://example.org?api_key={CANARY}'}}",
        f"retriever.params.uri=https://me:{CANARY}@milvus:19530",
        f"retriever.params.url=postgresql://me:{CANARY}@host/shop",
        f"retriever.params.url=postgresql://host/shop?user=me&password={CANARY}",
        f"task.path=s3://id:{CANARY}@bucket/x",
        f"grpo.vllm_server_base_url=http://u:{CANARY}@host:8000",
        f"task.params.mirrors=['https://ok.org', 'https://x.org/a?sig={CANARY}&b=1']",
    ],
)
def test_urls_with_passwords_are_refused_and_not_repeated(override, capsys):
    assert cli.main(["check", "quickstart", override]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and CANARY not in message
    assert override.partition("=")[0].split(".")[0] in message and "environment" in message


def test_urls_without_passwords_are_taken():
    urls = ["https://example.org:8000/v1", "https://x.org/a@b", "http://x.org/?tokens=1&page=2", "git://x.org/@scope"]
    for url in urls:
        assert config.load("quickstart", [f"baselines.endpoint.url={url}"]).baselines.endpoint.url == url
        assert redact(url) == url


@pytest.mark.parametrize("url", [f"https://{CANARY}@host/x", f"git+https://{CANARY}@host/x", f"a://me:{CANARY}@host"])
def test_a_token_of_the_web_and_a_password_are_hidden(url):
    assert CANARY not in redact(url) and CANARY not in redact_text(f"cannot clone {url}: refused")


@pytest.mark.parametrize("url", ["postgresql://me@host:5432/shop", "postgres://me@host/shop", "ssh://me@host/shop"])
def test_the_user_of_a_database_stays_in_the_file_of_a_run(url, tmp_path):
    recipe = config.load("quickstart", ["retriever.kind=postgres", f"retriever.params.url={url}"])
    (tmp_path / "config.yaml").write_text(config.dump(recipe))
    assert config.load(tmp_path / "config.yaml").retriever.params["url"] == url
    assert redact_text(f"no connection to {url}") == f"no connection to {url}"
    assert redact(url.replace("me@", f"me:{CANARY}@")) == url.replace("me@", f"{MARK}@")


@pytest.mark.parametrize(
    "override",
    [
        f"seed={{token: {CANARY}}}", f"grpo={{hub_token: {CANARY}", f"grpo={{hub_tokn: 1, hub_token: {CANARY}}}",
        f"grpo.hub_token.x.y={CANARY}", f"baselines.endpoint.extra=[{{api_key: {CANARY}}}]", f"hub_token={CANARY}",
        f"lora='{{password: {CANARY}}}'", f"baselines.endpoint={{api_key: {CANARY}}}", f"grpo.hub_token=*{CANARY}",
    ],
)  # fmt: skip
def test_messages_do_not_repeat_what_they_refuse(override, capsys):
    for verb in ("check", "train"):
        if override.startswith("grpo={hub_tokn") or "x.y" in override:
            continue
        assert cli.main([verb, "quickstart", override]) == 2
        message = capsys.readouterr().err
        assert CANARY not in message and message.count("\n") == 1


def test_a_broken_file_is_not_quoted(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"grpo:\n  hub_token: '{CANARY}\n")
    assert cli.main(["check", str(path)]) == 2
    assert CANARY not in capsys.readouterr().err
    path.write_text(f"grpo:\n  hub_token: *{CANARY}\n")
    assert cli.main(["check", str(path)]) == 2
    assert CANARY not in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://me:{CANARY}@example.org failed", f"url ?api_key={CANARY}&x=1", f"{{'api_key': '{CANARY}'}}",
        f'{{"token": "{CANARY}"}}', f"hub_token={CANARY}", f"Authorization: Bearer {CANARY}", "key hf_" + "a1" * 12,
        f"bearer {CANARY}", f"{{password: {CANARY}, a: b}}", "sk-" + "a1B2" * 6, f"password='{CANARY} x'",
    ],
)  # fmt: skip
def test_messages_of_others_are_cleaned(text, capsys):
    console.complain(text)
    handler = logging.StreamHandler()
    handler.setFormatter(console._Plain("%(message)s"))
    logged = handler.format(logging.LogRecord("x", 30, "", 1, "it said: %s", (text,), None))
    for shown in (redact_text(text), capsys.readouterr().err, logged):
        assert CANARY not in shown and "a1a1" not in shown and "a1B2" not in shown and MARK in shown


def test_messages_without_secrets_stay_as_they_are():
    for text in (
        "wrong or missing token: set $REC_R1_TOKEN to what the server was started with", "max_tokens=5, eos_token=x",
        "override 'format.prompt=question: {query}': write it in quotes", "a bearer of news", "key: value", "a@b://c",
        "https://example.org/a?page=2#x", "12:30 step=5 reward=0.5", "the key in $OPENAI_API_KEY, which is not set",
    ):  # fmt: skip
        assert redact_text(text) == text and printable(text) == text


def test_prompts_stay_as_they_are():
    prompt = "The token={query}; 'key': 'x'\nAnswer with a password: {answer}"
    assert redact({"prompt": prompt}) == {"prompt": prompt}


@given(st.text("ab:/@=?&'\"{}, \n$<>", max_size=30))
def test_redacting_twice_is_redacting_once(text):
    assert redact_text(redact_text(text)) == redact_text(text) or MARK in redact_text(text)
    assert settled(settled({"x": text, "token": text})) == settled({"x": text, "token": text})


def test_terminal_escapes_do_not_reach_the_terminal(capsys):
    evil = "\x1b[2J\x1b]0;title\x07no\x1b[31m red\x9b1m\u202e\x08\r\nnext"
    console.complain(evil)
    shown = capsys.readouterr().err
    assert shown == "rec-r1: no red1m next\n"
    formatted = console._Plain("%(message)s").format(logging.LogRecord("x", 30, "", 1, evil, (), None))
    assert re.fullmatch(r"[ -~\n]*", formatted) and "red" in formatted


def test_the_gaps_page_shows_no_secret():
    from rec_r1.similarity_gap.systems import Wanted, wanted_systems

    recipe = config.load("quickstart")
    (*_, system), _ = wanted_systems(recipe, [f"bm25 {{token: {CANARY}}}"], [])
    listed = np.ones(1)
    assert CANARY not in json.dumps(measure._described(system, object(), listed)) and system.params["token"] == CANARY
    assert measure._described(Wanted("a", "b", {"k1": 1}, "words"), object(), listed)["params"] == {"k1": 1}
