"""What a command writes replaces nothing but an earlier output of its own."""

import json
import os
import socket
from pathlib import Path

import pytest

from rec_r1 import cli, config
from rec_r1.config import UserError
from rec_r1.pages import hub
from rec_r1.similarity_gap import page

pytestmark = pytest.mark.curves


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name in ("best", "checkpoint-5", "evaluation/test", "baselines/sft", "rollouts.parts", "warm_start"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text("weights")
    (folder / "config.yaml").write_text(config.dump(config.load("quickstart", [f"output_dir={folder}"])))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    for name in ("rollouts.jsonl", "rollouts.rank1.jsonl", "best.json", "run.json"):
        (folder / name).write_text("{}\n")
    (folder / "best" / "README.md").write_text("PEFT's card")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OWN = [
    "config.yaml", "metrics.jsonl", "rollouts.jsonl", "rollouts.rank1.jsonl", "best.json", "run.json", "best",
    "best/model.safetensors", "best/README.html", "best/new.png", "checkpoint-5/new.html", "evaluation/test/new.png",
    "evaluation/new.html", "baselines/sft/new.png", "rollouts.parts/new.png", "warm_start/new.png",
    "./best/../metrics.jsonl", "", "run.json/x.png", "no/x.html",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["plot", "report", "similarity-gap"])
@pytest.mark.parametrize("name", OWN)
def test_a_runs_own_files_are_never_an_output(run, verb, name, capsys, monkeypatch):
    before = contents(run)
    monkeypatch.chdir(run)
    for place in (f"{run}/{name}", name or ".", str(run / ".." / "run" / name)):
        if verb == "similarity-gap":
            if name in ("", "no/x.html"):  # folders that may be made, or written into
                continue
            with pytest.raises(UserError, match="--output"):
                page.prepare(Path(place))
        else:
            assert cli.main([verb, str(run), "-o", place]) == 2
            message = capsys.readouterr().err
            assert message.startswith("rec-r1: --output: ") and message.count("\n") == 1
    assert contents(run) == before


@pytest.mark.slow
def test_links_to_a_runs_files_are_no_output(run, tmp_path, capsys):
    before = contents(run)
    (tmp_path / "soft.png").symlink_to(run / "metrics.jsonl")
    (tmp_path / "soft.html").symlink_to(run / "config.yaml")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "page.md").symlink_to(run / "config.yaml")
    (tmp_path / "hard.png").hardlink_to(run / "metrics.jsonl")
    (tmp_path / "inside").symlink_to(run / "best")
    for verb, name in (
        ("plot", "soft.png"), ("report", "soft.html"), ("plot", "dangling.png"), ("report", "page.html"),
        ("plot", "inside/x.png"), ("report", "inside/x.html"),
    ):  # fmt: skip
        assert cli.main([verb, str(run), "-o", str(tmp_path / name)]) == 2
        assert "--output" in capsys.readouterr().err
    assert cli.main(["plot", str(run), "-o", str(tmp_path / "hard.png")]) == 0  # the name is replaced, not the file
    assert contents(run) == before and (tmp_path / "hard.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_regular_file_is_no_output(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "page.md")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.html"))
        for verb, name in (
            ("plot", "/dev/null"), ("report", "/dev/null"), ("plot", "/dev/stdout"),
            ("plot", str(tmp_path / "pipe.png")),
            ("report", str(tmp_path / "socket.html")), ("report", str(tmp_path / "page.html")),
        ):  # fmt: skip
            assert cli.main([verb, str(run), "-o", name]) == 2
            assert "--output" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


def test_a_markdown_that_is_no_pages_is_kept(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    assert cli.main(["report", str(run), "-o", str(tmp_path / "README.html")]) == 2
    assert "README.md, which was not written beside a page" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.slow
def test_an_earlier_output_is_replaced(run, tmp_path):
    for _ in range(2):
        assert cli.main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
        assert cli.main(["plot", str(run), "-o", str(tmp_path / "curves.PNG")]) == 0
    assert cli.main(["plot", str(run)]) == cli.main(["report", str(run)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "page.html", "page.md", "curves.PNG"}
    assert {"report.html", "report.md", "reward_curve.png"} <= {path.name for path in run.iterdir()}


@pytest.mark.parametrize(
    "place", ["", "best", "best/sub", "checkpoint-5/x", "metrics.jsonl", "evaluation/x", "link", ".."]
)
def test_an_export_is_written_into_an_empty_folder_only(run, place, capsys):
    before = contents(run)
    (run / "evaluation" / "test" / "comparison.json").write_text("{}")
    (run / "link").symlink_to(run / "best")
    assert cli.main(["push", str(run), "me/x", "--dry-run", "--folder", str(run / place)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert before.items() <= contents(run).items()
    with pytest.raises(UserError):
        hub.export(run, run / place)
