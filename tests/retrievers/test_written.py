"""Negatives that a language model wrote, and the source probe, by brute force and by simulations."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tuned import FIT, JUDGMENTS, TEXTS, N, make_catalog, make_interactions
from tiny_encoder import tiny_encoder

import retrievers
from retrievers import Interactions
from retrievers.text.analysis import words
from retrievers.text.dense import Params
from retrievers.text.tuning import job, source_probe, train, written
from retrievers.text.tuning.pairs import from_interactions, from_judgments
from retrievers.text.tuning.settings import Tuned

IDS = [f"d{i}" for i in range(N)]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def row(query, positive, *negatives, **more):
    return {"query": query, "positive": positive, "negatives": list(negatives), **more}


# ---- The file


def test_a_file_is_read_by_pair_and_other_keys_are_ignored(tmp_path):
    rows = [row("wet", "d0", "a wet floor", by="a model"), row("wet", "d1"), row("wet", "d0", "wet paint ☕")]
    path = write(tmp_path / "n.jsonl", rows)
    assert written.read(path) == {("wet", "d0"): ["a wet floor", "wet paint ☕"], ("wet", "d1"): []}
    same = write(tmp_path / "m.jsonl", [row("wet", "d1", completion="x"), *rows[:1], *rows[2:]])
    assert written.fingerprint(same) == written.fingerprint(path)
    assert written.fingerprint(write(tmp_path / "m.jsonl", rows[:2])) != written.fingerprint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"written_file: .* does not exist: `rec-r1 fit RECIPE --write policy` writes it"),
        (
            '{"query": "a", "positive": "d0", "negatives": []}\n{"query"',
            r"line 2 is no JSON .*: write {\"query\": TEXT",
        ),
        ('{"query": "a", "positive": 1, "negatives": []}', "line 1 has other keys or types: write"),
        ('{"query": "a", "positive": "d0", "negatives": "b"}', "line 1 has other keys or types"),
        ('{"query": "a", "positive": "d0", "negatives": [1]}', "line 1 has other keys or types"),
        ("[]", "line 1 has other keys or types"),
        (b"\xff", "cannot be read .*UTF-8"),
    ],
)
def test_any_other_file_is_refused(content, message, tmp_path):
    path = tmp_path / "n.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        written.read(path)


# ---- Which texts a pair gets


def test_texts_that_are_no_negatives_are_counted_and_left_out():
    pairs = from_judgments(JUDGMENTS, 1, None, 0)
    found = {
        ("wet", "d0"): ["Garden hose, SMALL!", "garden hose large", "?!", "a garden sock", "A Garden sock.", "a snake"],
        ("sharp", "d8"): [],
        ("seat", "d16"): ["an office sofa"],  # A query of the validation split.
        ("wet", "d20"): ["a desk"],  # Not relevant to this query.
    }
    made = written.of_pairs(pairs, found, IDS, TEXTS, 3, seed=0)
    assert made.texts == ["a garden sock", "a snake"]
    assert made.counts == {
        "pairs": 9, "with_text": 1, "texts": 2,
        "empty": 1, "positive": 1, "relevant": 1, "duplicates": 1, "other_pairs": 2,
    }  # fmt: skip
    for x, key in enumerate(written.keys_of(pairs, IDS)):
        assert sorted(made.numbers[x].tolist()) == ([-1, 0, 1] if key == ("wet", "d0") else [-1, -1, -1])


@given(st.integers(0, 999), st.integers(1, 3))
def test_every_pair_gets_different_usable_texts_of_its_own_key(seed, count):
    rng = np.random.default_rng(seed)
    data = Interactions.from_sequences(N, [rng.permutation(N)[:4].tolist() for _ in range(5)])
    pairs = from_interactions(data, TEXTS, 2, None, 0)
    keys = written.keys_of(pairs, IDS)
    pool = [*TEXTS, "", "a b", "A  b!", "c"]
    found = {key: [pool[i] for i in rng.integers(0, len(pool), rng.integers(0, 6))] for key in set(keys)}
    made = written.of_pairs(pairs, found, IDS, TEXTS, count, seed)
    for x, key in enumerate(keys):
        users = {pairs.group[y] for y, other in enumerate(keys) if other == key}
        known = [words(TEXTS[r]) for y in range(len(pairs)) if pairs.group[y] in users for r in pairs.known_of(y)]
        allowed = {tuple(words(text)) for text in found[key] if words(text) and words(text) not in known}
        given_ = [tuple(words(made.texts[number])) for number in made.numbers[x] if number >= 0]
        assert set(given_) <= allowed and len(given_) == len(set(given_)) == min(count, len(allowed))
    assert made.counts["texts"] == len(made.texts) == len(set(made.texts))
    again = written.of_pairs(pairs, found, IDS, TEXTS, count, seed)
    assert np.array_equal(again.numbers, made.numbers)


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"written": -1, "written_file": "n"}, r"tuned\.written must be an integer >= 0, got -1"),
        ({"written": 1}, r"tuned\.written: 1 needs texts: name a file in tuned\.written_file"),
        ({"written_file": "n.jsonl"}, r"tuned\.written_file: nothing reads it without written"),
        ({"written": 1, "written_file": 3}, r"tuned\.written_file must be null, or the path of a JSONL file, got 3"),
        ({"written": 1, "written_file": ""}, r"tuned\.written_file must be null, or the path"),
    ],
)
def test_a_wrong_value_is_named(tuned, message):
    with pytest.raises(ValueError, match=message):
        Params(tuned=tuned)


def test_the_content_of_the_file_is_part_of_an_index_s_name(tmp_path):
    path = write(tmp_path / "n.jsonl", [row("wet", "d0", "a wet floor")])
    tuned = {"tuned": {"written": 1, "written_file": str(path)}}
    nested = {"retrievers": [{"kind": "bm25"}, {"kind": "dense", "params": tuned}]}
    before = retrievers.content_hashes("dense", tuned)
    assert before == retrievers.content_hashes("hybrid", nested) == [written.fingerprint(path)]
    write(path, [row("wet", "d0", "another text")])
    assert retrievers.content_hashes("dense", tuned) != before
    assert retrievers.content_hashes("dense", {"tuned": {}}) == retrievers.content_hashes("bm25", {}) == []
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        retrievers.content_hashes("hybrid", nested)


# ---- The source probe


def test_no_query_document_or_text_is_in_two_groups():
    pairs = from_interactions(make_interactions(), TEXTS, 2, None, 0)
    numbers = np.random.default_rng(0).integers(-1, 30, (len(pairs), 2))
    groups = source_probe.groups_of(pairs, numbers, seed=0)
    chosen = groups[:, 0]
    assert len(groups) > 5 and (numbers[chosen, 0] == groups[:, 1]).all() and (groups[:, 1] >= 0).all()
    for column in (pairs.query[chosen], pairs.row[chosen], groups[:, 1]):
        assert len(set(column.tolist())) == len(groups)


@pytest.mark.slow
def test_the_auc_is_scikit_learn_s_of_the_unseen_folds(monkeypatch):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 8))
    fake = real + rng.normal(size=(60, 8)) + 0.4
    seen = []
    wins = source_probe._wins

    def recorded(written_, real_, fold):
        seen.append((fold, found := wins(written_, real_, fold)))
        return found

    monkeypatch.setattr(source_probe, "_wins", recorded)
    found = source_probe.probe(fake, real, 0)
    assert sorted(np.concatenate([fold for fold, _ in seen]).tolist()) == list(range(60))
    expected = 0.0
    for fold, _ in seen:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        rest = np.setdiff1d(np.arange(60), fold)
        x, y = np.concatenate([fake[rest], real[rest]]), [1] * len(rest) + [0] * len(rest)
        scale = StandardScaler().fit(x)
        model = LogisticRegression(C=source_probe.STRENGTH, max_iter=1000).fit(scale.transform(x), y)
        scores = model.decision_function(scale.transform(np.concatenate([fake[fold], real[fold]])))
        expected += roc_auc_score([1] * len(fold) + [0] * len(fold), scores) * len(fold) / 60
    assert found["auc"] == pytest.approx(expected, abs=1e-4) and found["low"] < found["auc"] < found["high"]


@pytest.mark.slow
def test_the_probe_is_calibrated():
    """With one source for both sides, about 95% of its intervals contain 0.5; with two sources, its AUC is near 1.

    Without the factor `WIDER`, 81 and 85 of the 100 intervals would contain it.
    """
    rng, simulations = np.random.default_rng(0), 100
    for about in (1.0, 0.0):  # What a pair is about: its two texts resemble each other, or not.
        covered = above = 0
        for seed in range(simulations):
            centres = about * rng.normal(size=(120, 32))
            fake, real = (centres + rng.normal(size=centres.shape) for _ in range(2))
            found = source_probe.probe(fake, real, seed)
            covered += found["low"] <= 0.5 <= found["high"]
            above += found["low"] > 0.5
        assert covered >= 0.9 * simulations and above <= 0.06 * simulations, (about, covered, above)
    found = source_probe.probe(real + np.eye(32)[0] * 6, real, 0)
    assert found["low"] > 0.97 and "instead of what is relevant" in source_probe.sentence(found)


def test_the_sentence_says_what_the_interval_says():
    said = {
        (0.99, 0.97, 1.0): "so the encoder can learn who wrote a text instead of what is relevant",
        (0.7, 0.6, 0.8): "tells some written negatives from documents",
        (0.95, 0.85, 1.0): "tells some written negatives from documents",
        (0.55, 0.45, 0.65): "is not shown to tell written negatives from documents",
    }
    for (auc, low, high), words_ in said.items():
        sentence = source_probe.sentence({"auc": auc, "low": low, "high": high, "groups": 100})
        assert words_ in sentence and f"AUC {auc:.3f} [{low:.3f}, {high:.3f}]" in sentence
    few = source_probe.probe(np.zeros((24, 2)), np.zeros((24, 2)))
    assert few == {"auc": None, "low": None, "high": None, "groups": 24}
    assert source_probe.sentence(few).endswith("only 24 pairs with a written text share no query and no document, and "
                                               "it needs 25: it was not made")  # fmt: skip


# ---- Fits


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny encoder of the catalogue's words."""
    return str(tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny", [*TEXTS, "a the toy"]))


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs what the process of a fit runs in the process of the test, which has imported everything already."""
    monkeypatch.setattr(job, "_run", lambda folder, device: train.run(folder))


def written_file(path, pairs, text=lambda key: f"a {key[0]} toy"):
    return write(path, [row(*key, text(key)) for key in dict.fromkeys(written.keys_of(pairs, IDS))])


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_fit_reads_written_texts_and_reports_them(encoder, tmp_path, monkeypatch):
    tuned = {**FIT, "epochs": 1, "hard": 1, "keep": 0.1, "written": 1, "written_file": str(tmp_path / "n.jsonl")}
    data = make_interactions()
    pairs = job.pairs_of(Tuned(**tuned | {"written": 0, "written_file": None}), data, make_catalog())
    written_file(tmp_path / "n.jsonl", pairs)
    real, seen = job._run, []

    def shown(folder, device):
        from retrievers.text.tuning.job_folder import Job

        given_ = Job(folder)
        columns = given_.columns(list(range(len(pairs))))
        seen.extend(zip(columns["query"], columns["negative_2"], columns["label"], strict=True))
        frozen = np.load(folder / "frozen_documents.npy")
        assert len(frozen) == N + len(given_.written) and columns["negative_1"][0] in TEXTS
        real(folder, device)

    monkeypatch.setattr(job, "_run", shown)
    params = {"model": encoder, "device": "cpu", "tuned": tuned}
    made = retrievers.open("dense", make_catalog(), tmp_path / "a" / "index", data, **params)
    assert all(text == f"a {query} toy" and label[-1] >= N for query, text, label in seen) and len(seen) == len(pairs)
    report = made.report["written"]
    assert report["with_text"] == report["pairs"] == len(set(written.keys_of(pairs, IDS)))
    assert set(report["probe"]) == {"auc", "low", "high", "groups"} and report["says"].startswith("source probe: ")
    monkeypatch.setattr(job, "tune", lambda *_: pytest.fail("tuned again"))
    again = retrievers.open("dense", make_catalog(), tmp_path / "a" / "index", data, **params)
    assert again.report == made.report and again.fingerprint == made.fingerprint
    # The place of the file does not matter, but its texts do.
    (tmp_path / "n.jsonl").rename(tmp_path / "moved.jsonl")
    params["tuned"] = tuned | {"written_file": str(tmp_path / "moved.jsonl")}
    moved = retrievers.open("dense", make_catalog(), tmp_path / "a" / "index", data, **params)
    assert moved.fingerprint == made.fingerprint
    written_file(tmp_path / "moved.jsonl", pairs, lambda key: f"the {key[0]} toy")
    with pytest.raises(retrievers.RetrieverError, match="built with another encoder"):
        retrievers.open("dense", make_catalog(), tmp_path / "a" / "index", data, **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_encoder_learns_that_written_texts_are_not_relevant(encoder, tmp_path):
    """With the queries' own words as negatives, the cosine of query and negative falls below that of another fit."""
    data, found = make_interactions(), {}
    pairs = job.pairs_of(Tuned(**FIT), data, make_catalog())
    file = written_file(tmp_path / "n.jsonl", pairs, lambda key: f"{key[0]} cheap cheap")
    for name, more in (("with", {"written": 1, "written_file": str(file)}), ("without", {})):
        made = retrievers.open("dense", make_catalog(), None, data, model=encoder, device="cpu", tuned={**FIT, **more})
        queries = list(dict.fromkeys(pairs.texts))
        vectors = [made.encoder.queries(queries), made.encoder.documents([f"{q} cheap cheap" for q in queries])]
        found[name] = float((vectors[0] * vectors[1].astype(np.float32)).sum(1).mean())
    assert found["with"] < found["without"] - 0.05, found


def test_a_file_without_texts_for_the_pairs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("a process was started"))
    file = write(tmp_path / "n.jsonl", [row("seat", "d16", "a sofa"), row("wet", "d0", "Garden hose small")])
    tuned = {"written": 1, "written_file": str(file)}
    with pytest.raises(ValueError, match=r"has no usable text for the 9 pairs .* \(1 are for other pairs\): write"):
        retrievers.open("dense", make_catalog(), tmp_path / "index", judgments=JUDGMENTS, device="cpu", tuned=tuned)
    assert not (tmp_path / "index").exists()
