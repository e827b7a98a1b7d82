"""Several machines: real processes that meet over the loopback interface, each machine with folders of its own."""

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import FORKS_OF_A_LAUNCHER, Fork, finish

from rec_r1.runs import checkpoints, machines

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


BUILD_S = 4.0  # Longer than the trainer's own group waits, see meeting.py.
SLOW_BUILD = f"""
import time
import retrievers

def build(catalog, folder=None):
    if not folder.is_dir():
        time.sleep({BUILD_S})
        folder.mkdir(parents=True)
    return retrievers.open("bm25", catalog)
"""


@pytest.mark.slow
def test_processes_of_two_machines_agree_and_wait(tmp_path):
    (tmp_path / "slow_build.py").write_text(SLOW_BUILD)
    port, started = str(free_port()), []
    for rank, local, processes in ((0, 0, 2), (1, 1, 2), (2, 0, 1)):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        meeting, log = ROOT / "tests" / "rec_r1" / "meeting.py", tmp_path / f"{rank}.log"
        started.append(Fork(meeting, [str(tmp_path)], log, tmp_path, **environment))
    outputs = finish(started, 300)
    assert [process.code for process in started] == [0, 0, 0], "\n".join(outputs)[-6000:]
    first, *others = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all({**one, "waited": 0} == {**first, "waited": 0} for one in others)  # One answer for all processes.
    main, other = (f"machine {number} ({socket.gethostname()})" for number in (0, 1))
    assert first["errors"] == [f"{other}: not here", f"{main}: not here"]
    assert first["decided"] == 0 and first["separate"] == [True, False]
    for said, folder in zip(first["locks"], ("shared", "machine-0/locked"), strict=True):
        assert said.startswith(f"{main}: output_dir: {tmp_path}/{folder}: another training writes to this folder (proc")
    assert not list(tmp_path.rglob("_training.lock"))
    runs = [tmp_path / "machine-0" / "moved", tmp_path / "machine-1" / "run"]
    assert first["not empty"].startswith(f"{other}: output_dir: {runs[1]} is not empty")
    assert first["other data"].startswith(f"data_fingerprint: {other} has 'e', and {main} has 'd': give all machines")
    assert first["damaged"].startswith(
        f"{other}: --resume: {tmp_path}/machine-1/run/checkpoint-4: scheduler.pt: damaged"
    )
    for trouble in ("lost", "swapped"):
        assert first[trouble].startswith(f"--resume: {main} does not hold the run, and {other} holds it")
    assert first["cannot be written"].startswith(f"{other}: {tmp_path}/machine-1/run/checkpoint-6/")
    files = [
        {path.name: path.read_bytes() for path in (run / "checkpoint-4").rglob("*") if path.is_file()} for run in runs
    ]
    assert files[0] == files[1] and len(files[0]["large"]) == 3_000_000
    assert {f"{part}_{rank}" for part in ("empty", "rng_state") for rank in range(3)} <= {
        name.removesuffix(".pth") for name in files[0]
    }
    assert not (runs[1] / "checkpoint-2").exists() and (runs[1] / "config.yaml").is_file()
    # The trainer's own group would have given up after three seconds. The first process says who waits for it.
    assert min(one["waited"] for one in (first, *others)) > BUILD_S
    assert "the other processes of this machine wait for this one to open the index of slow_build" in outputs[0]
    assert "wait" not in outputs[1].partition("{")[0]


