"""Models that cannot be trained with a recipe, as tiny folders: one line each, in `check` and `train` alike."""

import json
import re
import shutil

import pytest

from rec_r1 import cli, config, models, train
from rec_r1.checks.policy_check import thoughts, too_short
from rec_r1.config import FormatConfig
from rec_r1.prompts import Format
from retrievers import Schema

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fewer_queries")]  # each builds a model's layers


@pytest.fixture
def variant(tiny_model, tmp_path):
    """A folder with the tiny model's tokenizer, ``config``'s random model, and changes to the tokenizer's file."""

    def make(config=None, **tokenizer):
        from transformers import AutoModel, AutoModelForCausalLM

        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        if config is not None:
            auto = AutoModel if config.model_type in ("t5", "bert") else AutoModelForCausalLM
            auto.from_config(config).save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | tokenizer
        path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
        return folder

    return make


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "intermediate_size": 64}


def both(folder, out, capsys, monkeypatch, *settings):
    """What `check` and `train` say; (code, line) of each."""

    def weights(*_, **__):
        raise RuntimeError("weights would be loaded")

    monkeypatch.setattr(models, "load_policy", weights)
    arguments = ["quickstart", f"model.name={folder}", f"output_dir={out}", "lora=null", *settings]
    said = []
    for main in (train.main, lambda given: cli.main(["check", *given])):
        try:
            code: object = main(arguments)
        except RuntimeError as error:
            code = str(error)
        said.append((code, [line for line in capsys.readouterr().err.splitlines() if line.startswith("rec-r1: ")]))
    return said


def refused(said, *parts):
    assert said[0] == said[1] and said[0][0] == 2 and len(said[0][1]) == 1, said
    assert all(part in said[0][1][0] for part in parts), said


def passes(said):
    assert said == [("weights would be loaded", []), (0, [])]


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "mamba"])
def test_a_model_without_sdpa(kind, variant, tmp_path, capsys, monkeypatch):
    from transformers import BloomConfig, Gemma2Config, MambaConfig

    made = {
        "gemma2": lambda: Gemma2Config(**SMALL, **HEADS, num_key_value_heads=1, head_dim=16),
        "bloom": lambda: BloomConfig(**SMALL, n_head=2),
        "mamba": lambda: MambaConfig(**SMALL, state_size=4),
    }[kind]()
    folder = variant(made)
    passes(both(folder, tmp_path / "run", capsys, monkeypatch))
    said = both(folder, tmp_path / "run", capsys, monkeypatch, "model.attn_implementation=sdpa")
    refused(said, "model.attn_implementation: sdpa", "does not support")


def test_attention_that_nobody_has(tiny_model, tmp_path, capsys, monkeypatch):
    for name in ("foo", "flash_attention_2"):
        said = both(tiny_model, tmp_path / "run", capsys, monkeypatch, f"model.attn_implementation={name}")
        refused(said, f"model.attn_implementation: {name}")
    passes(both(tiny_model, tmp_path / "run", capsys, monkeypatch, "model.attn_implementation=eager"))


def test_a_tokenizer_without_chat_template(variant, tmp_path, capsys, monkeypatch):
    folder = variant(chat_template=None)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    passes(both(folder, tmp_path / "run", capsys, monkeypatch))  # the recipe has format.chat: false
    said = both(folder, tmp_path / "run", capsys, monkeypatch, "format.chat=true")
    refused(said, "format.chat: true", "no chat template", "format.chat=false")


def test_a_chat_template_that_refuses_a_system_message(variant, tmp_path, capsys, monkeypatch):
    folder = variant()
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    (folder / "chat_template.jinja").write_text(template)
    said = both(folder, tmp_path / "run", capsys, monkeypatch, "format.chat=true", "format.system=Be brief.")
    refused(said, "format.chat: the chat template", "System role not supported")


def test_a_tokenizer_without_an_end(variant, tmp_path, capsys, monkeypatch):
    refused(both(variant(eos_token=None), tmp_path / "run", capsys, monkeypatch), "model.name", "end-of-sequence")


def test_a_tokenizer_without_padding_pads_with_the_end(variant, tmp_path, capsys, monkeypatch):
    passes(both(variant(pad_token=None), tmp_path / "run", capsys, monkeypatch))


def test_no_tokenizer(variant, tmp_path, capsys, monkeypatch):
    folder = variant()
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(both(folder, tmp_path / "run", capsys, monkeypatch), "model.name: the tokenizer of")


