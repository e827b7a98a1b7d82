"""Recorded rollouts under other rewards and retrievers, against brute force with the Scorer itself."""

import itertools
import json
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rec_r1 import cli, config
from rec_r1.checks import rescore, rescore_text
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.runs import rollouts
from rec_r1.scoring import Scorer
from rec_r1.tasks import prompts

STEPS, PROMPTS, GROUP = 12, 2, 4


def record(folder, recipe, places, completions, processes=1):
    """Write a run whose rollouts the Scorer of the recipe has scored. ``places``: training queries by step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(recipe) + config.DOCUMENT_END)
    env = open_environment(recipe)
    for process in range(processes):
        env.scorer.transcript = folder / ("rollouts.jsonl" if process == 0 else f"rollouts.rank{process}.jsonl")
        for step, chosen in enumerate(places):
            mine = chosen[process::processes]
            split = env.task.train.take(mine)
            env.scorer(
                prompts(split, env.task.catalog, env.format),
                [completions(step, i, place) for i, place in enumerate(mine)],
                split.queries,
                split.rows,
                split.grades,
                split.candidates,
                split.histories,
                trainer_state=SimpleNamespace(global_step=step),
            )
    return env


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the quickstart, and its environment. Completions are words of targets and of other emoji; one in eight
    is malformed."""
    folder = tmp_path_factory.mktemp("rescore") / "run"
    recipe = config.load("quickstart", [f"output_dir={folder}", "format.repeat=1"])
    task = open_environment(recipe).task
    rng = np.random.default_rng(0)
    places = [[int(q) for q in rng.choice(60, PROMPTS, replace=False) for _ in range(GROUP)] for _ in range(STEPS)]

    def completion(step, i, place):
        if rng.random() < 0.125:
            return " ,;\n"
        titles = [task.catalog.titles[row] for row in (task.train.rows[place][0], *rng.integers(0, 1800, 4))]
        written = " ".join(titles).split()
        return " " + " ".join(rng.choice(written, 2)) + "\n"

    env = record(folder, recipe, places, completion, processes=2)
    return folder, env


def brute(folder, env, spec, retriever=None):
    """The rewards of all rows by the Scorer, and their groups by step and prompt."""
    rows = rows_of(folder)
    by_query = {query: q for q, query in enumerate(env.task.train.queries)}
    split = env.task.train.take([by_query[row["query"]] for row in rows])
    scorer = Scorer(env.format.parse, retriever or env.retriever, rewards.from_spec(spec))
    values = [round(float(v), 6) for v in scorer.score_split([row["completion"] for row in rows], split).rewards]
    groups = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault((row["step"], row["prompt"]), []).append((row["reward"], value))
    return values, groups


def check_against(result, values, groups):
    assert result["completions"] == len(values) == STEPS * PROMPTS * GROUP and result["all"]["groups"] == len(groups)
    assert result["all"]["new"]["mean"] == pytest.approx(statistics.mean(values), abs=1e-6)
    for place, name in enumerate(("recorded", "new")):
        live = [len({pair[place] for pair in group}) > 1 for group in groups.values()]
        assert result["all"][name] | {"mean": 0} == {
            "mean": 0, "live": sum(live), "groups": len(live), "dead": pytest.approx(1 - sum(live) / len(live)),
        }  # fmt: skip
    both = [group for group in groups.values() if all(len({pair[p] for pair in group}) > 1 for p in (0, 1))]
    found = [statistics.correlation(*zip(*group, strict=True)) for group in both]
    assert result["all"]["correlated"] == len(found) > 0
    assert result["all"]["correlation"] == pytest.approx(statistics.mean(found), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"ndcg@3": 1.0},
        {"ndcg@1000": 1.0},
        {"mrr@50": 2.0, "length": {"weight": 0.3, "max_words": 3}},
        {"rec_r1@1000": 1.0, "repetition": 0.5, "format": 1.0},
        {"ndcg@10": 1.0, "stuffing": {"weight": 0.5, "max_words": 3}},
        {"ndcg@100": {"gain": "exponential"}, "recall@10": 1.0},
        {"ndcg@100": 0.5, "ndcg@10": 0.5},
    ],
    ids=str,
)
def test_recorded_ranks_give_what_the_scorer_gives(made, spec, monkeypatch):
    folder, env = made
    for name in ("open_environment", "open_backend"):  # the ranks suffice
        monkeypatch.setattr(rescore, name, None)
    result = rescore.rescore(folder, json.dumps(spec))
    assert result["retriever"] is None and result["failed"] == result["ambiguous"] == 0
    check_against(result, *brute(folder, env, spec))


