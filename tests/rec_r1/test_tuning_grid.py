"""The grid of losses and negatives: its sentences, rank correlations by brute force, and the page as a whole."""

import json
import math

import numpy as np
import pytest
from datasets_ import plain_folder
from test_report import Page

import retrievers
from rec_r1 import cli, config, tasks
from rec_r1.config import UserError
from rec_r1.similarity_gap import anti_affinity, grid_sentences, tuning_grid
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.tuning_grid import BASE, PRETRAINED, RANDOM, SETTINGS, WRITTEN, Grid, measure
from retrievers import Query
from retrievers.encoders.sentence import Encoder
from retrievers.text.tuning import job, random_weights, train


def span(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


UP, DOWN, LEVEL = span(0.1, 0.05, 0.2), span(-0.1, -0.2, -0.05), span(0.0, -0.1, 0.1)


# ---- Sentences


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([UP, DOWN, LEVEL], "Pre-training on texts is shown to be a net gain under “a” and a net loss under “b”. Under "
                            "“c” it is not shown to be either."),
        ([UP, UP, UP], "Pre-training on texts is shown to be a net gain under “a”, “b” and “c”."),
        ([DOWN, LEVEL, LEVEL], "Pre-training on texts is shown to be a net loss under “a”. Under “b” and “c” it is not "
                               "shown to be either."),
        ([LEVEL, LEVEL, LEVEL], "Pre-training on texts is not shown to be a net gain or a net loss under any of “a”, "
                                "“b” and “c”."),
    ],
)  # fmt: skip
def test_the_answer_names_every_setting_by_its_interval(differences, expected):
    gains = [{"setting": name, "difference": found} for name, found in zip("abc", differences, strict=True)]
    assert grid_sentences.answer(gains) == expected


def test_sentences_go_both_ways():
    assert "is ahead of one with random weights in ndcg@10, +0.1000 [+0.0500" in grid_sentences.gain("a", UP)
    assert "is behind one" in grid_sentences.gain("a", DOWN)
    assert "is not shown to differ from one" in grid_sentences.gain("a", LEVEL)
    for found, phrase in (
        (UP, "Written negatives are shown to teach anti-affinity: they raise the rank correlation"),
        (DOWN, "do not teach anti-affinity: they are shown to lower"),
        (LEVEL, "are not shown to teach anti-affinity: they change"),
    ):
        section = {"reason": None, "base": "b", "rows": [{"name": "w", "difference": found}]}
        said = grid_sentences.taught(section, "w", "Written negatives")
        assert phrase in said and said.endswith("beside “b”.")
    none = {"reason": "few", "base": "b", "rows": []}
    assert grid_sentences.taught(none, "w", "Written negatives").endswith("was not measured: few.")
    unset = grid_sentences.taught({"reason": None, "base": "b", "rows": []}, "w", "Written negatives")
    assert unset == (
        "Whether written negatives teach anti-affinity was not measured: the recipe has no "
        "retriever.params.tuned.written."
    )


# ---- Anti-affinity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return plain_folder(tmp_path_factory.mktemp("grid") / "shop")


def loaded(folder, *more):
    recipe = config.load("cpu/sequential", [f"task.path={folder}", "task.params.raw_titles=2", *more])
    task = tasks.load(recipe.task)
    return recipe, task, HeldOut.of(task.test)


@pytest.mark.slow
def test_correlations_are_scipy_s_over_the_negative_scores_of_unseen_queries(folder, tiny_encoder, monkeypatch):
    from scipy.stats import spearmanr

    monkeypatch.setattr(anti_affinity, "FEWEST_ITEMS", 4)
    _, task, held_out = loaded(folder)
    ease = retrievers.open("ease", task.catalog, None, task.interactions, regularization=1.0)
    dense = retrievers.open("dense", task.catalog, model=str(tiny_encoder), device="cpu")
    titles = task.catalog.titles
    known = {
        " ".join(titles[row] for row in task.interactions.sequence(user)[max(0, end - 2) : end])
        for user in range(len(task.interactions))
        for end in range(1, len(task.interactions.sequence(user)))
    }
    places = anti_affinity.unseen(task, held_out)
    assert places.tolist() == [q for q, query in enumerate(held_out.queries) if query.text not in known]
    assert 0 < len(places) < len(held_out.queries)
    kept, found, pairs = anti_affinity.correlations(task, held_out, places, ease, {"a": [dense]})
    expected, total = {}, 0
    for place in places.tolist():
        query = held_out.queries[place]
        scores = ease.model.scores([Query(history=query.history[-2:])])[0]
        rows = [row for row in range(len(titles)) if scores[row] < 0 and row not in query.history]
        if len(rows) >= 4:
            cosines = dense.encoder.documents([task.catalog.texts[row] for row in rows]).astype(np.float32)
            expected[place] = spearmanr(cosines @ dense.encoder.queries([query.text])[0], scores[rows]).statistic
            total += len(rows)
    assert kept.tolist() == list(expected) and pairs == total and found["a"].shape == (1, len(expected))
    assert found["a"][0] == pytest.approx(list(expected.values()), abs=0.05)


