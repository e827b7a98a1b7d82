"""Recorded rollouts of other tasks than the quickstart's: graded judgments, titles to ground, and candidates."""

import json

import numpy as np
import pytest
from datasets_ import plain_folder, write_jsonl
from test_rescore import record, rows_of

import rewards
from rec_r1 import config
from rec_r1.checks import rescore
from rec_r1.environment import open_environment
from rec_r1.scoring import Scorer


@pytest.mark.slow
def test_grades_and_their_order_are_those_of_the_scorer(tmp_path):
    """Targets of several grades: the Scorer records their ranks in its own order, and none of grade 0."""
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    texts = ["red shoe", "red hat", "blue shoe", "green coat", "red coat", "blue hat"]
    (beir / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": str(i), "title": text, "text": ""}) + "\n" for i, text in enumerate(texts))
    )
    queries = {"a": "footwear", "b": "warm", "c": "head", "d": "same", "e": "same", "v": "sole", "t": "cap"}
    (beir / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": q, "text": text}) + "\n" for q, text in queries.items())
    )
    judged = {
        "train": [("a", 0, 3), ("a", 2, 1), ("a", 1, 0), ("b", 4, 1), ("b", 3, 2), ("c", 5, 2), ("c", 1, 1),
                  ("d", 0, 1), ("e", 1, 2), ("e", 0, 1)],
        "dev": [("v", 0, 1)], "test": [("t", 1, 1)],
    }  # fmt: skip
    for split, rows in judged.items():
        lines = "".join(f"{q}\t{d}\t{g}\n" for q, d, g in rows)
        (beir / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    folder = tmp_path / "run"
    recipe = config.load("cpu/search", [f"output_dir={folder}", f"task.path={beir}", "format.examples=0",
                                        "format.example_words=0", "task.train_filter.raw_ndcg_below=1.01"])  # fmt: skip
    places = {identifier: q for q, identifier in enumerate(open_environment(recipe).task.train.ids)}
    asked = [places[q] for q in "abcde" for _ in range(4)]
    written = [*["shoe", "red", "hat", "blue shoe red"] * 5]
    env = record(folder, recipe, [asked], lambda step, i, place: f" {written[i]}\n")
    result = rescore.rescore(folder, "{ndcg@2: 1}")
    assert result["ambiguous"] == 8  # two queries have one text, and targets of different grades
    rows = rows_of(folder)[:12]
    split = env.task.train.take(asked[:12])
    again = Scorer(env.format.parse, env.retriever, rewards.from_spec({"ndcg@2": 1.0}))
    expected = again.score_split([row["completion"] for row in rows], split).rewards
    assert result["all"]["new"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-6) and expected.std() > 0
    assert rescore.rescore(folder, "{ndcg@2: 1}", "bm25")["all"] == result["all"]
    for i, row in enumerate(rows := rows_of(folder)):
        row["query_id"] = "abcde"[i // 4]
    write_jsonl(folder / "rollouts.jsonl", rows)
    for retriever in (None, "bm25"):  # The ids say which of the two it is.
        result = rescore.rescore(folder, "{ndcg@2: 1}", retriever)
        assert (result["ambiguous"], result["completions"], result["all"]["groups"]) == (0, 20, 5)
        split = env.task.train.take(asked)
        expected = again.score_split([row["completion"] for row in rows], split).rewards
        assert result["all"]["new"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["edit", "items", "ranking"])
def test_the_run_s_own_retriever_still_grounds_titles_and_finds_candidates(tmp_path, action):
    folder = tmp_path / "run"
    edit = ["grounding.kind=bm25", "retriever={kind: ease, exclude_history: false, params: {regularization: 10.0}}"]
    if action == "ranking":
        settings = ["task.candidates=6", "format.repeat=1"]
        recipe = config.load(
            "quickstart", [f"output_dir={folder}", "format.action=ranking", "format.prompt=null", *settings]
        )
    else:
        settings = [f"task.path={plain_folder(tmp_path / 'shop')}", "task.params.fit_share=0.5", "format.examples=0"]
        settings += [f"format.action={action}", "format.prompt=null", *(edit if action == "edit" else [])]
        recipe = config.load("cpu/sequential", [f"output_dir={folder}", "rewards={ndcg@100: 1.0}", *settings])
    titles = open_environment(recipe).task.catalog.titles
    rng = np.random.default_rng(0)

    def completion(step, i, place):
        if action == "ranking":
            return " ".join(map(str, rng.permutation(6) + 1))
        return (
            f"more: {rng.choice(titles)}\nless: {rng.choice(titles)}" if action == "edit" else f"- {rng.choice(titles)}"
        )

    env = record(folder, recipe, [[q] * 4 for q in range(8)], completion)
    kind = "itemknn" if action == "edit" else "bm25"
    spec = json.dumps(recipe.rewards)
    result = rescore.rescore(folder, spec, kind, [] if action == "edit" else ["retriever.params.k1=0.1"])
    assert result["completions"] + result["ambiguous"] == 32 and result["completions"] >= 8
    if action != "edit":  # lists are not ranked by the retriever, so nothing else may change them
        assert result["all"]["new"] == result["all"]["recorded"]
        return
    other = open_environment(config.load(folder / "config.yaml", [f"retriever.kind={kind}", "retriever.params={}"]))
    rows, split = rows_of(folder), env.task.train.take([q for q in range(8) for _ in range(4)])
    scorer = Scorer(env.format.parse, other.retriever, rewards.from_spec({"ndcg@100": 1.0}),
                    floor=recipe.format.floor, grounder=env.scorer.grounder)  # fmt: skip
    expected = scorer.score_split([row["completion"] for row in rows], split).rewards
    if not result["ambiguous"]:
        assert result["all"]["new"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-6)
    assert result["all"]["new"]["mean"] != result["all"]["recorded"]["mean"]
