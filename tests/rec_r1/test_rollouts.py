"""The files of rollouts: rows written are rows read, for parts of any size, kills, resumes and several processes."""

import gzip
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1.config import UserError
from rec_r1.runs import rollouts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # with line separators and control characters


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(rollouts, "PART_BYTES", 100)


def read(file):
    return [row for row, _ in rollouts.rows(file)]


def numbered(*numbers):
    return [{"step": number // 2, "number": number} for number in numbers]


def parts(file):
    return sorted(path.name for path in file.with_name(f"{file.stem}.parts").glob("*"))


@given(st.data())
def test_rows_written_are_rows_read(data):
    """Appends of several processes, and resumes from earlier steps. Parts may be of any size."""
    before = rollouts.PART_BYTES
    rollouts.PART_BYTES = data.draw(st.integers(1, 600))
    try:
        with tempfile.TemporaryDirectory() as name:
            _write_and_resume(Path(name), data)
    finally:
        rollouts.PART_BYTES = before


def _write_and_resume(run, data):
    processes = data.draw(st.integers(1, 3))
    expected = {rollouts.file_of(run, process): [] for process in range(processes)}
    step = 0
    for _ in range(data.draw(st.integers(1, 12))):
        if step and data.draw(st.integers(0, 3)) == 0:
            step = data.draw(st.integers(0, step))
            cut = data.draw(st.sampled_from(list(expected)))
            with cut.open("ab") as file:  # A killed process leaves a line that is cut, maybe inside a character.
                file.write('{"step": 0, "completion": "🎉'.encode()[: data.draw(st.integers(0, 30))])
            rollouts.remove_after(run, step - 1)
            expected = {file: [row for row in rows if row["step"] < step] for file, rows in expected.items()}
        else:
            for file, rows in expected.items():
                new = [{"step": step, "completion": text} for text in data.draw(st.lists(TEXT, max_size=5))]
                rollouts.append(file, new)
                rows += new
            step += data.draw(st.integers(0, 1))  # A step may have several batches.
        for file, rows in expected.items():
            assert read(file) == rows
            closed = rollouts._parts(file).values()
            assert all(path.suffix == ".gz" and path.stat().st_size for path in closed)
        assert set(rollouts.files(run)) == {file for file, rows in expected.items() if rows or file.is_file()}
    for file, rows in expected.items():  # The plain file is never much larger than a part.
        largest = max((len(json.dumps(row, ensure_ascii=False).encode()) + 1 for row in rows), default=0)
        assert not file.is_file() or file.stat().st_size < rollouts.PART_BYTES + 5 * largest


def test_a_small_run_has_one_plain_file(tmp_path):
    file = rollouts.file_of(tmp_path, 0)
    for number in range(50):
        rollouts.append(file, numbered(number))
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts.jsonl"]
    assert file.read_text() == "".join(json.dumps(row) + "\n" for row in numbered(*range(50)))


def test_a_copy_made_at_any_moment_holds_every_row_and_can_be_continued(tmp_path, monkeypatch, small_parts):
    """A process may be killed at any moment. So the folder is copied before each change that the file system sees."""
    run, copies = tmp_path / "run", []
    run.mkdir()
    file, written = rollouts.file_of(run, 0), 0

    def watched(function):
        def call(*args, **options):
            copies.append((shutil.copytree(run, tmp_path / f"copy{len(copies)}"), written))
            return function(*args, **options)

        return call

    for name in ("rename", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    monkeypatch.setattr(rollouts.os, "fsync", watched(rollouts.os.fsync))
    for number in range(24):
        rollouts.append(file, numbered(number))
        written = number + 1
    rollouts.remove_after(run, 4)
    monkeypatch.undo()
    monkeypatch.setattr(rollouts, "PART_BYTES", 100)
    assert len(copies) > 30 and any(parts(copy / "rollouts.jsonl") for copy, _ in copies)
    assert any(name.endswith(".tmp") for copy, _ in copies for name in parts(copy / "rollouts.jsonl"))
    for copy, count in copies:
        file = rollouts.file_of(copy, 0)
        found = read(file)  # remove_after was called with 24 rows, and leaves 10.
        assert found == numbered(*range(len(found)))
        assert len(found) == count or (count == 24 and 10 <= len(found) < 24)
        rollouts.remove_after(copy, 4)
        assert read(file) == numbered(*range(min(10, count)))
        for number in range(min(10, count), 20):
            rollouts.append(file, numbered(number))
        assert read(file) == numbered(*range(20))
        assert all(name.endswith(".jsonl.gz") and name[0] != "." for name in parts(file))


WRITER = """
import sys, pathlib
from rec_r1.runs import rollouts
rollouts.PART_BYTES = 20_000
file = pathlib.Path(sys.argv[1])
for number in range(int(sys.argv[2]), 10**9):
    rollouts.append(file, [{"step": number, "completion": "word " * (number % 50)}])
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_no_row_that_it_has_written(tmp_path):
    file, known = rollouts.file_of(tmp_path, 0), 0
    for seconds in (0.05, 0.11, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(file), str(known)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = [process.stdout.readline()]
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        said += process.communicate(timeout=60)[0].splitlines()
        last = int([line for line in said if line.strip()][-1])
        found = [row["step"] for row in read(file)]
        assert found == list(range(len(found))) and len(found) > last > known
        known = last
        rollouts.remove_after(tmp_path, known - 1)
        assert [row["step"] for row in read(file)] == list(range(known))
    assert len(parts(file)) > 2


def test_a_reader_gets_every_row_while_the_training_goes_on(tmp_path, small_parts):
    for taken in range(12):
        file = rollouts.file_of(tmp_path / str(taken), 0)
        file.parent.mkdir()
        for number in range(11):
            rollouts.append(file, numbered(number))
        reader = rollouts.rows(file)
        found = [row for row, _ in itertools.islice(reader, taken)]
        for number in range(11, 40):  # These close the part that is being read, and further ones.
            rollouts.append(file, numbered(number))
        found += [row for row, _ in reader]
        assert found == numbered(*range(len(found))) and len(found) >= 11


def test_a_part_that_is_moved_or_compressed_before_it_is_opened_is_found_again(tmp_path, monkeypatch, small_parts):
    file = rollouts.file_of(tmp_path, 0)
    rollouts.append(file, numbered(*range(5)))
    opened, todo = rollouts._open, [numbered(5), numbered(*range(6, 12)), numbered(12)]

    def open_later(path):
        if todo:
            rollouts.append(file, todo.pop(0))
        return opened(path)

    monkeypatch.setattr(rollouts, "_open", open_later)
    assert read(file) == numbered(*range(13)) and not todo


def test_a_file_that_consists_of_closed_parts_alone_is_found(tmp_path, small_parts):
    file = rollouts.file_of(tmp_path, 3)
    rollouts.append(file, numbered(*range(9)))
    rollouts.append(file, numbered(9))
    file.unlink()
    assert rollouts.files(tmp_path) == [file] and read(file) == numbered(*range(9))


def test_a_missing_part_is_named(tmp_path, caplog, small_parts):
    file = rollouts.file_of(tmp_path, 0)
    for number in range(60):
        rollouts.append(file, numbered(number))
    assert len(parts(file)) > 4 and not caplog.records
    for name in ("00001", "00002"):
        (tmp_path / "rollouts.parts" / f"{name}.jsonl.gz").unlink()
    assert 0 < len(read(file)) < 60
    assert "part 00001 to 00002 is missing, so its rollouts are left out" in caplog.text


def test_a_damaged_part_is_refused_with_its_name(tmp_path, small_parts):
    file = rollouts.file_of(tmp_path, 0)
    for number in range(20):
        rollouts.append(file, numbered(number))
    part = tmp_path / "rollouts.parts/00000.jsonl.gz"
    whole = part.read_bytes()
    line = gzip.compress(b'{"step": 0}\n{"step"\n')
    flipped = bytes([*whole[:-12], whole[-12] ^ 255, *whole[-11:]])
    for content in (whole[:-9], b"not compressed", flipped, line):
        part.write_bytes(content)
        for use in (read, lambda file: rollouts.remove_after(file.parent, -1)):
            with pytest.raises(
                UserError, match=r"00000\.jsonl\.gz.*damaged.*restore the file from a copy, or delete it"
            ):
                use(file)
        if content is not line:
            with pytest.raises(UserError, match="damaged"):
                rollouts.digest([file])
        rollouts.append(file, numbered(99))  # so that something is left to remove
    part.write_bytes(whole)
    rollouts.remove_after(tmp_path, -1)
    assert read(file) == []


@given(st.lists(st.lists(TEXT, min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 400))
def test_the_digest_does_not_depend_on_the_parts(batches, size):
    before = rollouts.PART_BYTES
    found = []
    try:
        for rollouts.PART_BYTES in (before, size):
            with tempfile.TemporaryDirectory() as name:
                files = [rollouts.file_of(Path(name), process) for process in (0, 1)]
                for step, texts in enumerate(batches):
                    rollouts.append(files[step % 2], [{"step": step, "completion": text} for text in texts])
                found.append(rollouts.digest(rollouts.files(Path(name))))
    finally:
        rollouts.PART_BYTES = before
    assert found[0] == found[1]


@pytest.mark.slow
def test_common_tools_read_the_parts(tmp_path, small_parts):
    import datasets
    import pandas

    file = rollouts.file_of(tmp_path, 0)
    rows = [{"step": step, "completion": f"word 🎉 {step}\n", "reward": step / 4} for step in range(12)]
    for row in rows:
        rollouts.append(file, [row])
    compressed = sorted((tmp_path / "rollouts.parts").glob("*.gz"))
    shown = subprocess.run(["zcat", "-f", *compressed, file], capture_output=True, text=True, check=True, timeout=60)
    assert [json.loads(line) for line in shown.stdout.split("\n") if line] == rows and len(compressed) > 2
    frames = [pandas.read_json(path, lines=True) for path in (*compressed, file)]
    assert pandas.concat(frames)["reward"].tolist() == [row["reward"] for row in rows]
    names = [str(path) for path in (*compressed, file)]
    loaded = datasets.load_dataset("json", data_files=names, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["completion"][:] == [row["completion"] for row in rows]
