"""What all encoders share: their settings, the longest text that a model reads, the progress bars, and what a model was
tuned on."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tiny_models

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.core import progress
from retrievers.encoders.cross import PairScorer
from retrievers.encoders.files import LARGE, hash_of_files, tuned_on, write_tuned_on
from retrievers.encoders.sentence import Encoder
from retrievers.encoders.tokens import TokenEncoder

ENCODERS = {"sentence": Encoder, "tokens": TokenEncoder, "cross": PairScorer}
TEXTS = ["party popper", "sad face", "a castle in Japan"]
CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(TEXTS))
LONG = "many words " * 60


@pytest.mark.parametrize("kind", ENCODERS)
def test_wrong_settings_are_named_at_once_and_alike(kind):
    with pytest.raises(ValueError, match="model must be a folder, a hub id or a name, got 3") as error:
        ENCODERS[kind](model=3, batch_size=True, device="gpu", trust_remote_code="yes")
    names = [line.partition("retriever.params.")[2].split()[0].rstrip(":") for line in str(error.value).split("; ")]
    assert names == ["model", "batch_size", "trust_remote_code", "device"]


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nothing", 0, ["cpu"]])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_device_that_cannot_compute_is_refused(kind, device):
    with pytest.raises(ValueError, match=r"retriever\.params\.device: .* is not available on this machine .*set cpu$"):
        ENCODERS[kind](model="m", device=device)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("sentence", "query_prefix", 3), ("tokens", "document_prefix", None), ("sentence", "normalize", "yes"),
        ("tokens", "document_length", 7), ("tokens", "document_length", "9"), ("cross", "max_length", 9.0),
    ],
)  # fmt: skip
def test_a_setting_of_one_kind_is_checked_too(kind, setting, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{setting} must be .*, got {value!r}"):
        ENCODERS[kind](model="m", **{setting: value})


# ---- The longest text


def roberta(folder, pairs: bool, tokenizer_says: int = 10**30):
    """A model with 66 position embeddings, of which the first is that of the padding, so that it reads 65 tokens."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    tokenizer = tiny_models.tokenizer()
    tokenizer.model_max_length = tokenizer_says
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=0, num_labels=1, **shape)
    (RobertaForSequenceClassification if pairs else RobertaModel)(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("says", "longest"), [(10**30, 65), (66, 65), (40, 40)])
def test_a_length_above_tokenizer_or_positions_is_refused_and_the_longest_is_read(tmp_path, says, longest):
    cross, plain = roberta(tmp_path / "cross", True, says), roberta(tmp_path / "plain", False, says)
    message = rf"_length: {longest + 1}: the model reads at most {longest} tokens: set {longest} or less, or leave it"
    with pytest.raises(ValueError, match=message):
        PairScorer(cross, max_length=longest + 1, device="cpu").load()
    with pytest.raises(ValueError, match=message):
        _ = TokenEncoder(plain, document_length=longest + 1, device="cpu").dimension
    pair = (LONG, LONG)
    for length in (None, longest):
        assert np.isfinite(PairScorer(cross, max_length=length, device="cpu").scores([pair])).all()
        ((_, _, lengths),) = TokenEncoder(plain, document_length=length, device="cpu").slabs([LONG])
        assert lengths.tolist() == [longest]
    assert np.isfinite(Encoder(plain, device="cpu").queries([LONG])).all()


# ---- Half precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sentence", "pooled", "tokens", "late", "cross"])
def test_a_checkpoint_in_bfloat16_is_computed_in_float32_on_a_cpu(kind, tmp_path):
    """It gives what the same weights in a checkpoint of float32 give."""
    from safetensors.torch import load_file, save_file

    make = {"late": tiny_models.multi_vector, "cross": tiny_models.cross_encoder}.get(kind, tiny_models.encoder)
    half, whole = make(tmp_path / "half"), tmp_path / "whole"
    for file in half.rglob("model.safetensors"):
        save_file({key: value.bfloat16() for key, value in load_file(file).items()}, file, {"format": "pt"})
    for file in half.rglob("config.json"):
        known = json.loads(file.read_text())
        if "architectures" in known:
            file.write_text(
                json.dumps({name: v for name, v in known.items() if "dtype" not in name} | {"dtype": "bfloat16"})
            )
    shutil.copytree(half, whole)
    for file in whole.rglob("model.safetensors"):
        save_file({key: value.float() for key, value in load_file(file).items()}, file, {"format": "pt"})
    for file in whole.rglob("config.json"):
        file.write_text(file.read_text().replace("bfloat16", "float32"))
    pairs = [(text, LONG) for text in TEXTS]
    found = []
    for folder in (half, whole):
        model = ENCODERS.get({"pooled": "sentence", "late": "tokens"}.get(kind, kind))(
            str(folder), device="cpu", **({"pooling": "cls"} if kind == "pooled" else {})
        )
        found.append(model.scores(pairs) if kind == "cross" else np.concatenate([*model.queries([*TEXTS, LONG])]))
        assert {str(p.dtype) for p in model.model.loaded.parameters()} == {"torch.float32"}
    assert np.allclose(*found, atol=1e-5)


@pytest.mark.slow
def test_a_shorter_length_cuts_pairs(tmp_path):
    folder = str(tiny_models.cross_encoder(tmp_path / "model"))
    whole, cut = PairScorer(folder, device="cpu"), PairScorer(folder, max_length=16, device="cpu")
    same, different = [("a red", "shoe")], [("a red shoe", "another blue castle"), ("a red shoe", "another green one")]
    assert np.allclose(whole.scores(same), cut.scores(same), atol=1e-5)
    assert not np.allclose(whole.scores(different), cut.scores(different), atol=1e-3)
    assert pickle.loads(pickle.dumps(cut)).settings == cut.settings


# ---- Progress bars


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "cross": str(tiny_models.cross_encoder(folder / "cross")),
        "plain": str(tiny_models.encoder(folder / "plain")),
    }


def asked(kind, models):
    """A retriever of a kind, and new queries for it."""
    params = {"model": models["cross"], "m": 2} if kind == "rerank" else {"model": models["plain"]}
    return retrievers.open(kind, CATALOG, device="cpu", **params), [Query("party"), Query("castle"), Query("")]


LABELS = {"rerank": "scoring pairs", "late": "scoring documents", "dense": "encoding queries"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LABELS)
def test_a_bar_is_shown_while_many_queries_are_scored_and_not_in_a_step_of_a_training(
    kind, models, monkeypatch, capsys
):
    import rewards
    from rec_r1.prompts import Action
    from rec_r1.scoring import Scorer

    monkeypatch.setattr(progress, "PATIENCE", 0)
    made, queries = asked(kind, models)
    capsys.readouterr()
    made.ranks(queries, np.zeros((3, 1), np.int64))
    assert f"{LABELS[kind]}: " in capsys.readouterr().err

    def parse(completion, _):
        return Action(completion, completion)

    scorer = Scorer(parse, made, rewards.from_spec({"ndcg@10": 1.0}))
    earned = scorer([""] * 2, ["sad", "Japan"], query=["a", "b"], target_rows=[[0], [1]], target_grades=[[1], [1]])
    assert len(earned) == 2 and capsys.readouterr().err == ""
    scorer.score(["sad castle"], ["a"], [[0]], [[1]])  # An evaluation.
    assert f"{LABELS[kind]}: " in capsys.readouterr().err


def test_a_short_answer_shows_no_bar_and_neither_does_another_process_of_a_launcher(capsys, monkeypatch):
    for patience, rank in ((5, None), (0, "1"), (0, "0")):
        monkeypatch.setattr(progress, "PATIENCE", patience)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with progress.bar(3, "scoring", "queries") as shown:
            shown.update(3)
        assert ("scoring" in capsys.readouterr().err) == (patience == 0 and rank == "0")


# ---- What a model was tuned on


def test_what_a_model_was_tuned_on_is_in_its_folder_and_in_its_hash(tmp_path):
    assert tuned_on(tmp_path) == ()
    hashes = {hash_of_files(tmp_path)}
    for fit in ("one", "two"):
        write_tuned_on(tmp_path, ["b", "a", "b"], fit)
        assert tuned_on(tmp_path) == ("a", "b")
        hashes.add(hash_of_files(tmp_path))
    assert len(hashes) == 3


def test_every_byte_of_a_large_file_is_in_the_hash_and_it_is_read_once(tmp_path, monkeypatch):
    weights = tmp_path / "model.safetensors"
    content = bytearray(LARGE + 2_000_000)
    hashes = []
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] = 1
        weights.write_bytes(content)
        hashes += [hash_of_files(tmp_path), hash_of_files(tmp_path)]
    assert len(set(hashes)) == 3 and hashes[::2] == hashes[1::2]
    before = weights.stat()
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert hash_of_files(tmp_path) == hashes[-1]
    monkeypatch.undo()
    content[100] = 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # As some tools that copy files do.
    assert weights.stat().st_mtime_ns == before.st_mtime_ns and hash_of_files(tmp_path) not in hashes


@pytest.mark.slow
def test_encoders_that_differ_in_their_middle_layers_do_not_share_embeddings(tmp_path):
    """The second index is beside the first, whose embeddings are used again for an encoder of the same hash."""
    import torch
    from transformers import BertConfig, BertModel

    # A layer has 2 MiB, and the second is in the middle of the file.
    shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 512, "hidden_size": 256}
    vocabulary = len(tiny_models.tokenizer())
    for name in ("a", "b"):
        folder = tmp_path / name / "encoder"
        torch.manual_seed(0)
        model = BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=128, **shape))
        if name == "b":
            torch.nn.init.normal_(model.encoder.layer[1].attention.self.value.weight)
        model.save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    made = [
        retrievers.open("dense", CATALOG, tmp_path / f"index-{name}", model=str(tmp_path / name / "encoder"))
        for name in ("a", "b")
    ]
    own = Encoder(str(tmp_path / "b" / "encoder")).documents(TEXTS)
    assert np.allclose(made[1].embeddings, own, atol=2e-3) and not np.allclose(made[0].embeddings, own, atol=1e-2)
    assert made[0].fingerprint != made[1].fingerprint


@pytest.mark.parametrize("damaged", ["", "[]", "{}", '{"fingerprints": "a"}', '{"fingerprints": [1]}'])
def test_a_damaged_record_of_it_is_refused(tmp_path, damaged):
    (tmp_path / "tuned_on.json").write_text(damaged)
    with pytest.raises(RetrieverError, match=r"tuned_on\.json, which says what the model was tuned on, is damaged"):
        tuned_on(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("dense", {}), ("dense", {"engine": "faiss"}), ("late", {}), ("milvus", {"mode": "dense"}),
        ("hybrid", {}), ("l3ae", {"text_regularization": 1.0, "regularization": 1.0, "fusion": 1.0}),
        ("vqrec", {"codes": 2, "bits": 1, "dim": 8, "epochs": 1}),
    ],
)  # fmt: skip
def test_every_backend_with_an_encoder_says_what_that_was_tuned_on(kind, params, tmp_path):
    folder = tiny_models.encoder(tmp_path / "model")
    choices = retrievers.Interactions.from_sequences(len(CATALOG), [[0, 1], [1, 2]])
    if kind == "hybrid":
        params = {"retrievers": [{"kind": "bm25"}, {"kind": "late", "params": {"model": str(folder)}}]}
    else:
        params = {"model": str(folder), **params}
    own = {choices.fingerprint} if kind in ("l3ae", "vqrec") else set()
    before = retrievers.open(kind, CATALOG, tmp_path / "before", choices, **params)
    assert retrievers.fitted_on(before) == own
    write_tuned_on(folder, ["what it was tuned on"], "fit")
    after = retrievers.open(kind, CATALOG, tmp_path / "after", choices, **params)
    assert retrievers.fitted_on(after) == own | {"what it was tuned on"} and after.fingerprint != before.fingerprint
    json.loads((folder / "tuned_on.json").read_text())
