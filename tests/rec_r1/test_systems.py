"""What is kept of a system, and that run files and qrels say the same to an outside evaluator."""

import dataclasses
import json
import shutil

import ir_measures
import numpy as np
import pytest
from runs_ import policy

from rec_r1 import config
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.evaluation import records, seeds, trec_files
from rec_r1.evaluation.evaluate import (
    check_against,
    evaluate_run,
    mean_of_samples,
    metric_scorer,
    score_answers,
    score_lists,
    score_raw,
)
from rec_r1.tasks import Split
from retrievers.text.analysis import words

METRICS = ["ndcg@10", "ndcg@100", "recall@100", "mrr@10", "map@100", "precision@5", "hit@1"]
OUTSIDE = ["nDCG@10", "nDCG@100", "R@100", "RR@10", "AP@100", "P@5", "Success@1"]


@pytest.fixture(scope="module")
def env():
    return open_environment(config.load("quickstart"))


def outside(folder, name):
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels")))
    run = list(ir_measures.read_trec_run(str(folder / f"{name}.run")))
    measures = [ir_measures.parse_measure(m) for m in OUTSIDE]
    values = {m: {} for m in OUTSIDE}
    for value in ir_measures.iter_calc(measures, qrels, run):
        values[str(value.measure)][value.query_id] = value.value
    return values, {q.query_id for q in qrels}


def agree(system, folder):
    values, queries = outside(folder, records.file_name(system.name))
    assert len(queries) == len(system.rows)
    for ours, theirs in zip(METRICS, OUTSIDE, strict=True):
        for row in system.rows:
            token = trec_files.token(row["query_id"])
            assert row["metrics"][ours] == pytest.approx(values[theirs].get(token, 0.0), abs=2e-6), (ours, token)


@pytest.mark.slow
def test_the_raw_query_s_run_file_gives_the_same_numbers_outside(env, tmp_path):
    split = env.task.test
    split = dataclasses.replace(split, ids=[f"{i} %" for i in split.ids])  # TREC files part columns by white space
    scored = score_raw(split, metric_scorer(env.scorer, METRICS))
    records.save_qrels(tmp_path, "test", env, split)
    agree(
        records.save(tmp_path, "test", env, split, scored, "raw query", "query", "as it is"),
        tmp_path / "evaluation/test",
    )


def test_graded_judgments_and_lists_give_the_same_numbers_outside(beir_folder, tmp_path):
    env = open_environment(config.load("quickstart", ["task.name=beir", f"task.path={beir_folder}"]))
    split, rng = env.task.train, np.random.default_rng(0)
    lists = [rng.permutation(12)[: rng.integers(0, 13)].tolist() for _ in range(len(split))]
    scored = score_lists(lists, split, metric_scorer(env.scorer, METRICS))
    made = records.save(tmp_path, "train", env, split, scored, "a list", "list", "random")
    records.save_qrels(tmp_path, "train", env, split)
    agree(made, tmp_path / "evaluation/train")
    assert 0 < np.mean(made.scores("ndcg@10")) < 1


def test_what_is_kept_is_read_again(env, tmp_path):
    split = env.task.validation.take(range(6))
    scored = score_answers(["happy joy", "", "…", "a b c", "red", "dog"], split, metric_scorer(env.scorer, ["ndcg@10"]))
    made = records.save(
        tmp_path, "validation", env, split, scored, "gpt / x", "endpoint", "an endpoint", {"dollars": 0.1}
    )
    (again,) = records.load_all(tmp_path, "validation", records.belongs_to(env, split)).values()
    assert again == made and again.cost == {"dollars": 0.1}
    assert (tmp_path / "evaluation/validation/gpt-x.jsonl").is_file()
    assert [row["malformed"] for row in again.rows] == [False, True, True, False, False, False]
    assert again.statistics["malformed"] == pytest.approx(2 / 6) and again.statistics["distinct_terms"] == 7
    row = again.rows[0]
    assert row["action"].endswith("happy joy") and len(row["hits"]) <= 3 and row["relevant"][0]["grade"] == 1.0
    assert np.isnan(again.scores("mrr@10")).all()


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda text: text[:-40], r"line \d+ is damaged"),
        (lambda text: text.replace(" Q0 ", " ", 1), "line 1 is damaged"),
        (lambda text: "someone Q0 else 1 2 x\n" + text, "line 1 is damaged"),
        (lambda text: text.rstrip("\n"), r"line \d+ is damaged"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_run_file_is_named(env, tmp_path, damage, where):
    split = env.task.validation.take(range(3))
    scored = score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    records.save(tmp_path, "validation", env, split, scored, "a list", "list", "by hand")
    path = tmp_path / "evaluation" / "validation" / "a-list.run"
    assert len(records.read_lists(tmp_path, "validation", env, split, "a list")) == 3
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=rf"a-list\.run: {where}.*evaluate again"):
        records.read_lists(tmp_path, "validation", env, split, "a list")


