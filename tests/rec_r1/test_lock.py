"""Two trainings in one folder: the second one is refused before it checks or writes anything."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
from runs_ import INFO, checkpoint

import rec_r1
from rec_r1 import runs
from rec_r1.config import UserError
from rec_r1.runs import lock, machines

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, pipe, forks: bool) -> None:
    """A process that trains in a folder, and that may have forked another one, until it is killed."""
    with machines.alone_in(folder):
        pipe.send(os.fork() if forks else 0)
        signal.pause()


@contextlib.contextmanager
def another_training(folder: Path, forks: bool = False):
    """Yields a process that holds the lock of a folder, and the id of a process that it has forked."""
    pipe, other = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, other, forks))
    process.start()
    child = pipe.recv()
    try:
        yield process, child
    finally:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_is_refused_and_changes_nothing(recipe, resume):
    """The first one is before config.yaml, or trains already and has a checkpoint."""
    folder = Path(recipe.output_dir)
    if resume:
        runs.begin(recipe, 0, INFO)
        checkpoint(folder, 2), checkpoint(folder, 4)
    with another_training(folder) as (process, _):
        before = sorted(folder.rglob("*"))
        who = rf"another training writes to this folder \(process {process.pid} on {socket.gethostname()}\): wait for"
        with pytest.raises(UserError, match=who):
            rec_r1.train(recipe, resume)
        assert sorted(folder.rglob("*")) == before
        with machines.alone_in(folder.with_name("another")):
            pass
    with machines.alone_in(folder):  # It was killed: the lock is free, although its file is still there.
        assert json.loads((folder / lock.NAME).read_text())["process"] == os.getpid()
    assert not (folder / lock.NAME).exists()


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    with another_training(tmp_path, forks=True) as (process, child):
        process.kill()
        process.join()
        os.kill(child, 0)  # It lives.
        with machines.alone_in(tmp_path):
            pass


def test_the_lock_alone_does_not_make_a_folder_a_run(recipe, tmp_path):
    folder = Path(recipe.output_dir)
    with machines.alone_in(folder):
        runs.prepare(recipe, resume=False)
        assert not runs.is_started(folder)  # which `check` reads
    assert not folder.exists()  # Nothing was written.
    with machines.alone_in(folder):
        runs.begin(recipe, 0, INFO)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir: .*file is a file"), machines.alone_in(tmp_path / "file" / "run"):
        pass


def test_machines_of_one_training_may_share_the_folder(tmp_path):
    with lock.held(tmp_path, "one"):
        with lock.held(tmp_path, "one"):
            pass
        with pytest.raises(UserError, match="another training"), lock.held(tmp_path, "two"):
            pass


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Between the opening of the file and its locking, the former holder removes it and another one takes its place."""
    flock, former = fcntl.flock, lock.held(tmp_path, "former")
    former.__enter__()

    def late(descriptor: int, how: int) -> None:
        monkeypatch.undo()
        former.__exit__(None, None, None)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path, "next"):
        assert json.loads((tmp_path / lock.NAME).read_text())["training"] == "next"
        with pytest.raises(UserError), lock.held(tmp_path, "third"):
            pass


def test_a_file_system_without_locks_is_warned_of(recipe, monkeypatch, caplog):
    """There `begin` refuses a run that has begun since the folder was checked, and removes nothing."""

    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none)
    folder = Path(recipe.output_dir)
    with machines.alone_in(folder), machines.alone_in(folder):
        for one in (recipe, dataclasses.replace(recipe, seed=7)):
            runs.prepare(one, resume=False)
        runs.begin(recipe, 0, INFO)
        checkpoint(folder, 2)
        with pytest.raises(UserError, match="is not empty: continue its run with --resume"):
            machines.begin(dataclasses.replace(recipe, seed=7), 0, INFO, resume=False)
    assert caplog.text.count("has no locks (Operation not supported)") == 2
    assert (folder / "checkpoint-2").is_dir() and not (folder / lock.NAME).exists()
