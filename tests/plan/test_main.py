"""The planner's command line."""

import json

import pytest

from flexjax.cli import run_command
from flexjax.plan.__main__ import build_parser, main
from flexjax.plan.hardware import read_hardware
from flexjax.policy import read_policy


def run(*words) -> int:
    return run_command(main, build_parser(), [str(word) for word in words])


JOB = ("--prompt-len", 32, "--gen-len", 4, "--num-prompts", 20)
SMALL = ("opt-125m", *JOB, "--hardware", "epyc-2-cores", "--host-memory", "900MiB")


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    plan, policy = tmp_path / "plan.json", tmp_path / "policy.json"
    assert run(*SMALL, "--json", plan, "--policy-json", policy) == 0
    values = json.loads(plan.read_text())
    assert {
        *("policy", "tokens_per_s", "prefill_s", "decode_s", "total_s"),
        *("bottleneck", "bytes"),
    } <= set(values)
    assert values["hardware"]["host_memory_bytes"] == 900 << 20
    assert read_policy(policy).batch_size == values["policy"]["batch_size"]
    assert "bottleneck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("opt-9b", *JOB, "--hardware", "h200"), "unknown model 'opt-9b'"),
        (("calibrate", "--hardware", "h200"), "--hardware has no effect on calibrate"),
        ((*SMALL, "--offload-dir", "x"), "--offload-dir says which disk is measured"),
        ((*SMALL, "--num-prompts", 0), "num_prompts is 0"),
        ((*SMALL, "--device-memory", "1GiB"), "--device-memory has no effect"),
        (("calibrate", "--block-latency", 5), "--block-latency has no effect"),
        (("calibrate", "--allow-quantized"), "--allow-quantized has no effect"),
        (("calibrate", "--gen-len", 32), "--gen-len has no effect"),
        (
            (*SMALL, "--json", "x", "--policy-json", "x"),
            "--json and --policy-json both",
        ),
        ((*SMALL, "--json", "epyc-2-cores"), "--json and --hardware both name"),
        ((*SMALL, "--host-memory", ""), "'' is not a size"),
        ((*SMALL, "--block-latency", 0), "--block-latency is 0, expected more than 0"),
        ((*SMALL, "--block-latency", 1e-6), "no block is done within 1e-06 s"),
        ((*SMALL, "--disk", "much"), "'much' is not a size"),
        ((*SMALL, "--hardware", "cray"), "hardware cray cannot be read"),
        ((*SMALL, "--host-memory", "450MiB"), "not even one prompt of 32 tokens fits"),
        ((*SMALL, "--json", "/dev/null/plan.json"), "cannot write into /dev/null"),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_calibrate_prints_every_figure(monkeypatch, capsys, tmp_path):
    machine = tmp_path / "machine.json"

    asked = []

    def calibrated(folder, device, progress, *, anew):
        asked.append(anew)
        progress("measuring")
        return read_hardware("epyc-2-cores")

    monkeypatch.setattr("flexjax.plan.calibrate.calibrated", calibrated)
    assert run("calibrate", "--json", machine) == 0
    assert read_hardware(str(machine)) == read_hardware("epyc-2-cores")
    assert run("opt-125m", *JOB) == 0
    out = capsys.readouterr().out
    assert asked == [True, False]
    for figure in ("TFLOP/s", "GB/s", "GiB", " us", "million/s"):
        assert figure in out