def test_an_encoder_that_knows_the_scores_has_a_correlation_of_1_and_random_ones_do_not():
    class Known:
        """An encoder whose cosines with the documents are given."""

        def __init__(self, cosines):
            self.embeddings, self.encoder = cosines[:, None], self

        def queries(self, texts):
            return np.ones((len(texts), 1), np.float32)

    rng = np.random.default_rng(0)
    rows, scores = [np.arange(50)] * 40, [rng.normal(size=50) for _ in range(40)]
    taught = [anti_affinity._of_encoder(Known(s), ["q"], [r], [s])[0] for r, s in zip(rows, scores, strict=True)]
    random = [anti_affinity._of_encoder(Known(rng.normal(size=50)), ["q"], [r], [s])[0]
              for r, s in zip(rows, scores, strict=True)]  # fmt: skip
    users = [f"u{q % 20}" for q in range(40)]
    found = anti_affinity.compared({"base": np.array([random]), "taught": np.array([taught])}, "base", users, 40, 2000)
    base, row = found["rows"]
    assert base["difference"] is None and base["low"] < 0 < base["high"]
    assert row["mean"] == pytest.approx(1) and row["difference"]["low"] > 0.8
    few = anti_affinity.compared({"base": np.zeros((1, 4))}, "base", list("abca"), 4, 9)
    assert few["rows"] == [] and few["reason"].startswith("only 3 users have a held-out query")
    assert anti_affinity._of_encoder(Known(np.zeros(5)), ["q"], [np.arange(5)], [np.arange(5.0)]) == [0.0]


# ---- Random weights