def test_a_kill_between_rows_and_description_leaves_no_pair(env, tmp_path, monkeypatch):
    split = env.task.validation.take(range(3))
    scored = score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    about = (tmp_path, "validation", env, split, scored, "a list", "list", "by hand")
    records.save(*about)
    written = records._write_rows

    def killed(*arguments):
        written(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(records, "_write_rows", killed)
    with pytest.raises(KeyboardInterrupt):
        records.save(*about)
    assert records.load_all(tmp_path, "validation") == {}


def test_answers_of_another_retriever_or_task_are_left_out(env, tmp_path, caplog):
    split = env.task.validation.take(range(4))
    scored = score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    records.save(tmp_path, "validation", env, split, scored, "raw query", "query", "as it is")
    other = env.task.validation.take(range(3))
    assert records.load_all(tmp_path, "validation", records.belongs_to(env, other)) == {}
    assert "left out, because it is of another retriever or other queries" in caplog.text


def test_answers_to_texts_that_were_edited_since_are_left_out(env, tmp_path, caplog):
    split = env.task.validation
    scored = score_raw(split, env.scorer)
    records.save(tmp_path, "validation", env, split, scored, "raw query", "raw", "the raw query")
    edited = dataclasses.replace(split, queries=[*split.queries[:-1], "something else"])
    assert records.belongs_to(env, edited) != records.belongs_to(env, split)
    assert records.load_all(tmp_path, "validation", records.belongs_to(env, edited)) == {}
    assert "left out, because it is of another retriever or other queries" in caplog.text
    # Older versions stored a hash without the texts, which are in the rows.
    file = tmp_path / "evaluation/validation/raw-query.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"belongs_to": meta["belongs_to"].partition(":")[0]}))
    assert len(records.load_all(tmp_path, "validation", records.belongs_to(env, split))) == 1
    assert records.load_all(tmp_path, "validation", records.belongs_to(env, edited)) == {}


def test_ids_become_tokens_and_stay_apart():
    ids = ["a b", "a_b", "a%20b", "a\tb", "a\u3000b", "ab"]
    tokens = [trec_files.token(i) for i in ids]
    assert len(set(tokens)) == len(ids) and not any(c.isspace() for token in tokens for c in token)


def test_the_mean_of_samples(env):
    split = Split(["q1", "q2"], ["mic", "sour"], [(1,), (2,)], [(1.0,), (1.0,)])
    answers = ["a", "b", "…", "c"]
    scorer = metric_scorer(env.scorer, ["ndcg@10", "format"])
    each = scorer.score_split(answers, split.take([0, 0, 1, 1]))
    mean = mean_of_samples(each, 2)
    assert mean.components["format"].tolist() == [0.0, -0.5] and len(mean.actions) == 2
    listed = score_lists([[1], [2]], split, scorer)
    assert mean.outcome.words is listed.outcome.words is each.outcome.words is words
    assert score_answers(answers, split, scorer, 2).components["format"].tolist() == [0.0, -0.5]


def test_rankings_without_a_model_have_every_metric_that_check_accepts(env):
    """Of these metrics `stuffing` also reads the query and the words that the policy wrote, which are none."""
    split = env.task.validation.take(range(3))
    metrics = [*METRICS, "format", "length", "repetition", "stuffing"]
    scored = score_lists([list(rows) for rows in split.rows], split, metric_scorer(env.scorer, metrics))
    assert scored.components["ndcg@10"].tolist() == [1.0] * 3 and scored.components["stuffing"].tolist() == [0.0] * 3


def test_who_asks_is_read_from_rows_new_and_old():
    ids = ["a:b:3", "7:12", "odd", "at:noon", ":4"]
    sequential = Split(ids, [""] * 5, [(0,)] * 5, [(1.0,)] * 5, histories=[(1,)] * 5)
    users = ["a:b", "7", "odd", "at:noon", ":4"]
    assert records.users_of(sequential) == users
    assert records.users_of(dataclasses.replace(sequential, histories=())) == ids

    def kept(**more):
        return records.System("x", "query", "", [{"query_id": i, "slices": {}, **more} for i in ids], {})

    assert kept().users == ids and kept(slices={"target": "warm"}).users == users  # written before rows named users
    assert kept(user="me").users == ["me"] * 5


def test_rows_name_the_user_where_there_is_one(env, tmp_path):
    scorer = metric_scorer(env.scorer, ["ndcg@10"])
    split = Split(["u1:3", "u1:4"], ["mic", "sour"], [(1,), (2,)], [(1.0,), (1.0,)])
    scored = score_raw(split, scorer)
    plain = records.save(tmp_path, "test", env, split, scored, "raw query", "query", "as it is")
    assert "user" not in plain.rows[0] and plain.users == ["u1:3", "u1:4"]
    split = dataclasses.replace(split, histories=[(5,), (5, 1)])
    made = records.save(tmp_path, "test", env, split, scored, "raw query", "query", "as it is")
    assert made.users == records.load_all(tmp_path, "test")["raw query"].users == ["u1", "u1"]


def of_split(env, split, part="validation"):
    """``env`` with other queries in one of its splits."""
    return dataclasses.replace(env, task=dataclasses.replace(env.task, **{part: split}))


def judged_otherwise(split):
    """The same queries, each with the judgments of its neighbour."""
    places = [*range(1, len(split)), 0]
    return dataclasses.replace(split, rows=[split.rows[q] for q in places], grades=[split.grades[q] for q in places])


def test_a_run_to_compare_with_is_checked_before_anything_is_written(env, tmp_path):
    split = env.task.validation.take(range(4))
    few = of_split(env, split)
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    for part, option in (("validation", " --split validation"), ("test", "")):
        with pytest.raises(config.UserError, match=f"run rec-r1 eval {one}{option} first"):
            check_against([one], part, few)
    scored = score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    for run in (one, other):
        records.save(run, "validation", few, split, scored, "trained", "policy", "by hand")
    assert list(check_against([one], "validation", few)) == ["trained of run"]
    # Runs whose folders have one name stay two systems.
    assert list(check_against([one, other], "validation", few)) == [f"trained of {one}", f"trained of {other}"]
    with pytest.raises(config.UserError, match="evaluated on other queries"):
        check_against([one], "validation", of_split(env, split.take([0])))
    with pytest.raises(
        config.UserError, match=r"other queries, other judgments or another retriever.*run rec-r1 eval .*run --split"
    ):
        check_against([one], "validation", of_split(env, judged_otherwise(split)))
    other_bm25 = open_environment(config.load("quickstart", ["retriever.params.b=0.1"])).retriever
    with pytest.raises(config.UserError, match="other queries, other judgments or another retriever"):
        check_against([one], "validation", dataclasses.replace(few, retriever=other_bm25))


def test_a_run_to_compare_with_must_be_evaluated_with_its_best_policy(env, tmp_path, caplog):
    split = env.task.validation.take(range(4))
    few, scored = of_split(env, split), score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    records.save(tmp_path, "validation", few, split, scored, "trained", "policy", "by hand", step=2)
    assert list(check_against([tmp_path], "validation", few))  # Its weights were deleted.
    policy(tmp_path / "best", 1.0)
    for step in (2, 5):
        (tmp_path / "best.json").write_text(json.dumps({"step": step, "metric": "ndcg@10", "value": 0.5}))
        if step == 2:
            assert list(check_against([tmp_path], "validation", few))
    with pytest.raises(config.UserError, match="no evaluation of its best policy on its validation split: run rec-r1"):
        check_against([tmp_path], "validation", few)
    assert "its completions are of step 2, and the best policy is of step 5" in caplog.text


@pytest.fixture
def two_seeds(env, tmp_path):
    """A folder of two seeds with three systems each. Returns it, and what saves a further system of a seed."""
    split = env.task.test.take(range(12))

    def save(seed, name, judged=split, **more):
        run, here = tmp_path / f"seed-{seed}", of_split(env, judged, "test")
        scored = score_raw(judged, metric_scorer(env.scorer, ["ndcg@10"]))
        records.save(run, "test", here, judged, scored, name, "policy", "by hand", **more)

    for seed in (0, 1):
        for name in ("raw query", "untrained", "trained"):
            save(seed, name)
        recipe = config.load("quickstart", ["evaluation.metrics=[ndcg@10]", f"seed={seed}"])
        (tmp_path / f"seed-{seed}" / "config.yaml").write_text(config.dump(recipe))
    return tmp_path, save, judged_otherwise(split)


def test_seeds_leave_out_what_eval_leaves_out(two_seeds, caplog):
    folder, save, otherwise = two_seeds
    for seed in (0, 1):
        save(seed, "sft", otherwise)
        save(seed, "dpo")
    found = {row["system"] for row in seeds.measure(folder)["tables"][0]["rows"]}
    assert found == {"raw query", "untrained", "trained", "dpo"}
    assert "sft.json: left out, because it is of another retriever or other queries" in caplog.text


def test_seeds_of_other_judgments_are_not_compared(two_seeds):
    folder, save, otherwise = two_seeds
    for name in ("raw query", "untrained", "trained"):
        save(1, name, otherwise)
    with pytest.raises(
        UserError, match="seed-1 was evaluated with other queries, other judgments or another retriever than seed-0"
    ):
        seeds.measure(folder)


def test_seeds_are_compared_with_their_best_policies(two_seeds, caplog):
    folder, save, _ = two_seeds
    save(1, "trained", step=2)
    policy(folder / "seed-1" / "best", 1.0)
    (folder / "seed-1" / "best.json").write_text(json.dumps({"step": 5, "metric": "ndcg@10", "value": 0.5}))
    with pytest.raises(UserError, match="no answers of 'trained': run rec-r1 eval"):
        seeds.measure(folder)
    assert "its completions are of step 2, and the best policy is of step 5" in caplog.text


def test_a_folder_without_a_policy_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text(config.dump(config.load("quickstart")))
    with pytest.raises(config.UserError, match="no run with a trained policy"):
        evaluate_run(tmp_path)


def test_models_whose_names_differ_in_one_sign_keep_files_of_their_own(env, tmp_path):
    split = env.task.test.take(range(6))
    scored = score_raw(split, metric_scorer(env.scorer, ["ndcg@10"]))
    names = ("raw query", "llama3.2:1b", "llama3.2-1b", "名前", "模型", "raw-query")
    for name in (*names, *names):
        records.save(tmp_path, "test", env, split, scored, name, "endpoint", f"{name}, by hand")
    found = records.load_all(tmp_path, "test")
    assert set(found) == set(names) and len(list((tmp_path / "evaluation/test").glob("*.json"))) == len(names)
    assert all(system.description == f"{name}, by hand" for name, system in found.items())
    assert (tmp_path / "evaluation/test/llama3.2-1b.json").is_file()
    added = records.add_metrics(tmp_path, "test", found["llama3.2-1b"], {"mine": np.ones(6, np.float32)})
    again = records.load_all(tmp_path, "test")
    assert again["llama3.2-1b"] == added and np.isnan(again["llama3.2:1b"].scores("mine")).all()


def test_grades_keep_all_digits_in_qrels(env):
    split = env.task.test.take(range(4))
    graded = dataclasses.replace(split, rows=[(0,)] * 4, grades=[(1234567.0,), (1000000.0,), (100000.5,), (2.0,)])
    grades = [line.split()[3] for line in trec_files.qrels(env, graded).splitlines()]
    assert grades == ["1234567", "1000000", "100000.5", "2"]


def test_two_trainings_with_one_seed_are_not_two_seeds(two_seeds):
    folder, _, _ = two_seeds
    shutil.copy(folder / "seed-0" / "config.yaml", folder / "seed-1" / "config.yaml")
    with pytest.raises(UserError, match="seed-1 was trained with seed=0, as seed-0 was, and two runs of one seed"):
        seeds.measure(folder)


def test_seeds_without_a_whole_metric_are_refused(two_seeds):
    folder, _, _ = two_seeds
    path = folder / "seed-1" / "evaluation" / "test" / "trained.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    row["metrics"]["ndcg@10"] = None
    path.write_text("\n".join([json.dumps(row), *rest]) + "\n")
    with pytest.raises(UserError, match="no metric has a value for every query and seed"):
        seeds.measure(folder)
