"""A tiny random policy for real trainings, a run of one, and a recipe with a folder of its own."""

from pathlib import Path

import pytest
from datasets_ import few_emoji

from rec_r1 import config
from rec_r1.pages import plots

RENDER = plots.render


@pytest.fixture(scope="module", autouse=True)
def curves_stay_empty(request):
    """A training fills the panels of its curves, but their picture stays empty, unless the file is marked `curves`.

    To render it takes a fifth of a training of two steps.
    """
    if request.node.get_closest_marker("curves") is None:
        plots.render = lambda figure, path: path.write_bytes(b"")
    yield
    plots.render = RENDER


@pytest.fixture(scope="module")
def fewer_queries(tmp_path_factory):
    """The task of the quickstart has a sixth of its queries in all tests of a file."""
    with few_emoji(tmp_path_factory.mktemp("emoji")):
        yield


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model, tmp_path_factory) -> Path:
    """A random encoder. Its files lack the weights of the pooler, as those of many published encoders do."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None  # sentence-transformers would write it around each text.
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape), add_pooling_layer=False
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora_run(tiny_model, tmp_path_factory) -> Path:
    """A quickstart of two steps with a tiny model and LoRA. Its adapter is then replaced by a random one, because two
    steps change no completion."""
    import torch
    from safetensors.torch import load_file, save_file

    import rec_r1
    from rec_r1 import runs

    out = tmp_path_factory.mktemp("lora") / "run"
    recipe = rec_r1.load_recipe("quickstart", [
        f"model.name={tiny_model}", "model.dtype=float32", "lora={r: 4, target_modules: [q_proj, v_proj, down_proj]}",
        f"output_dir={out}", "grpo.max_steps=2", "grpo.save_steps=2", "prompts_per_step=2",
        "grpo.num_generations=2", "grpo.bf16=false",
        "grpo.max_completion_length=6", "evaluation.every_steps=0", "evaluation.test_limit=10",
    ])  # fmt: skip
    assert rec_r1.train(recipe) == 0
    path = runs.best_policy(out) / "adapter_model.safetensors"
    torch.manual_seed(1)
    save_file({name: torch.randn_like(weight) for name, weight in load_file(path).items()}, path)
    return out


@pytest.fixture
def recipe(tmp_path):
    return config.load("quickstart", [f"output_dir={tmp_path / 'run'}"])
