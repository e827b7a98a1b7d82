"""That the reward's benchmark runs: all arms at a tiny size, their agreement, and what is said of a missing one."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

import levers  # noqa: E402
import reward  # noqa: E402
import reward_peers  # noqa: E402


def test_ndcg_of_one_relevant_document():
    assert reward_peers.ndcg(["b", "a", "c"], "b") == 1
    assert reward_peers.ndcg(iter([4, 5, 6]), 6) == pytest.approx(1 / np.log2(4))
    assert reward_peers.ndcg([4, 5, 6], 7) == 0


def test_an_arm_whose_package_is_missing_is_left_out_with_a_line(monkeypatch):
    def missing(catalog, folder):
        raise ModuleNotFoundError("No module named 'tantivy'")

    peers = {"tantivy": reward_peers.Peer(missing, "pip install it"), "other": reward_peers.Peer(lambda *_: len, "")}
    monkeypatch.setattr(reward_peers, "PEERS", peers)
    said = []
    assert reward_peers.open_peers(["tantivy", "other"], None, Path("x"), said.append) == {"other": len}
    assert said == ["without tantivy (No module named 'tantivy'): pip install it"]


def test_the_fastest_peer_is_named_and_whether_the_aim_is_reached(capsys):
    rates = {"ours": [100.0, 120.0, 90.0], "slow": [1.0, 1.0, 1.0], "quick": [50.0, 50.0, 50.0]}
    turns = {name: [reward.Turn(rate, 1000 / rate, []) for rate in some] for name, some in rates.items()}
    reward.show(4, turns, {"slow": np.array([0.0, 0.01]), "quick": np.array([0.0, 0.0005])})
    *_, slow, quick, last, blank, end = capsys.readouterr().out.split("\n")
    assert slow.split()[3:] == ["100.0x", "(100.0,", "120.0,", "90.0)", "1000.00", "100.0x", "100%", "50%"]
    assert quick.endswith("100%    100%")
    assert last == "    4  ours / fastest peer, quick: 2.0x (2.0, 2.4, 1.8), less than the 3x aimed at"
    assert blank == end == ""


def test_levers_are_compared_after_equal_seconds(tmp_path):
    """A whole training without them takes 40 s here; with them it ends after 20 s, and keeps what it has."""
    for arm, values in (("nothing", [0.0, 0.1, 0.4]), ("everything", [0.0, 0.2, 0.6])):
        for seed, more in enumerate((0.0, 0.2)):
            rows = [{"step": step, "eval/ndcg@10": value + more} for step, value in zip((0, 2, 4), values, strict=True)]
            rows += [{"step": n, "completions/mean_length": 8.0, "groups/live": 0.5} for n in (1, 2, 3, 4)]
            folder = tmp_path / arm / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    curves = {arm: levers.read_all(tmp_path / arm, "ndcg@10") for arm in ("nothing", "everything")}
    times = {"old recipe": 20.0, "nothing": 10.0, "shares": 5.0, "everything": 5.0, "plain": 20.0}
    head, nothing, shares, everything = levers.table(curves, times, "ndcg@10", 40)
    assert re.findall(r"at (\d+) s", head) == ["10", "20", "40"]
    assert re.findall(r"0\.\d{3}(?= \()", nothing) == ["0.150", "0.200", "0.500"]
    assert re.findall(r"0\.\d{3}(?= \()", shares) == ["0.200", "0.500", "0.500"]
    assert re.findall(r"0\.\d{3}(?= \()", everything) == ["0.300", "0.700", "0.700"]
    assert "(0.200 to 0.400)" in everything


@pytest.fixture
def number_of_threads_stays():
    """bm25s lets numba set the number of OpenMP's threads, and torch then uses as many in this process."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("number_of_threads_stays")
def test_every_arm_runs_and_agrees(tmp_path, monkeypatch, capsys):
    """Documents of one length: tantivy orders ties as ours does, and so agrees always.

    It runs in this process, which has imported or will need most of what the arms import.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "unused")  # pyserini's arm would set it for all later tests.
    options = ["--documents", "600", "--rounds", "1", "--seconds", "0", "--reference", "4", "--completions", "24"]
    monkeypatch.setattr(sys, "argv", ["reward.py", *options, "--words", "15", "--folder", str(tmp_path)])
    reward.main()
    out = capsys.readouterr().out
    assert "synthetic: 600 documents" in out and "emoji: 1,854 documents" in out
    assert "process 2 of 2" in out or not Path("/proc/self/smaps_rollup").exists()
    assert len(re.findall(r"^ +15  ours  ", out, re.MULTILINE)) == 2
    for arm in reward_peers.PEERS:
        rows = re.findall(rf"^ +15  {arm} .*x \(.*\) .*x +(\d+)% +(\d+)%$", out, re.MULTILINE)
        assert len(rows) == 2 or f"without {arm} (" in out, out
        assert all(int(loose) >= 70 for loose, _ in rows), rows
        if arm == "tantivy":
            assert all(row == ("100", "100") for row in rows), rows
    assert out.count("ours / fastest peer, ") == 2
