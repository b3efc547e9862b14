"""The command line: one command from prompts to outputs, and one sentence if not."""

import json
import re

import pytest

from flexjax import generate
from flexjax.cli import run_command

pytestmark = pytest.mark.usefixtures("own_cache")


def run(*arguments: str) -> int:
    return run_command(generate.main, generate.build_parser(), arguments)


def test_outputs_and_metrics_are_written(golden, tmp_path, capsys):
    file = tmp_path / "out" / "outputs.json"
    status = run(
        *("--model", str(golden("opt-pre-ln").store), "--prompt-len", "7"),
        *("--gen-len", "4", "--gpu-batch-size", "2", "--num-gpu-batches", "2"),
        *("--percent", "0", "50", "50", "25", "100", "0"),
        *("--offload-dir", str(tmp_path), "--json", str(file), "--logprobs", "1"),
        "--ignore-eos",
    )
    assert status == 0
    report = json.loads(file.read_text())
    assert [len(o["prompt_token_ids"]) for o in report["outputs"]] == [7] * 4
    assert [len(o["outputs"][0]["token_ids"]) for o in report["outputs"]] == [4] * 4
    assert report["outputs"][0]["outputs"][0]["finish_reason"] == "length"
    assert report["metrics"]["num_tokens"] == 16
    assert report["policy"]["weights"] == {"device": 0.0, "host": 0.5}
    assert "16 tokens in" in capsys.readouterr().err


def test_a_policy_file_runs(golden, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps({"kv_cache": {"disk": 1}, "batch_size": 1, "schedule": "serial"})
    )
    file = tmp_path / "outputs.json"
    status = run(
        *("--model", str(golden("opt-pre-ln").store), "--prompt-len", "3"),
        *("--policy", str(policy), "--offload-dir", str(tmp_path)),
        *("--json", str(file), "--gen-len", "3"),
    )
    assert status == 0
    report = json.loads(file.read_text())
    assert report["policy"]["schedule"] == "serial"
    assert report["placement"]["kv_cache"]["disk"]["effective"] == 1.0


def test_prompts_from_a_file_on_the_embedded_model(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffIt is a truth\r\n\nShe was\u2028not a\n")
    file, trace = tmp_path / "outputs.json", tmp_path / "traces" / "trace.json"
    status = run(
        *("--prompts", str(prompts), "--max-tokens", "5"),
        *("--json", str(file), "--trace", str(trace)),
    )
    assert status == 0
    events = json.loads(trace.read_text())["traceEvents"]
    rows = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert "compute" in rows
    found = [output["prompt"] for output in json.loads(file.read_text())["outputs"]]
    assert found == ["It is a truth", "She was\u2028not a"]
    out = capsys.readouterr().out
    assert out.count("It is a truth") == 1
    assert len(out.split()) > 10


def test_dummy_weights_have_the_published_shape(tmp_path, monkeypatch):
    from flexjax.cache_folder import default_cache
    from flexjax.models.config import MODELS, OPTConfig

    small = OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    monkeypatch.setitem(MODELS, "opt-125m", small)
    arguments = ("--model", "facebook/opt-125m", "--path", "_DUMMY_", "--gen-len", "2")
    assert run(*arguments, "--prompt-len", "3") == 0
    assert (default_cache() / "random-opt-125m" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the prompts in one way"),
        (["--prompt", "a", "--prompt-len", "3"], "give the prompts in one way"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--prompt-len", "0"], "--prompt-len is 0"),
        (["--prompt", "a", "--model", "nowhere"], "'nowhere' is neither a folder"),
        (["--prompt", "a", "--weights", "device=2"], "--weights: .* 2.0"),
        (["--prompt", "a", "--weights", "disk=0.5"], "--weights: disk=0.5"),
        (["--prompt", "a", "--group-size", "0"], "group_size is 0, expected"),
        (
            ["--prompt", "a", "--weight-bits", "4", "--group-size", "60"],
            "'embed_tokens.weight' .* group_size of 60 does not divide",
        ),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "a", "--policy", "nowhere.json"], "policy nowhere.json"),
        (
            ["--prompt", "a", "--policy", "auto", "--batch-size", "2"],
            "--batch-size says some of it",
        ),
        (["--prompt", "a", "--path", "_DUMMY_"], "--path _DUMMY_ needs --model"),
        (["--prompt", "a", "--json", "/proc"], "--json /proc cannot be written"),
        (["--prompt", "a", "--trace", "/proc"], "--trace /proc cannot be written"),
        (["--prompt", "a", "--path", "x", "--model", "y"], "both name a model"),
        (["--prompt", "a", "--path", "nowhere"], "--path nowhere is no folder"),
        (["--prompt", "a", "--max-tokens", "9999"], "positions for"),
        (["--prompt", "a", "--json", "/proc/x/y.json"], "/proc/x"),
        (["--prompt", "a", "--json", "/proc/y.json"], "--json /proc/y.json cannot be"),
        (["--prompt", "a", "--json", "x", "--trace", "./x"], "--json and --trace both"),
        (["--prompts", __file__, "--json", __file__], "--json and --prompts both name"),
        (["--prompt-len", "99999999999"], "positions for"),
        (["--prompt", "a", "--output", "x.jsonl"], "--output is for answers to --pr"),
        (["--prompts", __file__, "--output", __file__], "py is there already; name"),
        (["--prompts", "a", "--output", "."], "--output '.' names no file; name one"),
        (["--prompts", "a", "--output", "new/"], "--output 'new/' names no file"),
        (["--prompts", "a", "--output", ""], "--output '' names no file; name one"),
        (["--prompts", "a", "--output", "/proc/y"], "--output /proc/y cannot be writ"),
        (["--prompt", "a", "--block-latency", "9"], "bounds the blocks of --output"),
        (
            ["--prompts=a", "--output=b", "--block-latency=9", "--batch-size=2"],
            "where no policy is given; leave it out",
        ),
        (
            ["--prompts", "a", "--output", "b", "--block-latency", "nan"],
            "--block-latency is nan, expected more than 0 seconds",
        ),
        (
            ["--prompts", "y.partial", "--output", "y"],
            "--prompts and the partial file of --output both name .*y.partial; give",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert "\n" not in error


def test_outputs_are_printed_though_the_disk_is_full(tmp_path, monkeypatch, capsys):
    def write(path, data):
        raise OSError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(generate, "write_atomically", write)
    arguments = ("--prompt", "It is a truth", "--max-tokens", "4")
    assert run(*arguments, "--json", str(tmp_path / "outputs.json")) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("It is a truth")
    assert "No space left" in captured.err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="nowhere"):
        run("--prompt", "a", "--model", "nowhere", "--debug")
