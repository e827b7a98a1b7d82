"""Nothing that lies in a folder is run: no pickle of a cache or a model, no code that a model brings."""

import ast
import io
import json
import os
import pickle
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

import retrievers
from rec_r1 import cli, config, models
from rec_r1.config import ModelConfig, UserError
from rec_r1.generation.endpoint import Endpoint, _Session
from retrievers import Cache, Catalog, Query, RetrieverError
from retrievers.core.disk import open_disk
from retrievers.encoders.sentence import Encoder

CATALOG = Catalog.from_records({"id": str(i), "text": f"party {i}"} for i in range(9))
BM25 = retrievers.open("bm25", CATALOG)


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, mark: Path, place: str) -> None:
    """Turn every row of a diskcache into a pickle: in its value, in a file of the cache, or in its key."""
    evil = pickle.dumps(Evil(mark))
    pickle.loads(evil)
    assert mark.is_dir()  # what would happen
    mark.rmdir()
    (folder / "aa").mkdir(exist_ok=True)
    (folder / "aa" / "evil.val").write_bytes(evil)
    with sqlite3.connect(folder / "cache.db") as database:
        assert database.execute("SELECT COUNT(*) FROM Cache").fetchone()[0] > 0
        if place == "value":
            database.execute("UPDATE Cache SET mode = 4, filename = NULL, value = ?", (evil,))
        elif place == "file":
            database.execute("UPDATE Cache SET mode = 4, filename = 'aa/evil.val', value = NULL")
        else:
            database.execute(
                "UPDATE Cache SET raw = 0, mode = 4, key = CAST(? || rowid AS BLOB), value = ?", (evil, evil)
            )
    database.close()


@pytest.mark.parametrize("place", ["value", "file", "key"])
def test_a_pickle_in_the_shared_result_cache_is_a_miss(tmp_path, place):
    folder, mark = tmp_path / "results", tmp_path / "mark"
    queries, targets = [Query("party 3"), Query("party 4")], np.array([[3], [4]])
    first = Cache(BM25, 9, folder=folder)
    expected = first.ranks(queries, targets).tolist(), first.search(queries, 2).rows.tolist()
    plant(folder, mark, place)
    again = Cache(BM25, 9, folder=folder)
    assert (again.ranks(queries, targets).tolist(), again.search(queries, 2).rows.tolist()) == expected
    assert again.counts() == (4, 0) and not mark.exists()
    once_more = Cache(BM25, 9, folder=folder)  # the misses were stored again
    assert once_more.ranks(queries, targets).tolist() == expected[0] and once_more.counts() == (2, 2)
    list(once_more._disk)  # nor are keys unpickled
    assert not mark.exists()


