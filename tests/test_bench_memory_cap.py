import json
import os
import pathlib
import sys
import time

import pytest

from bench import memory_cap
from bench.memory_cap import Finished, ensure_can_cap, result_under_cap, run_capped

CAP_BYTES = 64 << 20
TAKES_TOO_MUCH = "x = b'x' * (256 << 20)"


@pytest.fixture
def capped():
    """Skips where this user may not cap memory."""
    try:
        ensure_can_cap(CAP_BYTES)
    except OSError as error:
        pytest.skip(str(error))


def groups() -> list[pathlib.Path]:
    """What this process has left behind."""
    mine = f"flexjax-cap-{os.getpid()}-*"
    return [found for parent, _ in memory_cap._parents() for found in parent.glob(mine)]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.usefixtures("capped")
def test_a_child_that_takes_too_much_is_killed_and_that_is_said():
    finished = run_capped(python(TAKES_TOO_MUCH), CAP_BYTES)
    assert finished.killed_for_memory
    assert finished.returncode == -9
    assert finished.peak_bytes == pytest.approx(CAP_BYTES, rel=0.05)
    assert not groups()


@pytest.mark.usefixtures("capped")
def test_a_cap_holds_for_what_the_child_starts():
    child = f"subprocess.call({python(TAKES_TOO_MUCH)})"
    program = f"import subprocess, sys; sys.exit({child} != 0)"
    finished = run_capped(python(program), CAP_BYTES)
    assert finished.killed_for_memory
    assert finished.returncode == 1


@pytest.mark.usefixtures("capped")
def test_a_child_within_its_cap_is_left_alone():
    finished = run_capped(python("print(len(b'x' * (16 << 20)))"), CAP_BYTES)
    assert (finished.returncode, finished.killed_for_memory) == (0, False)
    assert int(finished.stdout) == 16 << 20
    assert 16 << 20 < (finished.peak_bytes or 0) <= CAP_BYTES
    assert not groups()


@pytest.mark.usefixtures("capped")
def test_nothing_outlives_a_timeout():
    begun_s = time.monotonic()
    with pytest.raises(TimeoutError, match="sleep 60 .*more than 0.2 s"):
        run_capped(["sh", "-c", "sleep 60 & sleep 60"], CAP_BYTES, timeout_s=0.2)
    assert time.monotonic() - begun_s < 30
    assert not groups()


@pytest.mark.usefixtures("capped")
def test_a_group_goes_when_the_command_cannot_be_run(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("no")

    monkeypatch.setattr(memory_cap.subprocess, "Popen", refuse)
    with pytest.raises(PermissionError):
        run_capped(["true"], CAP_BYTES)
    assert not groups()


def test_without_a_cap_only_the_child_counts(capsys):
    program = (
        "import sys; print('b'); sys.stderr.buffer.write('é'.encode()); sys.exit(3)"
    )
    finished = run_capped(python(program), None)
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, "b\n", "é")
    assert (finished.killed_for_memory, finished.peak_bytes) == (False, None)
    assert capsys.readouterr().err == "é"  # shown as well


def test_a_child_goes_on_when_nobody_looks_any_more(monkeypatch):
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(memory_cap.sys, "stderr", Gone())
    program = "import sys; sys.stderr.write('e' * 300_000 + 'end')"
    finished = run_capped(python(program), None, timeout_s=60)
    assert finished.returncode == 0
    assert finished.stderr.endswith("end")


def test_much_output_is_read_and_the_end_of_stderr_kept():
    program = (
        "import sys; print('o' * 300_000); sys.stderr.write('e' * 300_000 + 'end')"
    )
    finished = run_capped(python(program), None)
    assert len(finished.stdout) == 300_001
    assert finished.stderr.endswith("eeeend")
    assert len(finished.stderr) < 100_000


def test_a_cap_that_cannot_be_set_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_cap, "_ROOT", tmp_path)
    for refused in (ensure_can_cap, lambda cap: run_capped(["true"], cap)):
        with pytest.raises(OSError, match="memory cannot be capped at 64.0 MiB"):
            refused(CAP_BYTES)
    with pytest.raises(ValueError, match="a memory cap of 0 bytes"):
        ensure_can_cap(0)


def test_the_nearest_group_that_hands_memory_down_is_taken(tmp_path, monkeypatch):
    own, root = tmp_path / "proc", tmp_path / "cgroup"
    own.write_text("0::/slice/scope\n3:cpu:/\n")
    (root / "slice/scope").mkdir(parents=True)
    (root / "slice/cgroup.subtree_control").write_text("cpu memory\n")
    monkeypatch.setattr(memory_cap, "_OWN_GROUPS", own)
    monkeypatch.setattr(memory_cap, "_ROOT", root)
    assert [folder for folder, _ in memory_cap._parents()] == [root / "slice"]


def test_groups_of_processes_that_are_gone_are_swept(tmp_path):
    gone, lives = (f"flexjax-cap-{pid}-0" for pid in (1 << 30, os.getpid()))
    for name in (gone, lives, "other"):
        (tmp_path / name).mkdir()
    memory_cap._sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {lives, "other"}


@pytest.mark.parametrize(
    ("killed", "message"), [(True, "killed for its memory"), (False, "no such thing")]
)
def test_a_process_that_fails_under_its_cap_is_told_of(monkeypatch, killed, message):
    finished = Finished(
        returncode=1,
        stdout="",
        stderr="error: no such thing\n",
        killed_for_memory=killed,
        peak_bytes=None,
    )
    monkeypatch.setattr(memory_cap, "run_capped", lambda *_: finished)
    with pytest.raises(OSError, match=message):
        result_under_cap("bench.grid", ["opt-1.3b"], 1000)


def test_what_the_process_prints_last_is_its_result(monkeypatch):
    finished = Finished(
        returncode=0,
        stdout="hello\n" + json.dumps({"chosen": 1}) + "\n",
        stderr="",
        killed_for_memory=False,
        peak_bytes=None,
    )
    monkeypatch.setattr(memory_cap, "run_capped", lambda *_: finished)
    assert result_under_cap("bench.grid", ["opt-1.3b"], 1000) == {"chosen": 1}
