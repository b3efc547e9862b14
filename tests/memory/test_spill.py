import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from flexjax.memory import spill
from flexjax.memory.spill import SpillFolder

ROOT = pathlib.Path(__file__).parents[2]
HOLDER = """
import pathlib, sys
from flexjax.memory.spill import SpillFolder
folder = SpillFolder(pathlib.Path(sys.argv[1]))
(folder.path / "cache").mkdir()
(folder.path / "cache" / "chunk").write_bytes(bytes(1000))
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process with a spill folder below `tmp_path`, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process, pathlib.Path(process.stdout.readline().strip())
        process.kill()


def test_close_removes_the_folder_and_all_that_lies_in_it(tmp_path):
    parent = tmp_path / "not" / "there" / "yet"
    folder = SpillFolder(parent)
    (folder.path / "chunk").write_bytes(b"x")
    folder.close()
    folder.close()
    assert list(parent.iterdir()) == []


def test_a_living_process_keeps_its_folder_and_a_killed_one_loses_it(tmp_path, holder):
    process, theirs = holder
    ours = SpillFolder(tmp_path)
    assert (theirs / "cache" / "chunk").stat().st_size == 1000
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert theirs.exists()
    next_one = SpillFolder(tmp_path)
    assert not theirs.exists()
    assert ours.path.exists()
    ours.close()
    next_one.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_spill_folder_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "flexjax-spill-notes").write_text("mine too")
    (tmp_path / "flexjax-spill-new").mkdir()  # a process about to lock it
    old = tmp_path / "flexjax-spill-old"
    old.mkdir()
    os.utime(old, (0, 0))
    SpillFolder(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "flexjax-spill-new",
        "flexjax-spill-notes",
        "mine",
    ]


@pytest.mark.parametrize("moment", ["before its lock", "after its lock"])
def test_a_folder_that_another_start_sweeps_away_is_made_again(
    tmp_path, monkeypatch, moment
):
    """Between making a folder and locking it, another process may take it for dead."""
    lock, calls = fcntl.flock, []

    def race(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            if moment == "before its lock":
                spill.sweep(tmp_path)
            else:
                raise BlockingIOError  # the other one holds it just now
        return lock(descriptor, operation)

    monkeypatch.setattr(spill.fcntl, "flock", race)
    folder = SpillFolder(tmp_path)
    assert (folder.path / "lock").exists()
    folder.close()


def unwritable_parents(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    (tmp_path / "file").write_text("")
    return [tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/self")]


@pytest.mark.parametrize("index", range(3))
def test_an_unwritable_parent_is_one_sentence(tmp_path, index):
    parent = unwritable_parents(tmp_path)[index]
    if not parent.is_relative_to(tmp_path) and not parent.exists():
        pytest.skip("no file system that refuses everybody")
    with pytest.raises(ValueError, match="cannot write into .*; choose a folder") as e:
        SpillFolder(parent)
    assert str(parent) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_file_system_without_locks_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(spill.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="Operation not supported"):
        SpillFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []
