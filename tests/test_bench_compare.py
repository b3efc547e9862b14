"""The command line: both systems under one cap, and a report."""

import json
import pathlib
import sys
from unittest import mock

import pytest

from bench import compare
from bench.memory_cap import Finished
from bench.peers import accelerate_system, weights
from bench.peers.accelerate_system import SCRIPT, Accelerate
from bench.peers.flexjax_system import Flexjax
from bench.peers.system import Failed
from flexjax.cli import run_command
from tests.test_bench_sweep import JOB, setting

ARGS = ["opt-125m", "--memory-cap", "2GB", "--batch-sizes", "8", "--layers", "disk"]
OURS = ["--our-settings", "--batch-size 4 --weights disk=1"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A command line whose children are faked; returns their commands and caps."""
    ran: list[tuple[list[str], int | None]] = []

    def run(command: list[str], cap_bytes: int | None) -> Finished:
        ran.append((command, cap_bytes))
        steps = [1.0] * (int(command[command.index("--gen-len") + 1]) - 1)
        seconds = 3.0 if str(SCRIPT) in command else 1.0
        report = {
            "prefill_s": seconds,
            "prefill": {"seconds": seconds},
            "step_s": steps,
            "peak_rss_bytes": 1 << 30,
            "dtype": "bfloat16",
            "versions": {"torch": "1"},
            "machine": {"versions": {"jax": "1"}},
        }
        path = pathlib.Path(command[command.index("--json") + 1])
        path.write_text(json.dumps(report))
        return Finished(
            returncode=0,
            stdout="",
            stderr="",
            killed_for_memory=False,
            peak_bytes=1 << 30,
        )

    folders = {"store": tmp_path / "store", "hf": tmp_path / "hf"}
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(compare, "run_capped", run)
    monkeypatch.setattr(compare, "ensure_can_cap", lambda cap_bytes: None)
    monkeypatch.setattr(compare, "make_weights", lambda model, formats: folders)
    monkeypatch.setattr(Accelerate, "check", lambda self: None)
    return ran


def status(*argv: str) -> int:
    return run_command(compare.main, compare.build_parser(), argv)


def test_a_comparison_runs_both_under_one_cap_and_reports(machine, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert status(*ARGS, *OURS, "--gen-len", "4", "--json", str(path)) == 0
    assert [cap for _, cap in machine] == [2_000_000_000] * 2
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["systems"]] == ["flexjax", "accelerate"]
    assert report["ratio"] == pytest.approx((4 * 4 / 4) / (8 * 4 / 6))
    assert report["memory_cap_bytes"] == 2_000_000_000
    assert (report["prompt_len"], report["gen_len"]) == (128, 4)
    assert {"model", "machine", "date", "command"} <= set(report)
    assert str(tmp_path) not in report["command"]
    for row in report["systems"]:
        assert not row["projected"]
        assert len(row["tried"]) == 1
    assert "0.75 times" in capsys.readouterr().out


def test_one_system_alone_has_no_ratio(machine, tmp_path):
    path = tmp_path / "result.json"
    assert status(*ARGS, *OURS, "--only", "flexjax", "--json", str(path)) == 0
    assert len(machine) == 1
    assert json.loads(path.read_text())["ratio"] is None


def failing(returncode: int, *, killed: bool, stderr: str):
    def run(command: list[str], cap_bytes: int | None) -> Finished:
        return Finished(
            returncode=returncode,
            stdout="",
            stderr=stderr,
            killed_for_memory=killed,
            peak_bytes=None,
        )

    return run


@pytest.mark.parametrize(
    ("killed", "stderr", "reason"),
    [
        (True, "", "killed: out of memory"),
        (False, "Traceback\nRuntimeError: no\n", "exit status 1: RuntimeError: no"),
        (False, "", "exit status 1: it said nothing"),
    ],
)
def test_a_child_that_fails_is_a_row(machine, monkeypatch, killed, stderr, reason):
    run = failing(1, killed=killed, stderr=stderr)
    monkeypatch.setattr(compare, "run_capped", run)
    made = compare.run_child(Flexjax(), JOB, setting(4), 16)
    assert made.outcome == Failed(reason, killed)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["opt-9b"], "unknown model 'opt-9b'"),
        (["opt-125m", "--only", "deepspeed"], "deepspeed is no part of this"),
        (["opt-125m", "--only", "llama"], "expected flexjax or accelerate"),
        (["opt-125m", "--gen-len", "0"], "--gen-len is 0"),
        (["opt-125m", "--sweep-len", "2"], "--sweep-len is 2"),
        (["opt-125m", "--batch-sizes", "8", "0"], "--batch-sizes has 0"),
        (["opt-125m", "--prompt-len", "2040"], "2048 positions"),
        (["opt-125m", "--our-settings", "--batch-size 0"], "at least 1"),
        (["opt-125m", "--memory-cap", "2 pigs"], "is not a size"),
        (["opt-125m", "--json", "/"], "--json / cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(machine, capsys, argv, message):
    assert status(*argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not machine


def test_a_cap_that_cannot_be_set_stops_at_once(machine, monkeypatch, capsys):
    def refuse(cap_bytes: int) -> None:
        raise OSError("memory cannot be capped")

    monkeypatch.setattr(compare, "ensure_can_cap", refuse)
    assert status(*ARGS, *OURS) == 2
    assert "memory cannot be capped" in capsys.readouterr().err
    assert not machine


def test_a_peer_that_is_not_installed_is_named_with_what_to_do(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    missing = tmp_path / "no" / "python"
    assert status(*ARGS, "--peers-python", str(missing)) == 2
    assert "make peers" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interpreter_without_the_peer_is_no_peer(monkeypatch):
    monkeypatch.setattr(accelerate_system, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="make peers"):
        Accelerate(python=pathlib.Path(sys.executable)).check()


def test_an_interpreter_with_the_peer_is_one(monkeypatch):
    monkeypatch.setattr(accelerate_system, "PACKAGES", ("json", "numpy"))
    Accelerate(python=pathlib.Path(sys.executable)).check()


def test_room_for_both_formats_is_asked_for_before_either_is_made(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    usage = mock.Mock(free=int(1.5 * weights.weights_bytes("opt-125m")))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="not enough space"):
        weights.make_weights("opt-125m", {"store", "hf"})
    assert not list(tmp_path.iterdir())
