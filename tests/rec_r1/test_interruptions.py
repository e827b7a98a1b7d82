"""A full disk, Ctrl-C and damaged run files end in one line, whatever the command was doing."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rec_r1 import cli, console, runs, tasks, train
from rec_r1.config import UserError
from rec_r1.pages import plots
from rec_r1.runs import processes


def line(capsys) -> str:
    """The only line on stderr that a failed command may add."""
    said = capsys.readouterr().err.strip().splitlines()
    assert said and said[-1].startswith("rec-r1: ") and "Traceback" not in "\n".join(said)
    return said[-1]


def raising(error: BaseException):
    def function(*args, **options):
        raise error

    return function


@pytest.mark.parametrize("verb", ["check", "index", "prepare", "fit", "try"])
def test_ctrl_c_while_the_data_are_read(capsys, monkeypatch, verb):
    monkeypatch.setattr(tasks, "load", raising(KeyboardInterrupt()))
    assert cli.main([verb, "quickstart"]) == 130
    assert line(capsys).startswith("rec-r1: interrupted: ")


def test_ctrl_c_before_training(capsys, monkeypatch):
    monkeypatch.setattr(train, "train", raising(KeyboardInterrupt()))
    for main in (train.main, lambda arguments: cli.main(["train", *arguments])):
        assert main(["quickstart"]) == 130
        assert "--resume" in line(capsys)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        OSError("131072 requested and 65512 written"),  # numpy
        OSError(errno.EROFS, "Read-only file system"),
    ],
)
def test_a_full_disk_names_the_place(capsys, tmp_path, error):
    assert console.guard(raising(error), place=tmp_path / "run") == 2
    assert str(tmp_path / "run") in line(capsys)


def test_other_errors_are_ours():
    unread = "[enforce fail at inline_container.cc:197] . PytorchStreamReader failed reading zip archive"
    for error in (RuntimeError("a bug"), KeyError("x"), ConnectionError("refused"), RuntimeError(unread)):
        with pytest.raises(type(error)):
            console.guard(raising(error))


def test_a_file_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    """The system names no file where a write fails."""
    monkeypatch.setattr(Path, "write_text", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"a\.json"):
        runs.write_atomically(tmp_path / "a.json", "{}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path):
    """The temporary file beside it, which a person did not name, is not."""
    with pytest.raises(OSError, match="Not a directory") as error:
        runs.write_atomically(Path("/dev/null/a.json"), "{}")
    assert error.value.filename == "/dev/null/a.json"


def test_a_picture_that_does_not_fit_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    monkeypatch.setattr(plots, "render", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"curves\.png"):
        plots.draw([tmp_path / "run"], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_terminal_without_utf_8_gets_escapes(tmp_path):
    code = "from rec_r1 import console; console.setup(); print('teacher \U0001f9d1')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "teacher \\U0001f9d1\n" and not done.stderr


def test_stdin_in_another_encoding_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(["try", "quickstart"]) == 2
    assert "stdin: not UTF-8" in line(capsys)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_place_of_a_run_that_cannot_be_written(monkeypatch, capsys, tmp_path, verb):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # The user of the tests may write everywhere.
    assert cli.main([verb, "quickstart", f"output_dir={tmp_path}/runs/mine"]) == 2
    assert line(capsys).startswith(f"rec-r1: output_dir: nothing can be written into {tmp_path}: ")


def test_a_cache_that_cannot_be_written_names_its_variable(capsys, monkeypatch):
    monkeypatch.setenv("REC_R1_CACHE", "/dev/null/cache")
    assert cli.main(["index", "quickstart"]) == 2
    assert "/dev/null" in (said := line(capsys)) and "set $REC_R1_CACHE to another place" in said


def test_an_error_on_the_main_process_reaches_the_caller():
    def fail():
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        processes.on_main_process(fail)
    assert processes.on_main_process(lambda: 3) == 3


def test_write_atomically(tmp_path):
    runs.write_atomically(tmp_path / "a", "old")
    runs.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_content(tmp_path):
    runs.write_atomically(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        runs.write_atomically(tmp_path / "a", "new \ud83d")
    assert (tmp_path / "a").read_text() == "old"


def test_metrics_are_read_without_a_line_cut_short(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        runs.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert runs.read_metrics(tmp_path) == [{"step": 0}, {"step": 1}]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on a file's size")
def test_an_index_that_does_not_fit(tmp_path):
    """Files may be 2000 bytes long: what the index library writes fails as on a full disk."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); from rec_r1 import cli; "
        "sys.exit(cli.main(['index', 'quickstart']))"
    )
    environment = os.environ | {"REC_R1_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"rec-r1: {tmp_path}/indexes/emoji-bm25-")
    assert "Traceback" not in done.stderr and not list((tmp_path / "indexes").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a run with logs, a best policy's record and an evaluation, as bytes by path."""
    run = tmp_path_factory.mktemp("made") / "run"
    assert cli.main(["baseline", "quickstart", "random", f"output_dir={run}"]) == 0
    from rec_r1 import config

    info = {"model_source": "m", "retriever_fingerprint": "f", "device": "1 CPU thread", "versions": {}}
    runs.begin(config.load("quickstart", [f"output_dir={run}"]), 0, info)
    rows = [{"step": step, "time": 1.0, "reward": 0.1 * step, "reward_std": 0.1} for step in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "best.json").write_text(json.dumps({"step": 3, "metric": "ndcg@10", "value": 0.4}))
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def damaged(whole: dict[str, bytes], name: str, how: str, run: Path) -> Path:
    for path, content in whole.items():
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).write_bytes(content)
    content = whole[name]
    lines = content.splitlines(keepends=True)
    kinds = {"empty": b"", "half": content[: len(content) // 2], "short": content[:-2], "garbage": b"\xff\x00{]\n"}
    kinds |= {"a list": b"[1, 2]\n", "lines": b"".join(lines[: len(lines) // 2]), "middle": b"{]\n".join(lines)}
    (run / name).write_bytes(kinds[how])
    return run


DAMAGE = [
    *((name, how) for name in ("run.json", "comparison.json", "random.json") for how in ("empty", "half", "a list")),
    *((name, how) for name in ("metrics.jsonl", "random.jsonl") for how in ("middle", "garbage", "a list")),
    ("random.jsonl", "short"),
    ("config.yaml", "garbage"),
    ("config.yaml", "half"),
    ("config.yaml", "lines"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), DAMAGE)
def test_a_damaged_run_file_is_named(capsys, whole, tmp_path, name, how):
    (path,) = (path for path in whole if Path(path).name == name)
    run = damaged(whole, path, how, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 2
    assert str(run / path) in line(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half", "short", "lines"])
def test_a_log_that_a_kill_cut_short_is_read(capsys, whole, tmp_path, how):
    run = damaged(whole, "metrics.jsonl", how, tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
