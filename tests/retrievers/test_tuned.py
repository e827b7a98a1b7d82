"""`dense` with `tuned`: fits of a tiny encoder, which are interrupted, damaged and used again."""

import re
import shutil

import numpy as np
import pytest
from serving import serve
from tuned_data import FIT, JUDGMENTS, TEXTS, N, encoder, in_this_process, make_catalog, make_interactions

import retrievers
from retrievers import Judgments, Query, RetrieverError
from retrievers.encoders.sentence import Encoder
from retrievers.interactions import raw_query
from retrievers.text.tuning import encoder_fit, job, train, trainer
from retrievers.text.tuning.job_folder import ERROR
from retrievers.text.tuning.loss import Objective

__all__ = ["encoder", "in_this_process"]  # Fixtures.


@pytest.fixture(scope="module")
def fitted(encoder, tmp_path_factory):
    """A folder with an index that was tuned on interactions by a process of its own, with all kinds of negatives."""
    folder = tmp_path_factory.mktemp("fitted")
    more = {"hard": 1, "anti_affinity": 1, "keep": 0.1, "affinity": {"kind": "ease", "params": {"regularization": 1.0}}}
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, **more}}
    made = retrievers.open("dense", make_catalog(), folder / "index", make_interactions(), **params)
    return folder, params, made


@pytest.mark.slow
def test_a_fit_leaves_a_tuned_encoder_and_a_report(fitted, encoder):
    folder, _, made = fitted
    report = made.report
    assert report["on"] == "interactions" and report["pairs"] == 120 and report["ran"] == len(report["ndcg@10"]) == 2
    assert (report["steps"], report["batch"]) == (8, 15)
    metrics = [report["before"], *report["ndcg@10"]]
    assert report["epochs"] == int(np.argmax(metrics)) > 0 and all(0 <= metric <= 1 for metric in metrics)
    assert retrievers.fitted_on(made) == {make_interactions().fingerprint} and retrievers.reads_text(made)
    assert list(retrievers.fits(made)) == [("dense", report)]
    client = retrievers.open("remote", make_catalog(), url=serve(made, make_catalog()))
    assert retrievers.fitted_on(client) == retrievers.fitted_on(made) and client.fingerprint == made.fingerprint
    own = Encoder(str(folder / "index" / "encoder"))
    assert own.model.loaded.max_seq_length == Encoder(encoder).model.loaded.max_seq_length > 64
    assert np.allclose(own.documents(TEXTS), made.embeddings, atol=1e-3)
    frozen = retrievers.open("dense", make_catalog(), model=encoder, device="cpu")
    assert not np.allclose(frozen.embeddings, made.embeddings, atol=1e-2) and retrievers.fitted_on(frozen) == set()
    assert sorted(path.name for path in folder.iterdir()) == ["index", "index.lock"]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.slow
def test_the_metric_of_the_report_is_that_of_the_retriever(fitted):
    _, _, made = fitted
    data = make_interactions()
    texts = [raw_query(TEXTS, history, 1) for history in data.validation_histories]
    asked = [Query(text, history) for text, history in zip(texts, data.validation_histories, strict=True)]
    ranks = retrievers.Unseen(made, N).ranks(asked, np.array(data.validation_targets)[:, None])[:, 0]
    expected = np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
    assert made.report["ndcg@10"][made.report["epochs"] - 1] == pytest.approx(expected, abs=0.02)


@pytest.mark.slow
def test_another_engine_uses_the_tuned_encoder_again(fitted, monkeypatch):
    folder, params, made = fitted
    monkeypatch.setattr(job, "tune", lambda *_: pytest.fail("tuned again"))
    again = retrievers.open("dense", make_catalog(), folder / "index", make_interactions(), **params)
    assert again.fingerprint == made.fingerprint
    faiss = retrievers.open("dense", make_catalog(), folder / "faiss", make_interactions(), **params, engine="faiss")
    queries = [Query("garden"), Query("lamp")]
    assert faiss.search(queries, 5).rows.tolist() == made.search(queries, 5).rows.tolist()
    assert faiss.report == made.report and faiss.fingerprint != made.fingerprint
    shutil.rmtree(folder / "faiss")