@pytest.mark.slow
def test_the_run_s_own_rewards_are_what_was_recorded(made):
    folder, env = made
    result = rescore.rescore(folder, json.dumps(config.load(folder / "config.yaml").rewards))
    for period in (result["all"], *result["periods"]):
        assert period["recorded"] == period["new"]
        assert period["correlation"] is None or period["correlation"] == pytest.approx(1)
    assert 0 < result["all"]["new"]["dead"] < 1
    assert env.task.train.queries  # the environment of the fixture is the run's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "spec"),
    [
        (("bm25", []), {"ndcg@100": 1.0}),
        ((None, ["retriever.params.k1=0.1", "retriever.params.b=0.9"]), {"ndcg@100": 1.0}),
        (("bm25", ["retriever.params.language=de"]), {"mrr@100": 1.0, "format": 1.0}),
        ((None, []), {"lift@100": 1.0}),  # the raw query's ranks are not recorded
        ((None, []), {"ndcg@100": 1.0, "harm@10": 2.0}),
    ],
    ids=str,
)
def test_completions_are_scored_again_by_another_retriever(made, given, spec):
    folder, env = made
    kind, overrides = given
    result = rescore.rescore(folder, json.dumps(spec), kind, overrides)
    assert result["retriever"] == "bm25"
    other = open_environment(config.load(folder / "config.yaml", overrides))
    check_against(result, *brute(folder, env, spec, other.retriever))


@pytest.mark.slow
def test_another_retriever_changes_the_numbers(made):
    folder, _ = made
    same = rescore.rescore(folder, "{ndcg@10: 1}", "bm25")
    assert same["all"] == rescore.rescore(folder, "{ndcg@10: 1}")["all"]
    stemmed = rescore.rescore(folder, "{ndcg@10: 1}", None, ["retriever.params.language=de"])
    assert stemmed["all"]["new"]["mean"] != same["all"]["new"]["mean"]


@pytest.mark.slow
def test_depths_are_compared_where_one_reward_has_a_depth(made):
    folder, env = made
    result = rescore.rescore(folder, "{ndcg@3: 1, format: 1}")
    assert list(result["depths"]) == ["3", "10", "100", "1000"]
    for k, counts in result["depths"].items():
        groups = brute(folder, env, {f"ndcg@{k}": 1.0, "format": 1.0})[1]
        assert counts["live"] == sum(len({new for _, new in group}) > 1 for group in groups.values())
    live = {k: counts["live"] for k, counts in result["depths"].items()}
    assert live["3"] < live["1000"]
    (sentence,) = [line for line in result["sentences"] if line.startswith("Live groups by depth")]
    assert f"{live['3']} at 3" in sentence and "1000 would have had the most" in sentence
    assert rescore.rescore(folder, "{ndcg@3: 1, recall@10: 1}")["depths"] == {}
    assert rescore.rescore(folder, "{format: 1}")["depths"] == {}


