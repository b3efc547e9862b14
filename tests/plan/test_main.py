"""The planner's command line."""

import json
import math

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from flexjax.arrangement import Group
from flexjax.checkpoint import EMBEDDED_MODEL
from flexjax.cli import run_command
from flexjax.plan.__main__ import build_parser, main
from flexjax.plan.hardware import read_hardware
from flexjax.plan.planner import find_model
from flexjax.policy import read_policy
from flexjax.prompt_file import PromptFile
from flexjax.prompt_lengths import prompt_lengths
from flexjax.tokenizer import load_tokenizer


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
        ((*SMALL, "--prompts", "x"), "--prompt-len is of prompts that are not there"),
        (
            ("opt-125m", "--hardware", "h200", "--prompts", "x", "--json", "x"),
            "--json and --prompts both",
        ),
        (("calibrate", "--prompts", "x"), "--prompts has no effect on calibrate"),
        (
            ("opt-125m", "--prompts", "no-such-file", "--hardware", "h200"),
            "no-such-file cannot be read",
        ),
        (
            ("opt-125m", "--prompts", "x", "--gen-len", 0, "--hardware", "h200"),
            "gen_len is 0",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, message, capsys):
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def write_prompts(path, lengths):
    path.write_text("".join(f"{[7] * length}\n" for length in lengths))
    return path


def test_prompts_of_very_different_lengths_are_planned_in_parts(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "rows.jsonl", [1900, *[20] * 4000, 1950, 30])
    plan, policy = tmp_path / "plan.json", tmp_path / "policy.json"
    words = ("opt-1.3b", "--hardware", "epyc-2-cores", "--host-memory", "3GiB")
    words = (*words, "--prompts", prompts, "--gen-len", 8)
    assert run(*words, "--json", plan, "--policy-json", policy) == 2
    values = json.loads(plan.read_text())
    jobs = [part["job"] for part in values["parts"]]
    assert [job["num_prompts"] for job in jobs] == [2, 4001]
    assert [job["prompt_len"] for job in jobs] == [2048, 32]
    total_s = sum(part["total_s"] for part in values["parts"])
    assert values["total_s"] == pytest.approx(total_s)
    assert values["block_s"] == max(part["block_s"] for part in values["parts"])
    assert values["tokens_per_s"] == pytest.approx(4003 * 8 / total_s)
    printed = capsys.readouterr()
    part = "part 2 of 2: prompts: 4,001, padded to at most 32 tokens; 8 new"
    assert part in printed.out
    assert "\nall parts " in printed.out
    assert "these prompts are planned in 2 parts" in printed.err
    assert not policy.exists()


def test_prompts_of_about_one_length_get_one_policy(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "rows.jsonl", range(20, 32))
    policy = tmp_path / "policy.json"
    words = ("--hardware", "epyc-2-cores", "--host-memory", "900MiB", "--gen-len", 4)
    assert run("opt-125m", *words, "--prompts", prompts, "--policy-json", policy) == 0
    out = capsys.readouterr().out
    assert "job: prompts: 12, padded to at most 32 tokens; 4 new ones each" in out
    assert "part" not in out
    assert read_policy(policy).block_size <= 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[7, 8]\n[7, 60000]\n", "line 2"),
        ("[7, 8]\n" + f"{[7] * 2045}\n", "rows.jsonl has 2045 tokens and max_tokens=4"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named(text, message, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    words = ("--prompts", path, "--gen-len", 4, "--hardware", "epyc-2-cores")
    assert run("opt-125m", *words) == 2
    assert message in capsys.readouterr().err


def test_texts_need_a_tokenizer(tmp_path, capsys, monkeypatch):
    asked = []

    def fetch(model, **_):
        asked.append(model)
        return str(tmp_path)

    monkeypatch.setattr("checkpoints_tools.hub.snapshot_download", fetch)
    path = tmp_path / "rows.jsonl"
    path.write_text('[7, 8]\n"a text"\n')
    words = ("--prompts", path, "--hardware", "epyc-2-cores")
    for model in ("opt-125m", "facebook/OPT-175B"):
        assert run(model, *words) == 2
        assert "has no tokenizer" in capsys.readouterr().err
    assert asked == ["facebook/opt-125m", "facebook/opt-66b"]


def test_texts_of_a_model_that_cannot_be_reached_say_what_they_need(
    tmp_path, capsys, monkeypatch
):
    def fail(model, **_):
        raise LocalEntryNotFoundError(f"no {model}")

    monkeypatch.setattr("checkpoints_tools.hub.snapshot_download", fail)
    path = tmp_path / "texts.txt"
    path.write_text("a text\n")
    assert run("opt-125m", "--prompts", path, "--hardware", "epyc-2-cores") == 2
    error = capsys.readouterr().err
    assert "texts.txt has texts, for which a tokenizer is needed, but" in error
    assert error.endswith("connect, or give a folder; or give token ids\n")


def test_texts_are_counted_by_the_tokenizer_of_the_folder(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("It is a truth\n" + 12 * "universally acknowledged " + "\n")
    with PromptFile(path) as prompts:
        encode = load_tokenizer(EMBEDDED_MODEL).encode
        expected = [len(encode(prompt)) for prompt in prompts]
    config = find_model(str(EMBEDDED_MODEL), platform="cpu").config
    found = prompt_lengths(path, str(EMBEDDED_MODEL), config, 4)
    assert found == (expected, [Group(0, range(2))])


def test_prompts_that_share_something_are_planned_apart_from_others(tmp_path, capsys):
    path, report = tmp_path / "prompts.jsonl", tmp_path / "plan.json"
    subjects = [[5 + number] * 900 for number in range(4)]
    prompts = [[*subjects[i % 4], 1000 + i, *range(9 + i % 50)] for i in range(400)]
    prompts += [[2000 + i] * (20 + i) for i in range(30)]
    path.write_text("\n".join(map(str, prompts)))
    flags = ("--gen-len", 8, "--hardware", "t4-208gb", "--json", report)
    assert run("facebook/opt-350m", "--prompts", path, *flags) == 0
    text = capsys.readouterr().out
    assert "part 1 of 2: prompts: 30, padded to at most 64 tokens" in text
    assert (
        "prompts: 400, padded to at most 64 tokens behind 900 that about 100 share"
        in text
    )
    first, second = json.loads(report.read_text())["parts"]
    assert (first["job"]["num_shared"], second["job"]["num_shared"]) == (0, 900)
    assert second["job"]["rows_per_prefix"] == 100
    # No batch is filled up by much.
    size = second["policy"]["batch_size"]
    assert math.ceil(100 / size) * size < 120


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