@pytest.mark.slow
def test_a_folder_of_other_data_or_a_damaged_encoder_is_refused(fitted, tmp_path, monkeypatch):
    folder, params, _ = fitted
    with pytest.raises(RetrieverError, match="built with another encoder"):
        retrievers.open("dense", make_catalog(), folder / "index", make_interactions(seed=1), **params)
    shutil.copytree(folder / "index", tmp_path / "index")
    weights = tmp_path / "index" / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(RetrieverError, match=r"is damaged .*tuned encoder.*delete the folder"):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("tuned again, as the damaged encoder is not taken"))
    with pytest.raises(pytest.fail.Exception, match="tuned again"):
        retrievers.open("dense", make_catalog(), tmp_path / "other", make_interactions(), engine="faiss", **params)
    shutil.rmtree(tmp_path / "index" / "encoder")
    with pytest.raises(RetrieverError, match=r"is damaged .*tuned encoder.*delete the folder"):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_an_interrupted_fit_continues_and_ends_the_same(encoder, tmp_path, monkeypatch):
    # There are eight steps in an epoch, so that one checkpoint is in the middle.
    monkeypatch.setattr(trainer, "STEPS_BETWEEN_CHECKPOINTS", 3)
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "epochs": 3}}
    whole = retrievers.open("dense", make_catalog(), tmp_path / "whole" / "index", make_interactions(), **params)
    real, calls = encoder_fit.measure, []

    def interrupted(*given_):
        calls.append(1)
        if len(calls) == 3:  # At the end of the second epoch.
            raise KeyboardInterrupt
        return real(*given_)

    folder = tmp_path / "cut" / "index"
    with monkeypatch.context() as patch:
        patch.setattr(encoder_fit, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("dense", make_catalog(), folder, make_interactions(), **params)
    assert not folder.exists()
    assert trainer.last_checkpoint(folder.parent / ".index.tuning" / "checkpoints").name == "checkpoint-15"
    measured = []
    monkeypatch.setattr(encoder_fit, "measure", lambda *given_: measured.append(1) or real(*given_))
    again = retrievers.open("dense", make_catalog(), folder, make_interactions(), **params)
    assert len(measured) == 2 and again.report == whole.report and again.fingerprint == whole.fingerprint
    assert sorted(path.name for path in folder.parent.iterdir()) == ["index", "index.lock"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_lora_is_merged_and_the_seed_decides(encoder, tmp_path):
    lora = {"r": 2, "target_modules": ["query", "value", "dense"]}
    made = {}
    for name, seed, held in (("a", 0, 0), ("b", 0, 0), ("c", 1, 0)):
        params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "epochs": 1, "lora": lora, "seed": seed}}
        data = make_interactions(held=held)
        made[name] = retrievers.open("dense", make_catalog(), tmp_path / name / "index", data, **params)
    assert made["a"].report["epochs"] == 1 and made["a"].report["ndcg@10"] == [None]  # There is no validation split.
    assert made["a"].fingerprint == made["b"].fingerprint != made["c"].fingerprint
    assert not list(tmp_path.rglob("adapter*"))
    frozen = retrievers.open("dense", make_catalog(), model=encoder, device="cpu", tuned=None)
    assert not np.allclose(frozen.embeddings, made["a"].embeddings, atol=1e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["query"]}])
def test_a_limit_of_tokens_cuts_the_texts_of_steps_alone(encoder, monkeypatch, lora):
    """What tells the documents apart comes after the limit, so that a cut metric or a cut index would be a bad one."""
    same = "small large cheap steel"
    catalog = retrievers.Catalog.from_records({"id": str(i), "text": f"{same} {text}"} for i, text in enumerate(TEXTS))
    judged = Judgments(N, JUDGMENTS.queries, JUDGMENTS.rows, TEXTS, [(row,) for row in range(N)])
    widths = []
    of_embeddings, as_module = Objective.of_embeddings, encoder_fit.as_module

    def keep_width(model, given):
        if model.training:
            widths.append(given[0]["input_ids"].shape[1])

    def spied(model, *given):
        model.register_forward_pre_hook(keep_width)
        return as_module(model, *given)

    monkeypatch.setattr(encoder_fit, "as_module", spied)
    monkeypatch.setattr(Objective, "of_embeddings", lambda *given: of_embeddings(*given) * 0)  # Nothing is learned.
    tuned = {**FIT, "max_tokens": 4, "lora": lora}
    params = {"model": encoder, "device": "cpu"}
    made = retrievers.open("dense", catalog, None, judgments=judged, **params, tuned=tuned)
    assert set(widths) == {1, 4}  # Queries of one word, and documents.
    frozen = retrievers.open("dense", catalog, **params)
    ranks = frozen.ranks([Query(text) for text in TEXTS], np.arange(N)[:, None])[:, 0]
    expected = np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
    assert made.report["before"] == pytest.approx(expected, abs=0.02) and expected > 0.5
    assert made.report["ndcg@10"] == [made.report["before"]] * 2
    assert np.allclose(made.embeddings, frozen.embeddings, atol=1e-3)
    assert made.encoder.model.loaded.max_seq_length == frozen.encoder.model.loaded.max_seq_length


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_judgments_teach_words_that_no_document_has(encoder):
    tuned = {**FIT, "epochs": 8, "batch_size": 8, "learning_rate": 0.05}
    params = {"model": encoder, "device": "cpu"}
    made = retrievers.open("dense", make_catalog(), None, judgments=JUDGMENTS, **params, tuned={**tuned, "epochs": 1})
    assert made.report["on"] == "judgments" and retrievers.fitted_on(made) == {JUDGMENTS.fingerprint}
    no_validation = Judgments(N, JUDGMENTS.queries, JUDGMENTS.rows)
    made = retrievers.open("dense", make_catalog(), judgments=no_validation, **params, tuned=tuned)
    found = made.search([Query(text) for text in JUDGMENTS.queries], 5).rows
    assert all(set(rows) <= set(top.tolist()) for rows, top in zip(JUDGMENTS.rows, found, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_loss_that_is_not_finite_ends_the_fit(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "of_embeddings", lambda self, columns, labels: columns[0].sum() * float("nan"))
    params = {"model": encoder, "device": "cpu", "tuned": FIT}
    with pytest.raises(
        ValueError, match=r"tuned\.learning_rate: the loss is nan after 8 steps: lower it, 0\.01 is too"
    ):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(held=0), **params)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_mistake_that_only_the_fit_sees_is_one_line(encoder, tmp_path):
    params = {"model": encoder, "device": "cpu", "tuned": {**FIT, "lora": {"r": 2, "target_modules": ["nowhere"]}}}
    message = r"retriever\.params\.tuned\.lora: .*nowhere.*: change its options"
    with pytest.raises(ValueError, match=message):
        retrievers.open("dense", make_catalog(), tmp_path / "index", make_interactions(), **params)
    assert train.main([str(tmp_path / ".index.tuning")]) == 2
    assert re.match(message, (tmp_path / ".index.tuning" / ERROR).read_text())
