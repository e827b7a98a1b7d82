"""The command preflight: its numbers by brute force on planted ranks, its proposals, its verdicts, and a real call."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rec_r1 import cli, config, models
from rec_r1.checks import preflight
from rec_r1.checks.preflight import groups, sampling, verdict
from rec_r1.checks.preflight.settings import settings
from rec_r1.checks.steps import Steps
from rec_r1.prompts import Action
from rec_r1.scoring import Scored
from rec_r1.scoring.earned import DEAD_CAUSES, LIVE
from rec_r1.tasks import Split
from rewards import Outcome, WeightedSum

RECIPE = config.load("quickstart")
STEPS = Steps(queries=156, prompts=12, used=156, epoch=13, total=39)
ARGS = SimpleNamespace(
    max_completion_length=16, per_device_train_batch_size=96, steps_per_generation=1, num_generations=8, use_vllm=False
)


def outcome(ranks: np.ndarray, malformed: set[int] = frozenset()) -> Outcome:
    """B completions with one target each, at the given ranks; those of ``malformed`` have no action."""
    ranks = np.asarray(ranks, np.int32).reshape(-1, 1)
    actions = [None if b in malformed else Action(f"query {b}", f"query {b}") for b in range(len(ranks))]
    return Outcome(["?"] * len(ranks), actions, ranks, np.ones(ranks.shape, np.float32))


def planted(ranks, raw=None, reward="ndcg@10", malformed=frozenset()) -> groups.Groups:
    """The groups of N prompts with one target each. ranks: N lists of G ranks. raw: N ranks, 0 by default."""
    n = len(ranks)
    raw = outcome(np.zeros(n) if raw is None else raw)
    return groups.groups_of(
        "x", rewards.from_spec({reward: 1.0}), outcome(ranks, malformed), raw, list(map(str, range(n)))
    )


def sampled(ranks, raw=None, clipped=0, malformed=frozenset()) -> sampling.Sampled:
    """The completions of N prompts, as `sample` returns them; the first ``clipped`` are clipped."""
    n, size = np.shape(ranks)
    total = n * size

    def scored(given: Outcome) -> Scored:
        nothing = np.zeros(len(given.actions))
        return Scored(given, given.actions, {}, nothing, nothing > 0, [], [], {})

    split = Split(list(map(str, range(n))), ["query"] * n, [(0,)] * n, [(1.0,)] * n)
    first = scored(outcome(np.zeros(n) if raw is None else raw))
    lengths, cut = np.full(total, 4), np.arange(total) < clipped
    return sampling.Sampled(split, size, scored(outcome(ranks, malformed)), first, lengths, cut, 1.0, 10.0)


def proposed(ranks, reward="ndcg@10", recipe=RECIPE, more=("ndcg@100",), **given) -> list[str]:
    with_another = {f"rewards.{name}=1": planted(ranks, reward=name) for name in more}
    own = planted(ranks, given.get("raw"), reward)
    return [one.text for one in settings(recipe, ARGS, STEPS, own, with_another, sampled(ranks, **given))]


@given(st.integers(0, 2**32 - 1))
def test_every_number_of_the_table_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    ranks, raw = rng.choice([0, 1, 2, 7, 30], (9, 4)), rng.choice([0, 1, 30], 9)
    malformed = set(np.flatnonzero(rng.random(36) < 0.3).tolist())
    ranks.reshape(-1)[list(malformed)] = 0  # nothing is retrieved for a malformed completion
    found = planted(ranks, raw, malformed=malformed)

    def earns(rank: int) -> float:
        return 1 / math.log2(rank + 1) if 1 <= rank <= 10 else 0.0

    expected = []
    for q, row in enumerate(ranks.tolist()):
        values = [earns(rank) for rank in row]
        all_malformed = all(4 * q + place in malformed for place in range(4))
        dead = "all_malformed" if all_malformed else {0.0: "all_zero", 1.0: "all_perfect"}.get(values[0], "all_equal")
        expected.append(LIVE if len(set(values)) > 1 else dead)
        assert found.mean[q] == pytest.approx(sum(values) / 4, abs=1e-5)
        assert found.best[q] == pytest.approx(max(values), abs=1e-5)
        assert found.raw[q] == pytest.approx(earns(raw[q]), abs=1e-5)
    assert found.causes == expected and set(expected) <= {LIVE, *DEAD_CAUSES}
    assert (found.live, found.known, found.share) == (expected.count(LIVE), 9, expected.count(LIVE) / 9)


def test_rewards_that_training_takes_as_equal_make_a_dead_group():
    def nearly(given: Outcome) -> np.ndarray:
        return (0.5 + 1e-7 * np.arange(len(given.completions))).astype(np.float32)

    raw = outcome([0])
    found = groups.groups_of("x", WeightedSum((nearly,), (1.0,)), outcome([0, 0, 0]), raw, ["q"])
    assert len(set(nearly(outcome([0, 0, 0])).tolist())) > 1 and found.causes == ["all_equal"]


@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_the_dead_share_of_smaller_groups_is_that_of_all_subsets(values, size):
    dead = [len(set(chosen)) == 1 for row in values for chosen in itertools.combinations(row, size)]
    assert groups.dead_share(np.array(values, float), size) == pytest.approx(np.mean(dead))


def test_the_estimate_at_twice_the_size_against_a_simulation():
    rng = np.random.default_rng(0)
    chance = rng.beta(0.5, 3.0, 5_000)  # of each prompt, that a completion finds the target first
    ranks = (rng.random((5_000, 16)) < chance[:, None]).astype(int)
    drawn = float(np.mean(ranks.min(axis=1) != ranks.max(axis=1)))
    values = ranks[:, :8].astype(float)
    found = groups.Groups("x", ["live"] * len(values), values, np.zeros(len(values)))
    now = 1 - groups.dead_share(values, 8)
    assert drawn - now > 0.05  # a group of 16 is live more often,
    assert groups.live_share_at_twice(found) == pytest.approx(drawn, abs=0.03)  # and the estimate knows how often
    hopeless = groups.Groups("x", ["all_zero"] * 3, np.zeros((3, 8)), np.zeros(3))
    assert groups.live_share_at_twice(hopeless) == 0.0


def test_intervals_and_steps_without_a_live_group():
    count, total, z = 21, 36, 1.959963984540054
    share = count / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    assert groups.wilson(count, total) == pytest.approx((middle - half, middle + half))
    assert groups.wilson(0, 0) == (0.0, 1.0)
    rng = np.random.default_rng(0)
    empty = np.mean(~(rng.random((100_000, 8)) < 0.2).any(axis=1))
    assert groups.no_live_group(0.2, 8) == pytest.approx(empty, abs=0.005)


RICH = [[1, 0, 3, 0, 0, 1, 0, 0]] * 24 + [[0] * 8] * 12
FEW = [[1, 0, 1, 0, 1, 0, 1, 0]] * 8 + [[0] * 8] * 52


@pytest.mark.parametrize(
    ("ranks", "raw", "kind", "reason"),
    [
        ([[0] * 8] * 36, None, verdict.NOTHING, "none of 36 groups is live"),
        ([[2] * 8] * 36, None, verdict.NOTHING, "none of 36 groups is live"),
        (RICH, None, verdict.SIGNAL, "67% [50%, 80%] of the groups are live"),
        (RICH, [1] * 36, verdict.NOTHING, "not shown to earn more than the raw query (−0.333 ["),
        ([[8, 9, 9, 9, 9, 9, 9, 9]] * 36, [9] * 36, verdict.NOTHING, "more than their mean, which is less than 0.05"),
        (
            FEW,
            None,
            verdict.SPARSE,
            "13% [7%, 24%] of the groups are live, so that up to 42% of the steps may have none",
        ),
        (FEW[:8] + FEW[-10:], None, verdict.SIGNAL, "44% [25%, 66%]"),
        ([[1, 0, 0, 0, 0, 0, 0, 0]] * 2 + [[9, 0] * 4] * 28, None, verdict.SIGNAL, "100%"),
    ],
)
def test_verdicts_on_planted_groups(ranks, raw, kind, reason):
    found = verdict.judge(planted(ranks, raw), prompts=12)
    assert found.kind == kind and reason in found.reason
    assert found.sentence("x=1").startswith(f"{kind}: ")
    assert found.sentence("x=1").endswith("set x=1") == (kind == verdict.SPARSE)


def test_a_small_headroom_is_measured_in_the_weights_of_the_reward():
    ranks = [[1] + [0] * 7] * 5 + [[0] * 8] * 31
    assert verdict.judge(planted(ranks), 100).kind == verdict.SPARSE  # 0.12 with an interval around 0.05
    assert verdict.judge(planted(ranks), 100, scale=10.0).kind == verdict.NOTHING
    assert preflight.scale(rewards.from_spec({"ndcg@10": 0.5, "ndcg@100": 0.7, "format": 3.0})) == pytest.approx(1.2)
    assert preflight.scale(rewards.from_spec({"rec_r1": 1.0})) == 1.0


def test_a_deeper_reward_is_proposed_where_it_makes_groups_live():
    deep = [[20, 0, 30, 0, 0, 0, 0, 0]] * 30 + [[0] * 8] * 6
    assert proposed(deep) == ["rewards.ndcg@100=1"]
    assert "rewards.ndcg@100=1" not in proposed(RICH)


def test_a_filter_is_proposed_where_good_raw_queries_make_groups_dead():
    everything = config.load("quickstart", ["task.train_filter.raw_ndcg_below=1.01"])
    ranks, raw = [[1, 0, 0, 2, 0, 0, 0, 0]] * 15 + [[1] * 8] * 21, [0] * 15 + [1] * 21
    assert "task.train_filter.raw_ndcg_below=0.2" in proposed(ranks, recipe=everything, raw=raw)
    assert not any(text.startswith("task.") for text in proposed(ranks, raw=raw))  # the quickstart has this filter
    assert not any(text.startswith("task.") for text in proposed(RICH, recipe=everything, raw=[0] * 36))


def test_more_tokens_are_proposed_where_completions_are_clipped():
    longer = "grpo.max_completion_length=32"
    assert longer in proposed(RICH, clipped=150) and longer not in proposed(RICH, clipped=140)
    assert longer in proposed(RICH, clipped=40, malformed=frozenset(range(40)))


def test_larger_steps_are_proposed_where_many_have_no_live_group():
    few = [[1] + [0] * 7] * 4 + [[0] * 8] * 44
    found = proposed(few)
    assert "prompts_per_step=36" in found  # 36 prompts: (11/12)^36 = 0.044, and 24 give 0.124
    assert not any("prompts_per_step" in text for text in proposed(RICH))


def report(ranks, given=("ndcg@10",)) -> list[str]:
    """The lines that are printed for planted completions, with rewards of weight 1."""
    recipe = config.load("quickstart", [f"rewards={{{', '.join(f'{name}: 1.0' for name in given)}}}"])
    scorer = SimpleNamespace(rewards=rewards.from_spec(dict.fromkeys(given, 1.0)))
    env = SimpleNamespace(scorer=scorer, task=SimpleNamespace(catalog=range(1854)))
    args = SimpleNamespace(**vars(ARGS), num_iterations=1, gradient_accumulation_steps=1)
    return list(preflight._report(recipe, args, env, STEPS, sampled(ranks)))


def test_a_deeper_reward_turns_nothing_into_sparse():
    *_, setting, last = report([[20, 0, 30, 0, 0, 0, 0, 0]] * 30 + [[0] * 8] * 6)
    assert setting.startswith("  rewards.ndcg@100=1    # 83% of the groups are live then, and 0% now")
    assert last.startswith("verdict      sparse: none of 36 groups is live; with rewards.ndcg@100=1, 83% [")
    assert last.endswith(": set rewards.ndcg@100=1")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[[0] * 8] * 36, [[40, 41, 42, 43, 44, 45, 46, 47]] * 36])
def test_a_deeper_reward_is_not_proposed_where_it_has_nothing_to_teach(ranks):
    lines = report(ranks)
    assert lines[-1].startswith("verdict      nothing to learn here with this policy: none of 36 groups is live")
    assert not any("rewards." in line for line in lines)


def test_the_lines_of_planted_groups():
    lines = report(RICH)
    own = "67% [50%, 80%]   0.208       0.667      0.000             0%            33%             0%             0%"
    assert lines[1] == f"the recipe's  {own}"
    assert not any(line.startswith("ndcg@10 ") for line in lines)  # it is what the recipe trains on
    assert "completions  0% malformed, 0% clipped at 16 tokens, 4.0 tokens on average" in lines
    # 288 completions in 10 s, 96 in a step, 39 steps
    assert any("takes 3.3 s a step, and 130 s in 39 steps" in line for line in lines)
    assert any("8.0 of the 12 groups of a step are live" in line and "0.0% of the steps" in line for line in lines)


def test_metrics_that_are_measured():
    assert preflight.metrics(RECIPE, 1854) == [
        "ndcg@10", "ndcg@100", "ndcg@1000", "recall@10", "recall@100", "recall@1000", "mrr@10"
    ]  # fmt: skip
    assert preflight.metrics(RECIPE, 46) == ["ndcg@10", "ndcg@100", "recall@10", "recall@100", "mrr@10"]
    one = config.load("quickstart", ["rewards={ndcg@100: 1.0}"])
    assert "ndcg@100" not in preflight.metrics(one, 1854)
    lists = config.load("item_generation", ["task.path=x"])
    assert preflight.metrics(lists, 1854) == ["ndcg@10", "recall@10", "mrr@10"]


def test_a_reward_is_added_as_the_key_of_a_recipe_adds_it():
    given = rewards.from_spec({"ndcg@10": 0.5, "format": 1.0})
    added = preflight.plus(given, rewards.from_spec({"ndcg@100": 1.0}), 0.5)
    assert dict(zip(added.names, added.weights, strict=True)) == {"format": 1.0, "ndcg@10": 0.5, "ndcg@100": 0.5}
    again = preflight.plus(given, rewards.from_spec({"ndcg@10": 1.0}), 2.0)
    assert dict(zip(again.names, again.weights, strict=True)) == {"format": 1.0, "ndcg@10": 2.0}


def test_queries_are_drawn_by_the_seed():
    split = Split(list("abcdefgh"), list("abcdefgh"), [(0,)] * 8, [(1.0,)] * 8)
    drawn = sampling.draw(split, 5, 0).ids
    assert len(set(drawn)) == 5 and drawn == sampling.draw(split, 5, 0).ids != sampling.draw(split, 5, 1).ids
    assert sorted(sampling.draw(split, 50, 0).ids) == list("abcdefgh")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--queries", "0"], "--queries must be at least 1, got 0"), (["--samples", "1"], "--samples must be at least 2")],
)
def test_too_few_queries_or_samples_are_refused(words, message, capsys):
    assert cli.main(["preflight", "quickstart", *words]) == 2
    assert message in capsys.readouterr().err
    assert cli.parser().parse_args(["preflight", "quickstart"]).queries == preflight.QUERIES


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["format.action=items", "grpo.generation_batch_size=7", "grpo.top_p=2", "task.train_filter.raw_ndcg_below=-1",
     "prompts_per_step=1000", "model.name=nothing/there"],
)  # fmt: skip
def test_what_check_refuses_is_refused_in_the_same_words(override, capsys):
    said = []
    for verb in ("check", "preflight"):
        assert cli.main([verb, "quickstart", override]) == 2
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("rec-r1:")])
    assert said[0] == said[1] and said[0]


@pytest.mark.slow
def test_the_entropy_is_that_of_the_distribution_of_each_token(tiny_model):
    import torch

    from rec_r1.generation.decoding import Completion

    policy = models.load_policy(str(tiny_model), config.ModelConfig(dtype="float32")).eval()
    prompts, written = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
    found = []
    for prompt, ids in zip(prompts, written, strict=True):
        for place in range(len(ids)):
            logits = policy(input_ids=torch.tensor([prompt + ids[:place]])).logits[0, -1].double()
            p = torch.softmax(logits / 0.7, dim=-1)
            found.append(-(p * p.log()).sum().item())
    completions = [Completion(ids, True) for ids in written]
    assert sampling.entropy_of(policy, prompts, completions, 0.7) == pytest.approx(np.mean(found), rel=1e-5)


@pytest.mark.slow
def test_from_start_to_end_with_a_tiny_model(tiny_model, tmp_path, capsys):
    out = tmp_path / "run"
    sizes = ["prompts_per_step=2", "grpo.num_generations=4", "grpo.max_completion_length=6"]
    given = [f"model.name={tiny_model}", "model.dtype=float32", "lora=null", f"output_dir={out}", *sizes]
    assert cli.main(["preflight", "quickstart", *given, "--queries", "5", "--samples", "3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("warning ")]
    assert "writes 3 completions for each of 5 training queries (of 156 that pass the filter)" in lines[0]
    assert lines[1].split()[:2] == ["reward", "live"] and "best of 3" in lines[1]
    rows = [line.split()[0] for line in lines[2:10]]
    assert rows == ["the", "ndcg@10", "ndcg@100", "ndcg@1000", "recall@10", "recall@100", "recall@1000", "mrr@10"]
    for row in lines[2:10]:  # live and dead groups are all groups
        shares = [int(word.rstrip("%")) for word in row.split() if word.endswith("%") and "[" not in word]
        assert sum(shares) in (99, 100, 101), row
    assert any(line.startswith("time ") and "15 completions" in line for line in lines)
    kinds = (verdict.SIGNAL, verdict.SPARSE, verdict.NOTHING)
    assert lines[-1].startswith(tuple(f"verdict      {kind}: " for kind in kinds))
    assert not out.exists()