@pytest.mark.slow
def test_periods_are_tenths_of_the_steps(made):
    folder, _ = made
    result = rescore.rescore(folder, "{ndcg@10: 1}")
    assert [(p["first"], p["last"]) for p in result["periods"]][:3] == [(0, 1), (2, 3), (4, 4)]
    assert len(result["periods"]) == 10 and sum(p["groups"] for p in result["periods"]) == result["all"]["groups"]
    mean = sum(p["new"]["mean"] * p["groups"] for p in result["periods"]) / result["all"]["groups"]
    assert mean == pytest.approx(result["all"]["new"]["mean"])


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60))
def test_every_group_is_in_one_period(steps):
    steps = sorted(steps)
    periods = rescore._periods(steps)
    assert sorted(g for period in periods for g in period) == list(range(len(steps)))
    assert len(periods) == min(10, len(set(steps))) and all(periods)
    assert all(steps[a[-1]] < steps[b[0]] for a, b in itertools.pairwise(periods))


REWARD = st.sampled_from([float("nan"), 0.0, 0.25, 0.5, 1.0, -2.0])


@given(st.lists(st.lists(st.tuples(REWARD, REWARD), min_size=1, max_size=5), min_size=1, max_size=6))
def test_live_groups_and_correlations_by_brute_force(groups):
    pairs = np.array([pair for group in groups for pair in group])
    starts = np.cumsum([0, *map(len, groups)])
    places = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    replay = rescore.Replay(places, [0] * len(groups), pairs[:, 0], pairs[:, 1], {})
    found = rescore._statistics(replay, range(len(groups)))
    correlations = []
    for column, name in enumerate(("recorded", "new")):
        known = [[pair[column] for pair in group if pair[column] == pair[column]] for group in groups]
        counted = [group for group in known if len(group) > 1]
        assert found[name]["groups"] == len(counted)
        assert found[name]["live"] == sum(len(set(group)) > 1 for group in counted)
    for group in groups:
        both = [pair for pair in group if pair[0] == pair[0] and pair[1] == pair[1]]
        if len({a for a, _ in both}) > 1 and len({b for _, b in both}) > 1:
            correlations.append(statistics.correlation(*zip(*both, strict=True)))
    assert found["correlated"] == len(correlations)
    assert found["correlation"] == (pytest.approx(statistics.mean(correlations)) if correlations else None)
    json.dumps(found, allow_nan=False)


def copy_of(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def rewrite(folder, change):
    path = folder / "rollouts.jsonl"
    rows = [change(i, json.loads(line)) for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))


@pytest.mark.slow
@pytest.mark.parametrize("retriever", [None, "bm25"])
def test_closed_parts_give_the_same_numbers(made, tmp_path, monkeypatch, retriever):
    folder = copy_of(made, tmp_path)
    before = rescore.rescore(folder, "{ndcg@3: 1}", retriever)
    monkeypatch.setattr(rollouts, "PART_BYTES", 4000)
    monkeypatch.setattr(rescore, "AT_A_TIME", 7)  # A batch is no whole number of groups.
    for file in rollouts.files(folder):
        recorded = [row for row, _ in rollouts.rows(file)]
        file.unlink()
        for row in recorded:
            rollouts.append(file, [row])
    assert len(list(folder.glob("rollouts*.parts/*.gz"))) > 6
    assert rescore.rescore(folder, "{ndcg@3: 1}", retriever) == before


@pytest.mark.slow
def test_rows_for_which_the_retriever_failed_are_left_out(made, tmp_path):
    folder = copy_of(made, tmp_path)
    rewrite(folder, lambda i, row: row | {"failed": True, "reward": None, "ranks": [0]} if i % 4 == 0 else row)
    result = rescore.rescore(folder, "{ndcg@10: 1}")
    assert result["failed"] == 12 and result["completions"] == STEPS * PROMPTS * GROUP - 12
    assert "left out  12 completions for which the retriever failed" in rescore_text.text(result)