@pytest.mark.slow
def test_a_random_twin_has_the_architecture_and_no_weight_of_the_encoder(tiny_encoder, tmp_path):
    encoder = Encoder(str(tiny_encoder), device="cpu")
    made = [random_weights.save(encoder, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    a, b, c = (Encoder(str(folder), device="cpu") for folder in made)
    texts = ["party popper", "rain"]
    assert a.dimension == encoder.dimension
    assert np.array_equal(a.documents(texts), b.documents(texts))
    for one, other in ((a, c), (a, encoder)):
        assert not np.allclose(one.documents(texts), other.documents(texts), atol=1e-2)
    twin, own = (dict(each.model.loaded.named_parameters()) for each in (a, encoder))
    for (name, one), (same, other) in zip(twin.items(), own.items(), strict=True):
        assert name == same and one.shape == other.shape
        if "embeddings.weight" in name and one.std() > 0:
            assert not np.allclose(one.detach(), other.detach())
    before = (tmp_path / "a" / "modules.json").stat().st_mtime_ns
    random_weights.save(encoder, tmp_path / "a", 0)
    assert (tmp_path / "a" / "modules.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_encoder_with_weights_elsewhere_has_no_twin(tmp_path):
    from retrievers.encoders import lsa

    folder = lsa.fit(["red shoes", "blue shoes", "garden hose"], tmp_path / "lsa", dimensions=2)
    with pytest.raises(ValueError, match=r"has weights outside a Transformer, and no random .* these: take another"):
        random_weights.save(Encoder(str(folder)), tmp_path / "twin", 0)
    assert not (tmp_path / "twin").exists()


# ---- The verb


SMALL = "epochs: 1, positives: 2, batch_size: 16"


@pytest.mark.slow
def test_every_cell_has_the_keys_of_its_setting(folder, tiny_encoder):
    more = "hard: 2, affinity: {kind: ease, params: {top: 5}}, anti_affinity: 3, written: 2, written_file: n.jsonl"
    params = f"retriever.params={{model: {tiny_encoder}, device: cpu, tuned: {{{SMALL}, {more}}}}}"
    recipe, task, held_out = loaded(folder, "retriever.kind=dense", params)
    grid = Grid(recipe, task, held_out, 2, [0.1])
    own = {"epochs": 1, "positives": 2, "batch_size": 16, "learning_rate": 0.1, "seed": 1}
    affinity = {"anti_affinity": 3, "affinity": {"kind": "ease", "params": {"top": 5}}}
    expected = [
        {"log_q": False}, {"log_q": True}, {"log_q": True, "hard": 2}, {"log_q": True, **affinity},
        {"log_q": True, "written": 2, "written_file": "n.jsonl"},
    ]  # fmt: skip
    for setting, keys in zip(SETTINGS, expected, strict=True):
        found = grid.params(PRETRAINED, 1, setting, 0.1)
        assert found == {"model": str(tiny_encoder), "device": "cpu", "tuned": own | keys}
        retrievers.check_parameters("dense", found)
    twins = {grid.params(RANDOM, seed, BASE, 0.1)["model"] for seed in (0, 1)}
    assert len(twins) == 2 and str(tiny_encoder) not in twins
    assert "tuned" not in grid.params(PRETRAINED, 0, None, 0.0)
    grid.base["pooling"] = "cls"  # The folder of a twin holds its pooling, too.
    assert grid.params(RANDOM, 0, BASE, 0.1)["model"] not in twins


@pytest.mark.slow
def test_the_whole_verb_and_a_second_call_that_fits_nothing(folder, tiny_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_run", lambda where, device: train.run(where))
    settings = (BASE, tuning_grid.AFFINITY, WRITTEN)  # The others take time, and are like them.
    monkeypatch.setattr(tuning_grid, "SETTINGS", settings)
    monkeypatch.setattr(anti_affinity, "FEWEST_ITEMS", 2)
    monkeypatch.setattr(anti_affinity, "FEWEST_USERS", 2)
    from rec_r1.generation import written_negatives

    monkeypatch.setattr(written_negatives, "generate", lambda m, t, prompts, *_: [f"text {p}" for p in prompts])
    monkeypatch.setattr(written_negatives.models, "load_policy_for_evaluation", lambda *_: None)
    monkeypatch.setattr(written_negatives.models, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(written_negatives.models, "resolve", lambda name: name)
    file = tmp_path / "n.jsonl"
    more = (
        f"written: 1, written_file: {file}, anti_affinity: 1, affinity: {{kind: ease, params: {{regularization: 1.0}}}}"
    )
    arguments = [
        "tuning-grid", "cpu/sequential", f"task.path={folder}", "task.params.raw_titles=2", "retriever.kind=dense",
        f"retriever.params={{model: {tiny_encoder}, device: cpu, tuned: {{{SMALL}, {more}}}}}",
        "--learning-rate", "1e-3", "--learning-rate", "1e-2", "--seeds", "2", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert cli.main([*arguments, "--write", "policy"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "tuning-grid.json").read_text(encoding="utf-8"))
    page = Page(tmp_path / "out" / "tuning-grid.html")
    assert found["answer"] in printed and found["answer"] in page.text
    assert [row["setting"] for row in found["gains"]] == [setting.name for setting in settings]
    assert len(found["cells"]) == 6 and {cell["start"] for cell in found["cells"]} == {PRETRAINED, RANDOM}
    for cell in found["cells"]:
        assert len(cell["seeds"]) == len(cell["epochs"]) == 2 and cell["low"] <= cell["mean"] <= cell["high"]
        assert cell["mean"] == pytest.approx(np.mean(cell["seeds"]))
        best = max(cell["validation"], key=lambda rate: cell["validation"][rate])
        assert f"{cell['learning_rate']:g}" == best
        assert (cell["probe"] is not None) == (cell["setting"] == WRITTEN.name)
    by = {(cell["start"], cell["setting"]): cell["mean"] for cell in found["cells"]}
    for row in found["gains"]:
        expected = by[PRETRAINED, row["setting"]] - by[RANDOM, row["setting"]]
        assert row["difference"]["mean"] == pytest.approx(expected) and row["sentence"] in page.text
    for row in found["effects"]:
        base = by[row["start"], BASE.name]
        if row["setting"] == BASE.name:
            assert row["beside"] is row["sentence"] is None
        else:
            assert row["beside"]["mean"] == pytest.approx(by[row["start"], row["setting"]] - base)
            assert row["sentence"] in page.text
    names = [row["name"] for row in found["anti_affinity"]["rows"]]
    assert names == ["frozen", *(setting.name for setting in settings)]
    assert all(sentence in page.text for sentence in found["anti_affinity"]["sentences"])
    markdown = (tmp_path / "out" / "tuning-grid.md").read_text(encoding="utf-8")
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {4, 5, 6} and found["answer"] in markdown.replace("\\", "")

    monkeypatch.setattr(job, "tune", lambda *_: pytest.fail("fitted again"))
    assert cli.main(arguments) == 0
    again = json.loads((tmp_path / "out" / "tuning-grid.json").read_text(encoding="utf-8"))
    about = [result.pop("about") for result in (found, again)]
    assert again == found and about[0]["settings"] == about[1]["settings"]


@pytest.mark.slow
def test_the_values_are_those_of_the_retriever(folder, tiny_encoder, monkeypatch):
    monkeypatch.setattr(job, "_run", lambda where, device: train.run(where))
    params = f"retriever.params={{model: {tiny_encoder}, device: cpu, tuned: {{{SMALL}}}}}"
    recipe, task, held_out = loaded(folder, "retriever.kind=dense", params)
    monkeypatch.setattr(tuning_grid, "SETTINGS", (BASE,))
    found = measure(recipe, seeds=1, learning_rates=[1e-3])
    assert not [row for row in found["gains"] if row["setting"] == WRITTEN.name]
    assert found["anti_affinity"]["sentences"][0].startswith("Whether written negatives teach anti-affinity was not")
    grid = Grid(recipe, task, held_out, 1, [1e-3])
    backend = retrievers.Unseen(grid.open(grid.params(RANDOM, 0, BASE, 1e-3)), len(task.catalog))
    ranks = backend.ranks(held_out.queries, held_out.targets)[:, 0]
    expected = np.mean([1 / math.log2(1 + rank) if 0 < rank <= 10 else 0 for rank in ranks])
    cell = next(c for c in found["cells"] if (c["start"], c["setting"]) == (RANDOM, BASE.name))
    assert cell["mean"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], {}, "retriever.kind: bm25: the grid tunes an encoder: set retriever.kind=dense"),
        (["retriever.kind=dense"], {"seeds": 0}, "--seeds must be at least 1, got 0"),
        (["retriever.kind=dense"], {"learning_rates": []}, "--learning-rate: give at least one"),
        (
            ["retriever.kind=dense", "retriever.params={tuned: {seed: 3}}"],
            {},
            "tuned.seed: the grid sets it itself: leave",
        ),
        (
            ["retriever.kind=dense", "retriever.params={tuned: {learning_rate: 0.1}}"],
            {},
            "tuned.learning_rate: the grid sets it itself: give --learning-rate: leave it out",
        ),
        (["retriever.kind=dense", "retriever.params={modle: x}"], {}, "retriever.params.modle"),
        (["retriever.kind=dense", "retriever.params={tuned: 3}"], {}, "retriever.params.tuned"),
    ],
)
def test_what_is_no_grid_is_refused(settings, options, message, folder):
    with pytest.raises(UserError, match=message):
        measure(config.load("cpu/sequential", [f"task.path={folder}", *settings]), **options)


def test_a_task_without_a_validation_split_is_refused(folder, monkeypatch):
    import dataclasses

    real = tuning_grid.load

    def without(recipe, split):
        task, held_out = real(recipe, split)
        bare = dataclasses.replace(task.interactions, validation_histories=(), validation_targets=())
        return dataclasses.replace(task, interactions=bare), held_out

    monkeypatch.setattr(tuning_grid, "load", without)
    with pytest.raises(UserError, match="has no validation split, which chooses the learning rates"):
        measure(config.load("cpu/sequential", [f"task.path={folder}", "retriever.kind=dense"]))
