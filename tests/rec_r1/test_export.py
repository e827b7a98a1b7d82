"""`rec-r1 export`: one model that answers as the adapter does, a Modelfile, and what is refused."""

import json
import re

import pytest

from rec_r1 import Policy, UserError, cli, config
from rec_r1.policy import export, modelfile
from rec_r1.policy.modelfile import chat_parts

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
TURNS = (  # as Gemma: no role for the system, and another name for the assistant
    "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}<turn>model\n"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
LAST_ONLY = "{{ messages[-1]['content'] }}"


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def played(template, messages):
    """What Ollama makes of a template: the few forms of Go's text/template that we write."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    head, loop = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)", template, re.DOTALL).groups()
    said, default = re.fullmatch(r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", head, re.DOTALL).groups()
    body, end = re.fullmatch(r"(.*)\{\{ end \}\}\{\{ end \}\}(.*)", loop, re.DOTALL).groups()
    user, assistant = re.fullmatch(
        r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)', body, re.DOTALL
    ).groups()
    told = said.replace("{{ .System }}", system) if system else default
    for message in messages:
        if message["role"] != "system":
            told += (user if message["role"] == "user" else assistant).replace("{{ .Content }}", message["content"])
    return (told + end).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize("template", [CHATML, PLAIN, TURNS])
def test_a_template_of_ollama_renders_as_the_model_s_own(tokenizer, template):
    tokenizer.chat_template = template
    tokenizer.bos_token = "<bos>"
    parts = chat_parts(tokenizer, {})
    user, answer = {"role": "user", "content": "Rewrite: tea ☕"}, {"role": "assistant", "content": "green tea"}
    system = {"role": "system", "content": "Be brief."}
    for messages in ([user], [system, user], [user, answer, user, answer, user], [system, user, answer, user]):
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert parts.render(messages) == own
        assert played(parts.ollama(), messages) == own


@pytest.mark.parametrize("template", [NO_SYSTEM, LAST_ONLY])
def test_a_template_that_does_more_is_left_out_with_a_warning(tokenizer, template, caplog):
    tokenizer.chat_template = template
    recipe = config.load("quickstart", ["format.chat=true"])
    text = modelfile.text(recipe, tokenizer, tokenizer.eos_token_id, ".", 2048)
    assert "TEMPLATE" not in text and "cannot be written as Ollama's" in caplog.text


def test_the_modelfile_writes_as_the_recipe_says(tokenizer):
    settings = ["grpo.max_completion_length=24", "grpo.repetition_penalty=1.2", "format.chat=true"]
    recipe = config.load("quickstart", settings)
    lines = modelfile.text(recipe, tokenizer, [tokenizer.eos_token_id], "./policy.gguf", 2048).splitlines()
    assert lines[:6] == [
        "FROM ./policy.gguf", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.2", "PARAMETER num_predict 24",
        "PARAMETER num_ctx 2048", 'PARAMETER stop "<eos>"',
    ]  # fmt: skip
    assert lines[6].startswith('TEMPLATE """{{ if .System }}')
    plain = config.load("quickstart", ["format.chat=false"])
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile.text(plain, tokenizer, None, ".", None)


def test_a_converter_that_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"is not on PATH: git clone .*llama\.cpp, then add --converter"):
        export.find_converter(None)
    with pytest.raises(UserError, match="no such file: git clone"):
        export.find_converter(tmp_path / "x.py")
    tool = tmp_path / export.CONVERTER
    tool.write_text("raise SystemExit('no such architecture')")
    tool.chmod(0o755)
    assert export.find_converter(None) == tool
    with pytest.raises(UserError, match=r"it fails \(no such architecture\)"):
        export.convert(tool, tmp_path, tmp_path / "policy.gguf", "f32")


@pytest.mark.slow
def test_a_merged_model_answers_as_the_adapter(lora_run, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "merged"
    assert cli.main(["export", str(lora_run), "--folder", str(folder)]) == 0
    assert f"in {folder}" in capsys.readouterr().out.splitlines()[0]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "Modelfile"} <= names
    assert not [name for name in names if name.startswith(("adapter", ".")) or name.endswith((".bin", ".pt", ".pkl"))]
    assert "library_name: transformers" in (folder / "README.md").read_text()
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 6 and settings["do_sample"] is False

    policy = Policy.load(lora_run)
    queries = policy.env.task.test.queries
    expected = policy.complete(queries)
    assert expected != Policy.load(lora_run, trained=False).complete(queries)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, completion in zip(policy.prompts(queries), expected, strict=True):
        asked = tokenizer(prompt, return_tensors="pt")  # a plain prompt: format.chat is off in the quickstart
        written = model.generate(**asked)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True).startswith(completion)


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(lora_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="not empty: choose another folder"):
        export.export(lora_run, tmp_path / "full")
    with pytest.raises(UserError, match="not a run"):
        export.export(tmp_path, tmp_path / "new")
    failing = tmp_path / "fails.py"
    failing.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="it fails"):
        export.export(lora_run, tmp_path / "new", converter=failing)
    assert not (tmp_path / "new").exists()  # nothing half-written


@pytest.mark.slow
def test_the_modelfile_names_the_gguf_file(lora_run, tmp_path):
    copying = tmp_path / "convert.py"  # the real one is llama.cpp's; this one writes what it was called with
    copying.write_text(
        "import sys, pathlib\nfolder, *options = sys.argv[1:]\n"
        "pathlib.Path(options[1]).write_text(' '.join(options[2:]))"
    )
    lines = export.export(lora_run, tmp_path / "out", "bfloat16", converter=copying)
    assert (tmp_path / "out" / "policy.gguf").read_text() == "--outtype bf16" and "policy.gguf" in lines[0]
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./policy.gguf\n")
