"""`dense` with `tuned`: what is refused, on which data an encoder is tuned, and in which process."""

import json

import pytest
from tuned_data import JUDGMENTS, N, make_catalog, make_interactions

import retrievers
from retrievers import Judgments, RetrieverError
from retrievers.text.dense import Params
from retrievers.text.tuning import job, trainer


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (3, "tuned must be a mapping or null, got 3: write {} for the defaults"),
        ({"epoch": 3}, r"tuned\.epoch: unknown key: did you mean 'epochs'\? Choose from on, epochs"),
        ({"epochs": 0}, r"tuned\.epochs must be an integer >= 1, got 0: 3 is usual"),
        ({"epochs": True}, r"tuned\.epochs must be an integer >= 1, got True"),
        ({"positives": 0.5}, r"tuned\.positives must be null or an integer >= 1, got 0\.5: 5 is usual"),
        ({"batch_size": 1}, r"tuned\.batch_size must be an integer >= 2, got 1"),
        ({"learning_rate": 0}, r"tuned\.learning_rate must be a number above 0 and below 1, got 0"),
        ({"learning_rate": "1e-5"}, r"tuned\.learning_rate must be a number above 0 and below 1, got '1e-5'"),
        ({"keep": 1.0}, r"tuned\.keep must be a number from 0 to below 1, got 1\.0: 0\.0 is usual"),
        ({"warmup": float("nan")}, r"tuned\.warmup must be a number from 0 to below 1, got nan"),
        ({"log_q": 1}, r"tuned\.log_q must be true or false, got 1: write one of the two"),
        ({"on": "clicks"}, r"tuned\.on: unknown 'clicks': choose interactions, judgments or null"),
        ({"affinity": "ease"}, r"tuned\.affinity must be a mapping with a kind, got 'ease': {kind: ease}"),
        ({"affinity": {"kind": "ease", "top": 1}}, r"tuned\.affinity: unknown key 'top': choose from kind, params"),
        ({"affinity": {"kind": "sansa"}}, r"tuned\.affinity: nothing reads it without anti_affinity: set that"),
        ({"lora": True}, r"tuned\.lora must be null, or a mapping of peft's options"),
        ({"lora": {"rank": 2}}, r"tuned\.lora: unknown option 'rank': see peft's LoraConfig"),
    ],
)
def test_a_wrong_value_is_named(tuned, message):
    with pytest.raises(ValueError, match=message):
        Params(tuned=tuned)
    with pytest.raises(ValueError, match=message):
        retrievers.check_parameters("hybrid", {"retrievers": [{"kind": "dense", "params": {"tuned": tuned}}]})


def test_cosines_need_normalised_embeddings():
    with pytest.raises(ValueError, match=r"params\.tuned: needs normalize: true"):
        Params(tuned={}, normalize=False)


def test_only_a_tuned_encoder_is_fitted():
    assert retrievers.fit_data("dense", {}) == set() and not retrievers.takes_interactions("dense", {"tuned": None})
    assert retrievers.fit_data("dense", {"tuned": {}}) == {"interactions", "judgments"}
    assert retrievers.fit_data("dense", {"tuned": {"on": "judgments"}}) == {"judgments"}
    nested = {"retrievers": [{"kind": "bm25"}, {"kind": "dense", "params": {"tuned": {"on": "interactions"}}}]}
    assert retrievers.fit_data("hybrid", nested) == {"interactions"} and retrievers.takes_interactions("hybrid", nested)
    assert retrievers.fit_data("ease", {}) == {"interactions"} and retrievers.fit_data("bm25", {}) == set()


@pytest.mark.parametrize(
    ("tuned", "data", "message"),
    [
        ({}, {}, "the model is tuned on interactions or judgments, but there are none"),
        ({"on": "judgments"}, {"interactions": make_interactions()}, "tuned on judgments, but there are none"),
        ({}, {"interactions": make_interactions(), "judgments": JUDGMENTS}, "choose one of them"),
        ({}, {"judgments": Judgments(3, ["a"], [(0,)])}, f"3 documents for a catalogue of {N}"),
        ({"anti_affinity": 1}, {"judgments": JUDGMENTS}, "anti_affinity: 1 needs histories, and judgments have none"),
        ({}, {"judgments": Judgments(N, ["a"], [(0,)])}, "an epoch has 1 pairs"),
        ({"anti_affinity": 1, "affinity": {"kind": "eas"}}, {"interactions": make_interactions()},
         r"tuned\.affinity: retriever\.kind: unknown 'eas': did you mean 'ease'"),
        ({"anti_affinity": 1, "affinity": {"kind": "ease", "params": {"top": 0}}},
         {"interactions": make_interactions()}, r"tuned\.affinity: retriever\.params\.top"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_is_tuned(tuned, data, message, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_run", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        retrievers.open("dense", make_catalog(), tmp_path / "index", tuned=tuned, device="cpu", **data)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("exit 1", RetrieverError, "ended with exit code 1 .*start it again.*continues from the last checkpoint in"),
        ("kill -9 $$", RetrieverError, "ended with signal 9, which is often a lack of memory: lower tuned.batch_size"),
        (
            "echo 'retriever.params.tuned.lora: no' > $3/error.txt; exit 2",
            ValueError,
            "^retriever.params.tuned.lora: no$",
        ),
        ("exit 0", RetrieverError, "ended with exit code 0"),
    ],
)
def test_a_process_that_ends_without_a_result_says_why_and_how_to_go_on(script, error, message, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(job.sys, "executable", str(program))
    with pytest.raises(error, match=message):
        job._run(tmp_path, "cpu")


def test_the_process_has_no_launcher_and_one_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = job._environment("cuda:3")
    assert env["CUDA_VISIBLE_DEVICES"] == "3" and not {"RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"} & set(env)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [job._environment(device)["CUDA_VISIBLE_DEVICES"] for device in (None, "cuda:1", "cuda")] == ["4", "6", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job._environment(None)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_checkpoint_that_was_cut_off_is_not_taken(tmp_path):
    assert trainer.last_checkpoint(tmp_path) is None
    for step, text in ((5, json.dumps({"global_step": 5})), (10, '{"global_st'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert trainer.last_checkpoint(tmp_path).name == "checkpoint-5"
