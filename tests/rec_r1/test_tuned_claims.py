"""The claims about a tuned encoder: how it is tuned, and what is compared with what."""

import json
import logging

import numpy as np
import pytest
from datasets_ import plain_folder
from test_report import Page

from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.similarity_gap import claims, cross, dimension, systems, tuned_claims
from rec_r1.similarity_gap.dimension import CHOICES
from rec_r1.similarity_gap.measure import measure
from rec_r1.similarity_gap.measured import seeded
from rec_r1.similarity_gap.vectors import Choices
from retrievers.text.tuning import job, train

TUNED = {"epochs": 1, "positives": 2, "batch_size": 16, "learning_rate": 0.01, "seed": 3}
ON = "ease {regularization: 10}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("tuned") / "shop")


def recipe_of(folder, tuned=TUNED, more=""):
    params = f"retriever.params={{tuned: {json.dumps(tuned)}{more}}}"
    return config.load("cpu/sequential", [f"task.path={folder}", "retriever.kind=dense", params])


@pytest.fixture
def fits(monkeypatch):
    """The settings of each fit, which runs in this process."""
    found = []

    def run(where, _device):
        found.append(json.loads((where / "job.json").read_text())["tuned"])
        return train.run(where)

    monkeypatch.setattr(job, "_run", run)
    return found


def by_key(found):
    return {row["key"]: row for row in found["claims"]["rows"]}


@pytest.mark.slow
def test_the_recipe_says_how_the_encoder_is_tuned(folder, tiny_encoder, fits, tmp_path, monkeypatch, capsys):
    arguments = [
        "similarity-gap", "cpu/sequential", f"task.path={folder}", "retriever.kind=dense",
        f"retriever.params={{tuned: {json.dumps(TUNED)}}}", "--encoder", str(tiny_encoder), "--on", ON, "--seeds", "2",
        "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    encoders, crossed = fits[:2], fits[2:]  # Each encoder has a cross-encoder, which takes the defaults.
    assert [each["seed"] for each in encoders] == [3, 4] and [each["seed"] for each in crossed] == [0, 1]
    assert all(each[name] == value for each in encoders for name, value in TUNED.items() if name != "seed")
    assert all(each[name] == value for each in crossed for name, value in cross.TUNED.items())
    found = json.loads((tmp_path / "out" / "similarity-gap.json").read_text())
    page = Page(tmp_path / "out" / "similarity-gap.html")
    assert found["about"]["tuned"] == TUNED and "learning_rate: 0.01" in page.text
    rows = by_key(found)
    for key in ("tuning", "objective"):
        assert rows[key]["verdict"] != claims.NOT_MEASURED
        assert rows[key]["sentence"] in page.text and rows[key]["sentence"] in printed
    name = f"text: {tiny_encoder}, tuned"
    assert (
        rows["tuning"]["systems"] == {"full": name, "reduced": f"text: {tiny_encoder}"} and rows["tuning"]["seeds"] == 2
    )
    assert rows["objective"]["systems"] == {"full": ON, "reduced": name}
    assert rows["tuning"]["full"] == pytest.approx(rows["objective"]["reduced"])
    check_dimensions(found, page, tiny_encoder, name)
    check_general(found, page, tiny_encoder, name)
    fits.clear()
    monkeypatch.setattr(systems, "_ranks", lambda *_: pytest.fail("ranked again"))
    monkeypatch.setattr(Choices, "_decomposed", property(lambda _: pytest.fail("decomposed again")))
    assert cli.main(arguments) == 0 and not fits


def check_dimensions(found, page, encoder, tuned):
    """The sweep of a page: its last column is what the other sections have, and its sentence follows from the rows."""
    rows, section, names = by_key(found), found["claims"]["dimensions"], [f"text: {encoder}", tuned, CHOICES]
    assert section["dimensions"] == [8, 16, 32] and [row["system"] for row in section["rows"]] == names
    frozen, fitted, choices = (row["values"] for row in section["rows"])
    table = {row["system"]: row["metrics"]["ndcg@10"]["mean"] for row in found["utility"][0]["rows"]}
    assert frozen[-1]["mean"] == pytest.approx(table[f"text: {encoder}"])
    assert fitted[-1]["mean"] == pytest.approx(rows["tuning"]["full"])
    assert rows["dimension"]["lead"]["mean"] == pytest.approx(fitted[-1]["mean"] - fitted[-2]["mean"])
    assert rows["alignment"]["lead"]["mean"] == pytest.approx(choices[-1]["mean"] - fitted[-1]["mean"])
    verdicts = rows["dimension"]["verdict"], rows["alignment"]["verdict"]
    assert section["sentence"] == dimension.limit(tuned, 32, *verdicts) and section["sentence"] in page.text


def check_general(found, page, encoder, tuned):
    row, section = by_key(found)["forgetting"], found["claims"]["general"]
    assert section["name"] == "emoji" and section["queries"] == 644 and len(section["after"]) == 2
    assert any(fit["epochs"] for fit in section["after"]) and row["users"] is None and row["of"] == "emoji"
    assert row["systems"] == {"full": f"text: {encoder}, before tuning", "reduced": tuned}
    changed = [fit["mean"] for fit in section["after"] if fit["epochs"]]
    after = np.mean(changed)
    assert row["lead"]["mean"] == pytest.approx(section["before"]["mean"] - after)
    assert row["sentence"] in page.text and row["seeds"] == len(changed)


@pytest.mark.slow
def test_quick_tunes_nothing(folder, tiny_encoder, fits):
    found = measure(recipe_of(folder), "test", [ON], [str(tiny_encoder)], 1, tuned=False)
    assert not fits and found["about"]["tuned"] is None
    for claim in (*tuned_claims.OBJECTIVE, claims.FORGETTING, *dimension.CLAIMS):
        assert by_key(found)[claim.key]["sentence"] == f"Not measured: {tuned_claims.NOT_TUNED}."
    assert by_key(found)[claims.REST.key]["sentence"] == f"Not measured: {cross.QUICK}."
    section = found["claims"]["dimensions"]
    assert [row["system"] for row in section["rows"]] == [f"text: {tiny_encoder}", CHOICES]
    assert section["sentence"] is None


def test_a_wrong_setting_is_refused_before_anything_is_measured(folder, monkeypatch):
    monkeypatch.setattr("rec_r1.similarity_gap.measure.open_systems", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"retriever\.params\.tuned.*epochs"):
        measure(recipe_of(folder, {"epochs": 0}), "test", [ON], ["lsa"])


@pytest.mark.slow
def test_a_setting_of_the_recipe_that_cannot_be_used_on_the_task_is_an_error(folder, tiny_encoder):
    with pytest.raises(UserError, match="tuned on judgments, but there are none"):
        measure(recipe_of(folder, {"on": "judgments"}), "test", [ON], [str(tiny_encoder)], 1)


def test_other_parameters_of_the_recipe_are_named(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert tuned_claims.settings_of(recipe_of(folder, more=", batch_size: 8")) == TUNED
    assert "retriever.params.batch_size: not used" in caplog.text
    assert tuned_claims.settings_of(config.load("cpu/sequential", [f"task.path={folder}"])) == {}


def test_the_default_fit_keeps_the_name_of_its_index():
    assert seeded({}, 3) == [{}, {"seed": 1}, {"seed": 2}]
    assert [each["seed"] for each in seeded({"seed": np.int64(2)}, 2)] == [2, 3]