@pytest.mark.parametrize("place", ["value", "file", "key"])
def test_a_pickle_among_kept_answers_is_a_miss(tmp_path, place):
    folder, mark = tmp_path / "endpoint", tmp_path / "mark"
    disk = open_disk(folder, eviction_policy="none")
    disk.set("digest", json.dumps(["an answer", [3, 4]]))
    disk.close()
    endpoint = Endpoint("http://localhost:1/v1", "m")
    session = _Session(endpoint, folder)
    assert session.look_up("digest").text == "an answer"
    session.close()
    plant(folder, mark, place)
    session = _Session(endpoint, folder)
    assert session.look_up("digest") is None and not mark.exists()
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kept", ["[]", "{", '["a"]', "[1, null]", '["a", [1]]', '["a", ["b", 2]]', "[" * 9999, b"\xff", 3]
)
def test_an_answer_that_nobody_wrote_is_a_miss(tmp_path, kept):
    disk = open_disk(tmp_path / "endpoint")
    disk.set("digest", kept)
    disk.close()
    session = _Session(Endpoint("http://localhost:1/v1", "m"), tmp_path / "endpoint")
    assert session.look_up("digest") is None
    session.close()


def test_a_cache_reads_and_removes_only_what_is_its_own(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"12345678")
    cache = Cache(BM25, 9, folder=tmp_path / "results")
    queries, targets = [Query("party 3")], np.array([[3, 4]])
    expected = cache.ranks(queries, targets).tolist()
    with sqlite3.connect(tmp_path / "results" / "cache.db") as database:
        database.execute("UPDATE Cache SET mode = 2, filename = '../secret', value = NULL")
    database.close()
    again = Cache(BM25, 9, folder=tmp_path / "results")
    assert again.ranks(queries, targets).tolist() == expected and again.counts() == (1, 0)
    assert secret.read_bytes() == b"12345678"  # the row it replaced named this file


def test_a_row_of_another_length_is_a_miss(tmp_path):
    cache = Cache(BM25, 9, folder=tmp_path / "results")
    expected = cache.ranks([Query("party 3")], np.array([[3]])).tolist()
    for key in list(cache._disk):
        cache._disk.set(key, b"123")
    again = Cache(BM25, 9, folder=tmp_path / "results")
    assert again.ranks([Query("party 3")], np.array([[3]])).tolist() == expected


def test_what_would_be_pickled_is_not_stored(tmp_path):
    disk = open_disk(tmp_path / "x")
    for key, value in (("a", [1]), ("a", {"b": 1}), ("a", None), ("a", 2**70), (("a", 1), "b"), ("a", True)):
        with pytest.raises(TypeError):
            disk.set(key, value)
    for value in (b"x", "text", 3, 0.5, "x" * 100_000):
        disk.set("a", value)
        assert disk.get("a") == value


def with_code(folder: Path, mark: Path, architecture: str) -> Path:
    """A model folder that needs code of its own, which makes ``mark`` when it is imported."""
    folder.mkdir()
    settings = {"model_type": "never-heard-of", "auto_map": {"AutoConfig": "evil.C", architecture: "evil.M"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nfrom transformers import PretrainedConfig\n"
        "class C(PretrainedConfig):\n    model_type = 'never-heard-of'\n"
    )
    return folder


@pytest.mark.slow
def test_a_model_that_brings_code_is_refused_without_a_question(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "model", mark, "AutoModelForCausalLM")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    wanted = r"brings Python code of its own \(auto_map\).* model\.trust_remote_code=true"
    for load in (
        lambda: models.load_config(models.resolve(str(folder))),
        lambda: models.load_tokenizer(str(folder)),
        lambda: models.load_policy(str(folder), ModelConfig()),
    ):
        with pytest.raises(UserError, match=wanted) as error:
            load()
        assert "\n" not in str(error.value)
    assert not asked and not mark.exists()
    assert type(models.load_config(str(folder), trust_remote_code=True)).__name__ == "C"
    assert mark.is_dir()  # trusted, it is run: this test can fail


@pytest.mark.slow
def test_check_asks_nothing_on_stdin(tmp_path, monkeypatch, capsys):
    folder = with_code(tmp_path / "model", tmp_path / "mark", "AutoModelForCausalLM")
    answer = io.StringIO("y\n")
    monkeypatch.setattr("sys.stdin", answer)
    assert cli.main(["check", "quickstart", f"model.name={folder}"]) == 2
    assert not (tmp_path / "mark").exists() and answer.tell() == 0
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert "model.trust_remote_code=true" in last and "Traceback" not in said.err and "[y/N]" not in said.out


@pytest.mark.slow
def test_the_trainer_is_told_what_the_recipe_says():
    from rec_r1.trl_options import grpo_config

    assert grpo_config(config.load("quickstart")).trust_remote_code is False
    assert grpo_config(config.load("quickstart", ["model.trust_remote_code=true"])).trust_remote_code is True
    with pytest.raises(UserError, match=r"trust_remote_code is set by model\.trust_remote_code"):
        config.load("quickstart", ["grpo.trust_remote_code=true"])


@pytest.mark.slow
def test_an_encoder_that_brings_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "mark"
    folder = with_code(tmp_path / "model", mark, "AutoModel")
    for pooling in (None, "mean"):
        with pytest.raises(RetrieverError, match=r"brings Python code .*retriever\.params\.trust_remote_code=true"):
            Encoder(str(folder), pooling=pooling).queries(["a"])
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.M"}]))
    with pytest.raises(RetrieverError, match=r"modules\.json names evil\.M"):
        Encoder(str(folder)).queries(["a"])
    assert not mark.exists()


@pytest.mark.slow
def test_weights_that_are_pickles_are_refused(tmp_path, tiny_model):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is not read: save .* safetensors"):
        models.resolve(str(folder))
    with pytest.raises(UserError, match=r"does not load"):
        models.load_policy(str(folder), ModelConfig())
    with pytest.raises(RetrieverError, match=r"pytorch_model\.bin is a pickle"):
        Encoder(str(folder)).queries(["a"])
    adapter = tmp_path / "best"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle"):
        models.load_policy_for_evaluation(str(tiny_model), config.load("quickstart"), adapter)
    assert not (tmp_path / "mark").exists()


def calls() -> list[tuple[str, ast.Call]]:
    """Every call in the three packages, with what is called."""
    root = Path(models.__file__).parent.parent
    files = [path for name in ("rec_r1", "retrievers", "rewards") for path in (root / name).rglob("*.py")]
    return [
        (f"{path.name}:{node.lineno} {ast.unparse(node.func)}", node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]


@pytest.mark.slow
def test_every_loader_says_that_it_trusts_nothing():
    names = dict(calls())
    assert len(names) > 1000
    for place, node in names.items():
        given = {keyword.arg for keyword in node.keywords}
        called = place.rpartition(" ")[2]
        if called.startswith("Auto") and called.endswith(("from_pretrained", "from_config")):
            assert "trust_remote_code" in given, place
        assert "allow_pickle" not in given, place  # numpy's default refuses
        assert called != "torch.load" or "weights_only" in given, place
        assert called not in ("pickle.load", "pickle.loads", "diskcache.Cache", "eval", "exec") or (
            place.startswith("disk.py") and called == "diskcache.Cache" and "disk" in given
        ), place
