"""`rec-r1 check --processes`: batch sizes, memory and hours by the number of processes."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_batch_sizes import COMPLETIONS

from rec_r1 import cli, config
from rec_r1.checks import machine
from rec_r1.checks.policy_check import Checked
from rec_r1.checks.steps import Steps
from rec_r1.trl_options import batch_sizes, grpo_config, lora_config

ROOT = Path(__file__).parents[2]
LORA = "lora={r: 32, lora_alpha: 64, target_modules: all-linear}"
STEPS = Steps(queries=1000, prompts=32, used=992, epoch=31, total=1000)


@pytest.fixture(scope="module")
def policy():
    """A small model, all of whose weights are trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, **shape))


def args(**changed):
    """What is read of a `trl.GRPOConfig`, on one process."""
    usual = {
        "bf16": False, "beta": 0.0, "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3,
        "per_device_train_batch_size": 12, "gradient_accumulation_steps": 32, "world_size": 1,
        "generation_batch_size": 384, "max_completion_length": 0, "gradient_checkpointing": True, "max_steps": 1000,
    }  # fmt: skip
    return SimpleNamespace(**usual | changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", config.shipped())
def test_every_row_of_every_recipe_has_the_same_completions(name, policy):
    recipe = config.load(name)
    checked = Checked(None, policy, 100)
    _, _, *rows = machine.table(recipe, grpo_config(recipe), checked, STEPS, (1, 4, 8, 16))
    numbers = [row.split()[:4] for row in rows[:4]]
    assert [int(row[0]) for row in numbers] == [1, 4, 8, 16]
    for processes, completions, at_once, passes in (map(int, row) for row in numbers):
        assert completions == COMPLETIONS.get(name, 384) == processes * at_once * passes
    assert rows[4].startswith("Estimates, not measured.") and len(rows) == 6


def test_weights_gradients_and_moments_take_what_torch_allocates(policy):
    """Without tokens there are neither activations nor a cache."""
    import torch

    optimizer = torch.optim.AdamW(policy.parameters())
    policy(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    tensors = [t for p in policy.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.dim()]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    recipe, checked = config.load("esci_bm25"), Checked(None, policy, 0)
    own = machine.memory(recipe, args(), checked, batch_sizes(recipe, 1), 1, 1)
    assert own * 2**30 == pytest.approx(allocated)
    with_reference = machine.memory(recipe, args(beta=0.001), checked, batch_sizes(recipe, 1), 1, 1)
    assert (with_reference - own) * 2**30 == pytest.approx(4 * policy.num_parameters())


def test_shards_take_less_the_more_there_are(policy):
    recipe, checked = config.load("esci_bm25"), Checked(None, policy, 0)

    def memory(processes, shards):
        return machine.memory(recipe, args(), checked, batch_sizes(recipe, processes), processes, shards)

    assert memory(1, 1) < memory(4, 1) == memory(16, 1)  # DDP's buckets
    assert memory(16, 16) < memory(8, 8) < memory(4, 4) < memory(4, 1)
    total, embeddings = policy.num_parameters(), 100 * 32
    gathered = 4 * (embeddings + 2 * (total - embeddings) / 4)
    assert memory(4, 4) * 2**30 == pytest.approx(16 * total / 4 + gathered)


def test_the_cache_is_counted_where_transformers_writes(policy):
    """Two numbers a layer, head and token, for the completions of one process."""
    recipe, checked = config.load("esci_bm25"), Checked(None, policy, 90)

    def memory(processes, **changed):
        given = args(max_completion_length=10, **changed)
        return machine.memory(recipe, given, checked, batch_sizes(recipe, processes), processes, 1) * 2**30

    for processes in (1, 4):
        more = memory(processes, use_vllm=False) - memory(processes)
        assert more == pytest.approx(2 * 4 * 32 * 4 * 100 * 384 / processes)


def test_seconds_of_a_step_by_hand(policy):
    recipe, checked = config.load("esci_bm25"), Checked(None, policy, 250)
    given, total = args(beta=0.001, max_completion_length=512), policy.num_parameters()
    tokens = 512 * 2 / 3
    expected = 384 * ((250 + tokens) * 12 * total / (0.4 * 989e12) + tokens / 15_000)
    for processes in (1, 4, 16):
        found = machine.seconds_a_step(given, checked, batch_sizes(recipe, processes), processes)
        assert found == pytest.approx(expected / processes)
    for without in ({"use_vllm": False}, {"vllm_mode": "server"}):
        assert machine.seconds_a_step(args(**without), checked, batch_sizes(recipe, 1), 1) is None


@pytest.mark.slow
def test_check_prints_the_table_and_says_what_it_cannot_know(tiny_model, capsys):
    settings = [f"model.name={tiny_model}", "lora={r: 4, target_modules: [q_proj]}"]
    assert cli.main(["check", "quickstart", *settings, "--processes", "1,4,5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("processes "))
    assert re.split(r"  +", lines[start])[:4] == ["processes", "completions a step", "at once", "passes"]
    rows = [line.split()[:4] for line in lines[start + 2 : start + 4]]
    assert rows == [["1", "96", "96", "1"], ["4", "96", "24", "1"]]
    assert all(line.endswith("not known") for line in lines[start + 2 : start + 4])
    assert lines[start + 4].startswith("5 processes: prompts_per_step: 12 prompts x 8 completions = 96, which 5 proc")
    assert "Hours are not known" in lines[start + 6] and lines[-1] == "ok"


@pytest.mark.parametrize("given", ["", "0", "1,x", "-4", "4,", "1.5"])
def test_what_is_no_list_of_numbers_is_refused(given, capsys):
    assert cli.main(["check", "quickstart", f"--processes={given}"]) == 2
    assert f"--processes {given}: give numbers of processes, such as" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_3b():
    """Qwen2.5-3B's shape without weights: with LoRA, and with all weights trained."""
    import torch
    from peft import get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    from gpu import SHAPES

    shape = Qwen2Config(tie_word_embeddings=True, **SHAPES["3b"])
    with torch.device("meta"):
        adapter = lora_config(config.load("esci_bm25", [LORA]))
        return {LORA: get_peft_model(Qwen2ForCausalLM(shape), adapter), "lora=null": Qwen2ForCausalLM(shape)}


def estimate(of_3b, name, trained, prompt, processes, *settings):
    """GiB of a process, where several processes have shards, and seconds of a step."""
    recipe = config.load(name, [trained, *settings])
    given, checked, sizes = grpo_config(recipe), Checked(None, of_3b[trained], prompt), batch_sizes(recipe, processes)
    seconds = machine.seconds_a_step(given, checked, sizes, processes)
    return machine.memory(recipe, given, checked, sizes, processes, processes), seconds


@pytest.mark.slow
def test_the_table_by_number_of_gpus_has_these_estimates(of_3b):
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8").partition("### By number of GPUs")[2]
    table = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in table] == ["1 x 24 GB", "1 x 80 GB", "4 x 80 GB", "8 x 80 GB", "2 x 8 x 80 GB"]
    few = re.findall(r"grpo\.[\w=.]+", table[0][1])
    for row, processes in zip(table, (1, 1, 4, 8, 16), strict=True):
        trained = LORA if row[2] == "LoRA" else "lora=null"
        gib, seconds = estimate(of_3b, "esci_bm25", trained, 120, processes, *(few if row is table[0] else []))
        assert row[4] == f"{gib:.1f}"
        assert row[5] == f"{1000 * seconds / 3600:.1f}" or row is table[0]
    alone, _ = estimate(of_3b, "esci_bm25", "lora=null", 120, 1)
    assert f"All weights on one GPU would take {alone:.1f} GiB" in page


@pytest.mark.slow
def test_the_headers_of_the_recipes_have_these_estimates(of_3b):
    names = [name for name in config.shipped() if name not in COMPLETIONS]
    assert len(names) == 11
    for name in names:
        header = config.find(name).read_text(encoding="utf-8").replace("\n# ", " ")
        prompt, with_lora, with_all, seconds = re.findall(
            r"prompts of ([\d,]+) tokens.*: (\d+) GiB with LoRA, (\d+) GiB with all weights; (\d+) s a step", header
        )[0]
        tokens = int(prompt.replace(",", ""))
        assert with_lora == f"{estimate(of_3b, name, LORA, tokens, 1)[0]:.0f}", name
        gib, found = estimate(of_3b, name, "lora=null", tokens, 1)
        assert (with_all, seconds) == (f"{gib:.0f}", f"{found:.0f}"), name