def test_a_tokenizer_of_another_model(variant, tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig

    folder = variant(LlamaConfig(**{**SMALL, "vocab_size": 100}, **HEADS))
    refused(both(folder, tmp_path / "run", capsys, monkeypatch), "model.name", "ids up to", "100 embeddings")


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_no_language_model(kind, variant, tmp_path, capsys, monkeypatch):
    from transformers import BertConfig, T5Config

    made = (
        BertConfig(**SMALL, **HEADS) if kind == "bert" else T5Config(vocab_size=400, d_model=32, d_ff=64, num_layers=1)
    )
    refused(both(variant(made), tmp_path / "run", capsys, monkeypatch), "model.name", f"({kind})", "encoder")


def test_a_broken_configuration_and_missing_weights(variant, tmp_path, capsys, monkeypatch):
    folder = variant()
    (folder / "model.safetensors").unlink()
    refused(both(folder, tmp_path / "run", capsys, monkeypatch), "model.name", "no *.safetensors")
    (folder / "config.json").write_text("{")
    refused(both(folder, tmp_path / "run", capsys, monkeypatch), "model.name")


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("lora={target_modules: [nothing_like_it]}", "lora.target_modules"),
        ("lora={layers_to_transform: [0, 2], target_modules: [q_proj]}", "has no layer 2"),
        ("lora={modules_to_save: [nothing], target_modules: [q_proj]}", "lora.modules_to_save"),
        ("lora={target_modules: [q_proj], exclude_modules: [q_proj]}", "exclude_modules"),
        ("grpo.optim=adamw_bnb_8bit", "grpo.optim: adamw_bnb_8bit"),
        ("grpo.lr_scheduler_type=cosine_with_min_lr", "grpo.lr_scheduler_type: cosine_with_min_lr"),
        ("grpo.lr_scheduler_kwargs={nonsense: 1}", "grpo.lr_scheduler_kwargs"),
    ],
)
def test_what_needs_the_layers_to_see(setting, part, tiny_model, tmp_path, capsys, monkeypatch):
    refused(both(tiny_model, tmp_path / "run", capsys, monkeypatch, setting), part)


@pytest.mark.parametrize(
    "setting",
    [
        "lora={target_modules: all-linear, init_lora_weights: pissa}",
        "lora={target_modules: '.*q_proj', modules_to_save: [lm_head], use_dora: true}",
        "grpo={lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1.0e-7}, num_generations: 2}",
    ],
)
def test_what_the_libraries_take_passes(setting, tiny_model, tmp_path, capsys, monkeypatch):
    passes(both(tiny_model, tmp_path / "run", capsys, monkeypatch, setting))


def limits_of(action: str, answer: str, tokenizer) -> tuple[Format, int]:
    """A format, and the number of tokens of its shortest well-formed completion."""
    format_ = Format(FormatConfig(action=action, answer=answer), schema=Schema(("text",)))
    keys = {"items": ("items", ["a"]), "ranking": ("ranking", [1]), "edit": ("more_like", ["a"])}
    written = f"<answer>{json.dumps(dict([keys.get(action, ('query', 'a'))]))}</answer>"
    written = f"<think></think>\n{written}" if answer == "think_json" else written
    assert format_.parse(written, "raw") is not None
    return format_, len(tokenizer(written, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("answer", ["json", "think_json"])
@pytest.mark.parametrize("action", ["replace", "expand", "items", "ranking", "edit", "structured"])
def test_completions_that_are_too_short_for_their_format_are_warned_of(action, answer, tiny_model):
    tokenizer = models.load_tokenizer(str(tiny_model), False)
    format_, tokens = limits_of(action, answer, tokenizer)
    assert not list(too_short(format_, tokenizer, tokens))
    (line,) = too_short(format_, tokenizer, tokens - 1)
    assert f"the shortest completion of format.answer={answer} has {tokens} tokens (<" in line
    assert not list(too_short(Format(FormatConfig()), tokenizer, 1))


def test_check_preflight_and_train_warn_alike(tiny_model, tmp_path, capsys, caplog):
    given = [
        "quickstart", f"model.name={tiny_model}", f"output_dir={tmp_path / 'run'}", "format.answer=json",
        "format.prompt=null", "format.keep_query=false", "grpo.max_completion_length=4", "grpo.max_steps=1",
        "evaluation.every_steps=0", "evaluation.validation_limit=4", "evaluation.test_limit=4", "lora=null",
        "task.train_filter.raw_ndcg_below=1.01", "prompts_per_step=2", "grpo.num_generations=2",
    ]  # fmt: skip
    warned = r"grpo\.max_completion_length: 4: the shortest completion of format\.answer=json has \d+ tokens"
    for verb in (["check"], ["preflight", "--queries", "4"]):
        assert cli.main([verb[0], *given, *verb[1:]]) == 0
        assert re.search(rf"warning +{warned}", capsys.readouterr().out)
    assert train.main(given) == 0
    assert re.search(warned, caplog.text + capsys.readouterr().err)


QWEN3 = (
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}assistant:"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "settings", "said"),
    [
        (
            QWEN3,
            ["format.answer=line"],
            "may write <think> and thoughts before its answer, which are taken for the answer",
        ),
        (QWEN3, ["format.answer=json"], "may write <think> and thoughts before its answer, which make it malformed"),
        (QWEN3, ["format.answer=think_json"], None),
        (QWEN3, ["format.answer=line", "grpo.chat_template_kwargs={enable_thinking: false}"], None),
        (QWEN3, ["format.answer=line", "format.chat=false"], None),
        (QWEN3 + "<think>\n", ["format.answer=think_json"], "ends the prompt with <think>"),
        (QWEN3 + "<think>\n", ["format.answer=line"], "ends the prompt with <think>"),
        ("{{ messages[0]['content'] }}", ["format.answer=line"], None),
    ],
)
def test_models_that_think_before_a_format_without_thoughts_are_warned_of(template, settings, said, tiny_model):
    tokenizer = models.load_tokenizer(str(tiny_model))
    tokenizer.chat_template = template
    recipe = config.load(
        "quickstart", [f"model.name={tiny_model}", "format.prompt=null", "format.chat=true", *settings]
    )
    lines = list(thoughts(recipe, tokenizer))
    assert len(lines) == (said is not None) and all(said in line and "enable_thinking: false" in line for line in lines)
