"""`prompts_per_step`: the same completions a step on any number of processes, as TRL itself counts them."""

import math
import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.trl_options import BatchSizes, batch_sizes

COMPLETIONS = {"quickstart": 96, "cpu/search": 96, "cpu/sequential": 64}  # All others have the paper's 32 x 12.
ONE_PROCESS = {"quickstart": (96, 1), "cpu/search": (96, 1), "cpu/sequential": (64, 1)}


@pytest.mark.parametrize("name", config.shipped())
def test_every_recipe_has_the_same_completions_on_any_number_of_gpus(name):
    recipe = config.load(name)
    sizes = {count: batch_sizes(recipe, count) for count in (1, 4, 8, 16)}
    expected = COMPLETIONS.get(name, 384)
    for count, one in sizes.items():
        assert one.completions == one.at_once * one.passes * count == expected
    assert sizes[1][1:] == ONE_PROCESS.get(name, (12, 32))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 8, 16])
@pytest.mark.parametrize("generated", [None, 768])
def test_trl_counts_them_so(count, generated, monkeypatch, tmp_path):
    """TRL's own generation batch, where a launch has so many processes."""
    from trl import GRPOConfig

    monkeypatch.setattr(GRPOConfig, "world_size", count)
    settings = [f"grpo.generation_batch_size={generated}"] if generated else []
    sizes = batch_sizes(config.load("esci_bm25", settings), count)
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=12, generation_batch_size=generated,
        per_device_train_batch_size=sizes.at_once, gradient_accumulation_steps=sizes.passes,
    )  # fmt: skip
    assert args.generation_batch_size == (generated or 384) and sizes.at_once == 12
    steps = args.steps_per_generation / args.gradient_accumulation_steps
    assert steps == (generated or 384) / 384


COUNTS = st.integers(1, 40)


@given(COUNTS, st.integers(2, 16), COUNTS, st.integers(0, 200))
@example(32, 12, 12, 12)  # 32 completions for each process, which are no whole groups of 12
def test_sizes_divide_the_step_and_stay_within_the_bound(prompts, group, processes, most):
    settings = [f"prompts_per_step={prompts}", f"grpo.num_generations={group}"]
    settings += [f"grpo.per_device_train_batch_size={most}"] * (most > 0)
    recipe = config.load("quickstart", settings)
    if prompts * group % processes:
        with pytest.raises(UserError, match="cannot share equally"):
            batch_sizes(recipe, processes)
        return
    completions, at_once, passes = batch_sizes(recipe, processes)
    share = prompts * group // processes
    assert completions == prompts * group and at_once * passes == share
    able = [size for size in range(1, share + 1) if share % size == 0 and (not most or size <= most)]
    whole = [size for size in able if size % group == 0]
    assert at_once == max(whole or able)


@given(COUNTS, st.integers(2, 16), COUNTS)
def test_the_numbers_that_a_refusal_names_work(prompts, group, processes):
    assume(prompts * group % processes)
    settings = [f"prompts_per_step={prompts}", f"grpo.num_generations={group}"]
    with pytest.raises(UserError) as raised:
        batch_sizes(config.load("quickstart", settings), processes)
    counts = [int(count) for count in re.findall(r"--num_processes=(\d+)", str(raised.value))]
    changes = re.findall(r"prompts_per_step=\d+", str(raised.value))
    assert counts and changes
    for count in counts:
        batch_sizes(config.load("quickstart", settings), count)
    for one in changes:
        batch_sizes(config.load("quickstart", [*settings, one]), processes)


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
def test_a_generation_of_several_steps_is_cut_into_whole_passes(prompts, times, processes):
    generated = prompts * 8 * times
    recipe = config.load("quickstart", [f"prompts_per_step={prompts}", f"grpo.generation_batch_size={generated}"])
    if math.gcd(prompts * 8, processes) != processes:
        return
    sizes = batch_sizes(recipe, processes)
    assert sizes.completions == prompts * 8 and generated % (sizes.at_once * processes) == 0


def test_without_prompts_per_step_the_options_of_trl_count_for_each_process():
    settings = ["prompts_per_step=null", "grpo.per_device_train_batch_size=8", "grpo.gradient_accumulation_steps=3"]
    assert batch_sizes(config.load("quickstart", settings), 4) == BatchSizes(96, 8, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["grpo.gradient_accumulation_steps=8"],
            "override 'grpo.gradient_accumulation_steps=8': grpo.gradient_accumulation_steps: 8: it follows from "
            "prompts_per_step: 12 and the number of processes: remove it, or set prompts_per_step=null",
        ),
        (["grpo.steps_per_generation=2"], "grpo.steps_per_generation: 2: it follows from prompts_per_step: 12"),
        (["grpo.generation_batch_size=100"], "grpo.generation_batch_size: 100 completions, but a step on 1 process "),
        (["prompts_per_step=0"], "prompts_per_step must be at least 1, got 0"),
        (["prompts_per_step=1000"], "and 156 are left, so training would end after 0 steps: set prompts_per_step=156"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, message, capsys):
    assert cli.main(["check", "quickstart", *settings]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_cannot_share_a_step_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert cli.main(["check", "quickstart"]) == 2
    said = capsys.readouterr().err
    assert "12 prompts x 8 completions = 96, which 5 processes cannot share equally" in said
    assert "launch with --num_processes=4 or --num_processes=6, or set prompts_per_step=10 or" in said