@pytest.mark.slow
def test_rows_without_a_reward_count_in_no_group(made, tmp_path):
    """No reward applied to them in training."""
    folder = copy_of(made, tmp_path)
    rewrite(folder, lambda i, row: row | {"reward": None})
    (folder / "rollouts.rank1.jsonl").unlink()
    result = rescore.rescore(folder, "{ndcg@10: 1}")
    assert result["all"]["recorded"] == {"mean": None, "live": 0, "groups": 0, "dead": None}
    assert result["all"]["correlation"] is None and result["all"]["new"]["groups"] > 0
    assert "0 of 0 groups were" in rescore_text.text(result)


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("{ndgc@10: 1}", [], "rewards: unknown reward 'ndgc': did you mean 'ndcg'?"),
        ("{ndcg: 1}", [], "write 'ndcg@10'"),
        ("{ndcg@10: 0}", [], "rewards: every weight is 0"),
        ("ndcg@10", [], "rewards must be"),
        ("{ndcg@10: 1}", ["grpo.max_steps=3"], "rescore: grpo.max_steps: only retriever.… and task.path"),
        ("{ndcg@10: 1}", ["--retriever", "bm52"], "retriever.kind"),
        ("{ndcg@10: 1}", ["retriever.params.k2=1"], "k2"),
    ],
)
def test_mistakes_are_one_line(made, spec, more, message, capsys):
    assert cli.main(["rescore", str(made[0]), "--rewards", spec, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rec-r1: ")]
    assert message in line


def test_what_is_no_run_or_has_no_rollouts_is_refused(made, tmp_path):
    with pytest.raises(UserError, match=r"not a run \(no config\.yaml\)"):
        rescore.rescore(tmp_path, "{ndcg@10: 1}")
    folder = copy_of(made, tmp_path)
    for path in folder.glob("rollouts*.jsonl"):
        path.write_text("")
    with pytest.raises(UserError, match=r"no rollouts \(rollouts\.jsonl is missing or empty\)"):
        rescore.rescore(folder, "{ndcg@10: 1}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {key: row[key] for key in row if key != "ranks"}, r"line 1 is damaged \(no ranks\)"),
        (lambda row: row | {"prompt": "another"}, "is no training prompt of its recipe any more"),
        (lambda row: row | {"ranks": [*row["ranks"], 7]}, "are not those that its rollouts were scored by"),
        (lambda row: row | {"rewards": row["rewards"] | {"ndcg@10": 0.123}}, "are not those that its rollouts were"),
    ],
)
def test_damaged_rows_and_changed_data_are_refused(made, tmp_path, change, message):
    folder = copy_of(made, tmp_path)
    rewrite(folder, lambda i, row: change(row) if i == 0 else row)
    with pytest.raises(UserError, match=message):
        rescore.rescore(folder, "{ndcg@10: 1}")


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_only_what_is_asked_for(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    assert cli.main(["rescore", str(folder), "--rewards", "{ndcg@1000: 1}"]) == 0
    printed = capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    assert "new       {ndcg@1000: 1}, from the recorded ranks" in printed and printed.count("\n") > 14
    out = tmp_path / "new" / "numbers.json"
    assert cli.main(["rescore", str(folder), "--rewards", "{ndcg@1000: 1}", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(json.dumps(rescore.rescore(folder, "{ndcg@1000: 1}")))
    assert all(sentence in printed for sentence in result["sentences"])
    assert cli.main(["rescore", str(folder), "--rewards", "{ndcg@1000: 1}", "--out", str(out / "x.json")]) == 2
    assert "--out: cannot write into" in capsys.readouterr().err


@pytest.mark.slow
def test_the_dead_groups_are_those_that_the_training_logged(lora_run):
    """A real training: the shares of live groups in metrics.jsonl, step by step."""
    result = rescore.rescore(lora_run, "{ndcg@10: 1}")
    logged = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    live = [row["groups/live"] for row in logged if "groups/live" in row]
    assert [1 - period["recorded"]["dead"] for period in result["periods"]] == pytest.approx(live) and len(live) == 2
