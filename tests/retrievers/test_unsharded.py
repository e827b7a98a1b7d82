"""Models that are not trained are loaded whole while a training shards its policy."""

import os

import numpy as np
import pytest

import retrievers
from retrievers.encoders.sentence import Encoder

FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def test_zero3_is_off_inside_and_on_again_afterwards(zero3):
    assert zero3()
    with retrievers.unsharded():
        assert not zero3()
        with retrievers.unsharded():
            assert not zero3()
        assert not zero3()
    assert zero3()
    with pytest.raises(KeyError), retrievers.unsharded():
        raise KeyError
    assert zero3()


def test_nothing_is_turned_on_where_nothing_was_on(monkeypatch):
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    monkeypatch.delenv(FSDP, raising=False)
    with retrievers.unsharded():
        assert not is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled() and FSDP not in os.environ


def test_fsdp_receives_no_weights_inside(monkeypatch):
    monkeypatch.setenv(FSDP, "true")
    with retrievers.unsharded():
        assert os.environ[FSDP] == "false"
    assert os.environ[FSDP] == "true"


def test_a_retriever_of_one_s_own_builds_with_whole_models(zero3, tmp_path, monkeypatch):
    (tmp_path / "building.py").write_text(
        "from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled as sharded\n\n"
        "class Built:\n    fingerprint = 'b'\n    whole = None\n"
        "    def search(self, queries, k):\n        raise NotImplementedError\n"
        "    def ranks(self, queries, targets):\n        raise NotImplementedError\n\n"
        "def build(catalog, folder=None):\n    built = Built()\n    built.whole = not sharded()\n    return built\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog = retrievers.Catalog.from_records([{"id": "d1", "text": "red shoes"}])
    assert retrievers.open("building", catalog).whole is True and zero3()


@pytest.mark.slow
def test_an_encoder_is_loaded_whole_on_first_use(zero3):
    vectors = Encoder("all-minilm-l6-v2", pooling="max").queries(["red shoes"])  # No other test has loaded this one.
    assert vectors.shape == (1, 384) and np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5) and zero3()
