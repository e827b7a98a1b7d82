"""`rec-r1 check --processes`: batch sizes, memory and hours by the number of processes."""

import re
from types import SimpleNamespace

import pytest

from rec_r1 import cli, config
from rec_r1.checks import machine
from rec_r1.checks.policy_check import Checked
from rec_r1.checks.steps import Steps
from rec_r1.trl_options import batch_sizes, grpo_config

STEPS = Steps(queries=1000, prompts=32, used=992, epoch=31, total=1000)
COMPLETIONS = {"quickstart": 96, "cpu/search": 96, "cpu/sequential": 64}  # All others have the paper's 32 x 12.


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
