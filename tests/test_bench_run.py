import json
import socket

import pytest

from bench import memory_cap
from bench.catalog import all_cases
from bench.memory_cap import Finished, ensure_can_cap
from bench.run import build_parser, main
from flexjax.cache_folder import CACHE_VARIABLE, default_cache
from flexjax.cli import BAD_INPUT, run_command

PROMISED = {
    *("case", "model", "policy", "placement", "page_cache", "tokens_per_s"),
    *("num_tokens", "seconds", "prefill", "decode", "step_s", "limits", "bytes_moved"),
    *("peak_rss_bytes", "peak_bytes", "predicted_peak_bytes", "memory_cap_bytes"),
    *("projected", "machine", "date", "command", "prompt_len", "gen_len"),
}
IN_A_PHASE = {
    *("seconds", "bytes_moved", "bytes_per_s", "busy_s", "bound_s", "bound_by"),
    "fraction_of_bound",
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """One of the tests' own, but for kernels, which take long to compile."""
    folder = tmp_path_factory.getbasetemp() / "bench-cache"
    kernels = default_cache() / "kernels"
    if not folder.exists():
        folder.mkdir()
        if kernels.is_dir():
            (folder / "kernels").symlink_to(kernels)
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def no_run(monkeypatch):
    """Fails if anything long is started."""

    def start(*args):
        raise AssertionError("it went on")

    monkeypatch.setattr("bench.run.weights_folder", start)


def bench_run(*words) -> int:
    return run_command(main, build_parser(), [str(word) for word in words])


def test_the_smoke_case_runs_and_its_report_is_whole(tmp_path, capsys):
    report_path, trace_path = tmp_path / "report.json", tmp_path / "trace.json"
    words = ("smoke", "--gen-len", 5, "--json", report_path, "--trace", trace_path)
    assert bench_run(*words) == 0
    report = json.loads(report_path.read_text())
    assert report.keys() >= PROMISED
    for phase in ("prefill", "decode"):
        values = report[phase]
        assert values.keys() == IN_A_PHASE
        assert {"disk read", "compute"} <= values["bound_s"].keys()
        assert values["bound_s"][values["bound_by"]] == max(values["bound_s"].values())
        assert values["bytes_moved"]["disk->device"] > 0
    moved = [report[phase]["bytes_moved"] for phase in ("prefill", "decode")]
    assert report["bytes_moved"] == {
        link: sum(part.get(link, 0) for part in moved) for link in report["bytes_moved"]
    }
    assert report["num_tokens"] == 2 * 2 * 5
    assert len(report["step_s"]) == 4
    assert report["projected"] is False
    assert report["memory_cap_bytes"] is None
    assert len(report["limits"]["measured"]) == 2
    assert report["command"] == "python -m bench.run smoke --gen-len 5"
    text = report_path.read_text()
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text
    assert json.loads(trace_path.read_text())["traceEvents"]
    out = capsys.readouterr().out
    assert "20 tokens in" in out
    assert "bound by" in out


@pytest.fixture
def capped():
    try:
        ensure_can_cap(1 << 30)
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("capped")
def test_under_a_cap_the_report_says_what_the_group_took(tmp_path):
    report_path = tmp_path / "report.json"
    assert bench_run("smoke", "--memory-cap", "1GB", "--json", report_path) == 0
    report = json.loads(report_path.read_text())
    assert report["memory_cap_bytes"] == 1_000_000_000
    assert 0 < report["cgroup_peak_bytes"] <= report["memory_cap_bytes"]


@pytest.mark.usefixtures("capped")
def test_a_cap_that_is_too_low_is_said(capsys):
    assert bench_run("smoke", "--memory-cap", "30MB") == BAD_INPUT
    message = "killed: it needed more than its cap of 28.6 MiB; raise the cap"
    assert message in capsys.readouterr().err


def test_a_capped_run_that_refuses_says_so_itself(monkeypatch, capsys):
    def refuse(command, cap_bytes):
        return Finished(
            returncode=BAD_INPUT,
            stdout="",
            stderr="error: shown already",
            killed_for_memory=False,
            peak_bytes=None,
        )

    monkeypatch.setattr("bench.run.ensure_can_cap", lambda cap_bytes: None)
    monkeypatch.setattr("bench.run.run_capped", refuse)
    with pytest.raises(SystemExit) as ended:
        bench_run("smoke", "--memory-cap", "1GB")
    assert ended.value.code == BAD_INPUT
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say what to run: either a CASE"),
        ("smoke --model opt-125m", "say what to run: either a CASE"),
        ("opt-1.3b-dsk", "unknown case 'opt-1.3b-dsk'; did you mean opt-1.3b-disk"),
        ("smoke --batch-size 3", "--batch-size does not go with a case"),
        ("smoke --overlap false", "--overlap does not go with a case"),
        ("--model opt-9b", "'opt-9b' is neither a folder nor a published model"),
        ("--model no/such/opt-125m", "neither a folder nor a published model"),
        ("--model opt-125m --prompt-len 2030", "need 2062 positions"),
        ("--model opt-125m --weights disk=2", "number between 0 and 1"),
        ("smoke --memory-cap lots", "'lots' is not a size"),
        ("smoke --memory-cap 0", "a memory cap of 0 bytes"),
        ("smoke --json /proc/nothing/report.json", "cannot write into /proc/nothing"),
        ("smoke --json /", "--json / cannot be written"),
        ("smoke --trace /", "--trace / cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(words, message, capsys):
    assert bench_run(*words.split()) == BAD_INPUT
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("no_run")
def test_a_cap_that_cannot_be_set_is_said_before_anything_starts(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory_cap, "_ROOT", tmp_path)
    assert bench_run("smoke", "--memory-cap", "2GB") == BAD_INPUT
    assert "memory cannot be capped at 1.9 GiB" in capsys.readouterr().err


def test_no_room_for_random_weights_is_said_before_any_is_made(cache, capsys):
    words = ("--model", "opt-175b", "--weights", "disk=1", "--batch-size", 1)
    assert bench_run(*words) == BAD_INPUT
    assert "not enough space in" in capsys.readouterr().err
    assert not list((cache / "random-opt-175b").glob("tensors/*"))


def test_the_list_names_every_case(capsys):
    assert bench_run("--list") == 0
    out = capsys.readouterr().out
    for case in all_cases():
        assert f"{case.name} " in out