def machine(number: int, port: int, folder: Path, arguments: list[str]) -> Fork:
    """The launcher of one of two machines, with one process. ``folder``: its working folder, where its log is, too."""
    folder.mkdir(exist_ok=True, parents=True)
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=2"]
    launch += [f"--machine_rank={number}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launch += ["--rdzv_backend=static", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*launch, str(ROOT / "rec_r1" / "train.py"), "quickstart", *arguments]
    log = folder / f"{port}.{number}.log"
    return Fork("accelerate.commands.launch", command, log, folder, **FORKS_OF_A_LAUNCHER)


@contextlib.contextmanager
def both(folders: list[Path], arguments: list[str]) -> Iterator[list[Fork]]:
    """The launchers of two machines that train together, each in its working folder."""
    port = free_port()
    started = [machine(number, port, folder, arguments) for number, folder in enumerate(folders)]
    try:
        yield started
    finally:
        for launcher in started:
            launcher.kill()


def wait_for_step(step: int, log: Path, launcher: Fork) -> None:
    """Wait until a training step is logged."""
    deadline = time.monotonic() + 400
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert time.monotonic() < deadline and launcher.code is None
        time.sleep(0.05)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run: Path) -> list[dict]:
    """What metrics.jsonl has, without what a clock says."""
    times = ("time", "seconds", "runtime", "_per_second", "total_flos", "train_loss", "cache_hits")
    return [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows(run / "metrics.jsonl")]


@pytest.mark.slow
def test_two_machines_one_killed_and_resumed(tiny_model, tmp_path):
    """With a shared folder a training ends. With local ones machine 0 is killed, and the resumed training is equal."""
    settings = [
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1", "evaluation.every_steps=2",
        "evaluation.validation_limit=8", "evaluation.test_limit=20", "task.train_filter.raw_ndcg_below=0.9",
        "prompts_per_step=null", "grpo.per_device_train_batch_size=8", "grpo.num_generations=4",
        "grpo.max_completion_length=6", "grpo.save_steps=2", "grpo.save_total_limit=2", "grpo.max_steps=6",
        "grpo.learning_rate=1e-2",
    ]  # fmt: skip
    whole, shared = tmp_path / "whole", [f"output_dir={tmp_path / 'whole'}"]
    with both([tmp_path, tmp_path], [*settings, *shared]) as started:
        outputs = finish(started, 400)
    assert [process.code for process in started] == [0, 0], "\n".join(outputs)[-6000:]
    assert "trained - raw query" in outputs[0] and "rec-r1: " not in "".join(outputs)
    assert "machine" not in json.loads((whole / "run.json").read_text())

    folders = [tmp_path / "a", tmp_path / "b"]
    local, runs_ = [*settings, "output_dir=runs/x"], [folder / "runs" / "x" for folder in folders]
    with both(folders, local) as started:
        wait_for_step(3, runs_[0] / "metrics.jsonl", started[0])
        started[0].kill()
        (said,) = finish(started[1:], 120)  # It takes seconds; a busy machine may take longer.
    assert started[1].code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("rec-r1: ")]
    assert "the connection to another process of this training was lost" in line
    assert "start all machines again with --resume (the newest complete checkpoint here is checkpoint-2)" in line
    assert "Traceback" not in said.partition("failed (exitcode: 2)")[0]  # What follows is the launcher's own.
    names = [{path.name for path in (run / "checkpoint-2").iterdir()} for run in runs_]
    assert names[0] == names[1] and {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} < names[0]

    # Machine 1 was replaced: its folder is empty, and the checkpoint is copied to it.
    shutil.rmtree(runs_[1])
    with both(folders, [*local, "--resume"]) as started:
        outputs = finish(started, 400)
    assert [process.code for process in started] == [0, 0], "\n".join(outputs)[-6000:]
    assert logged(runs_[0]) == logged(whole)
    assert rows(runs_[0] / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")
    last = [row for row in rows(whole / "rollouts.rank1.jsonl") if row["step"] >= 2]
    assert rows(runs_[1] / "rollouts.rank1.jsonl") == last
    weights = [run / "checkpoint-6" / "adapter_model.safetensors" for run in (whole, *runs_)]
    assert len({path.read_bytes() for path in weights}) == 1
    assert not (runs_[1] / "best").exists() and (runs_[0] / "best.json").is_file()
    assert {path.name for path in checkpoints.found(runs_[1])} == {"checkpoint-4", "checkpoint-6"}


def test_machines_that_share_a_folder_with_some_only():
    assert machines._sharing([[True, False, False], [False, True, False], [False, False, True]]) is None
    assert machines._sharing([[True, False, False], [False, True, True], [False, True, True]]) == (1, 2)
