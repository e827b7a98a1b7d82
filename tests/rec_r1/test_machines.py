"""Several machines: real processes that meet over the loopback interface, each machine with folders of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import meeting
import pytest

from rec_r1.runs import checkpoints, machines

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen:
    """A process in a group of its own, so that it can be killed with all processes that it starts."""
    folder.mkdir(exist_ok=True, parents=True)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(started: list[subprocess.Popen], seconds: float) -> list[str]:
    """The outputs of processes, which must end within so many seconds."""
    deadline, outputs = time.monotonic() + seconds, []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
    finally:
        for process in started:
            kill(process)
    return outputs


def kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_processes_of_two_machines_agree_and_wait(tmp_path):
    (tmp_path / "slow_build.py").write_text(meeting.BUILDER)
    port, started = str(free_port()), []
    for rank, machine, local, processes in ((0, 0, 0, 2), (1, 0, 1, 2), (2, 1, 0, 1)):
        environment = {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "MACHINE": str(machine), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        started.append(start([str(ROOT / "tests/rec_r1/meeting.py"), str(tmp_path)], tmp_path, **environment))
    outputs = finish(started, 200)
    assert [process.returncode for process in started] == [0, 0, 0], "\n".join(outputs)[-6000:]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    host = socket.gethostname()
    for one in found:
        assert one["errors"] == [f"machine 1 ({host}): not here", f"machine 0 ({host}): not here"]
        assert one["from_main"] == 0
        assert one["separate"] == [True, False]
        assert one["waited"]
        assert one["unwritable"].startswith(f"machine 1 ({host}): ") and "checkpoint-6/" in one["unwritable"]
    own = [tmp_path / f"machine-{machine}" / "run" for machine in (0, 1)]
    for run in own:
        shards = [(run / "checkpoint-4" / "shards" / f"shard_{rank}.pth").read_bytes() for rank in range(3)]
        assert shards == [bytes([rank]) * 1000 for rank in range(3)]
        assert not list(run.glob("checkpoint-4/**/.*")) and checkpoints.found(run)[-1].name == "checkpoint-4"
    weights = [(run / "checkpoint-4" / "weights").read_bytes() for run in own]
    assert weights[0] == weights[1] and len(weights[0]) == 3_000_000
    # Each waiting process's machine says what it waits for.
    assert "the other processes of this machine wait for this one to open the index of slow_build" in outputs[0]
    assert "waiting" not in outputs[1]


def machine(number: int, port: int, folder: Path, arguments: list[str]) -> subprocess.Popen:
    """The launcher of one of two machines, with one process. ``folder``: its working folder."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=2"]
    launch += [f"--machine_rank={number}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    launch += ["--rdzv_backend=static", "--mixed_precision=no", "--dynamo_backend=no"]
    return start([*launch, "-m", "rec_r1.train", "quickstart", *arguments], folder)


def both(folders: list[Path], arguments: list[str]) -> list[subprocess.Popen]:
    """Two machines that train together, each in its working folder."""
    port = free_port()
    return [machine(number, port, folder, arguments) for number, folder in enumerate(folders)]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(run: Path) -> list[dict]:
    """What metrics.jsonl has, without what a clock says."""
    times = ("time", "seconds", "runtime", "_per_second", "total_flos", "train_loss", "cache_hits")
    return [{k: v for k, v in row.items() if not any(t in k for t in times)} for row in rows(run / "metrics.jsonl")]


@pytest.mark.slow
def test_two_machines_one_killed_and_resumed(tiny_model, tmp_path):
    """With a shared folder, a training ends. With local ones, machine 0 is killed, and the resumed training is equal."""
    settings = [
        f"model.name={tiny_model}", "model.dtype=float32", "lora.layers_to_transform=0-1", "evaluation.every_steps=2",
        "evaluation.validation_limit=8", "evaluation.test_limit=20", "task.train_filter.raw_ndcg_below=0.9",
        "grpo.per_device_train_batch_size=8", "grpo.gradient_accumulation_steps=1", "grpo.num_generations=4",
        "grpo.max_completion_length=6", "grpo.save_steps=2", "grpo.save_total_limit=2", "grpo.max_steps=6",
        "grpo.learning_rate=1e-2",
    ]  # fmt: skip
    whole, shared = tmp_path / "whole", [f"output_dir={tmp_path / 'whole'}"]
    started = both([tmp_path, tmp_path], [*settings, *shared])
    outputs = finish(started, 400)
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-6000:]
    assert "trained - raw query" in outputs[0] and "rec-r1: " not in "".join(outputs)
    assert "machine" not in json.loads((whole / "run.json").read_text())

    folders = [tmp_path / "a", tmp_path / "b"]
    local, runs_ = [*settings, "output_dir=runs/x"], [folder / "runs" / "x" for folder in folders]
    started = both(folders, local)
    deadline = time.monotonic() + 300
    while not (runs_[0] / "metrics.jsonl").exists() or '"step": 3,' not in (runs_[0] / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    kill(started[0])
    (said,) = finish(started[1:], 60)
    assert started[1].returncode != 0
    (line,) = [line for line in said.splitlines() if line.startswith("rec-r1: ")]
    assert "the connection to another process of this training was lost" in line
    assert "start all machines again with --resume (the newest complete checkpoint here is checkpoint-2)" in line
    assert "Traceback" not in said.partition("ChildFailedError")[0].replace("torch.distributed.elastic", "")
    names = [{path.name for path in (run / "checkpoint-2").iterdir()} for run in runs_]
    assert names[0] == names[1] and {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} < names[0]

    # Machine 1 lost its disk, and gets the checkpoint again. Alone, machine 0 could not know.
    shutil.rmtree(runs_[1])
    started = both(folders, [*local, "--resume"])
    outputs = finish(started, 400)
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)[-6000:]
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
