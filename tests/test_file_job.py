"""A file of prompts is answered as in one run, however many runs it takes."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from checkpoints_tools.open_source import open_source
from checkpoints_tools.store_conversion import convert_to_store
from flexjax import LLM, Placement, Policy, SamplingParams
from flexjax.answer_file import AnswerFile, partial_path
from flexjax.checkpoint import EMBEDDED_MODEL
from flexjax.file_job import answer_prompts
from flexjax.prompt_file import PromptFile
from flexjax.quant import Quantization
from tests.test_answer_file import lines_of
from tests.test_generate import run
from tests.test_llm import SPILLS

pytestmark = pytest.mark.usefixtures("own_cache")

SAMPLED = SamplingParams(max_tokens=9, temperature=1.0, ignore_eos=True)


@pytest.fixture
def rows(golden, tmp_path):
    """A file of 15 prompts of the golden checkpoint, with an id each."""
    prompts = golden("opt-pre-ln").prompts * 3
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"row {index}", "prompt": prompt}) + "\n"
            for index, prompt in enumerate(prompts)
        )
    )
    return path


def answer(store, rows, path, params=SAMPLED, *, seed=3, policy=SPILLS, stop_after=0):
    """Answers the rows; raises KeyboardInterrupt after so many blocks."""
    blocks = []

    with LLM(store, policy=policy, seed=seed, offload_dir=path.parent) as llm:
        each = llm.generate_each

        def stopped(*args, on_outputs, **options):
            def count(outputs):
                on_outputs(outputs)
                blocks.append(len(outputs))
                if len(blocks) == stop_after:
                    raise KeyboardInterrupt

            return each(*args, on_outputs=count, **options)

        llm.generate_each = stopped
        with PromptFile(rows) as prompts, AnswerFile(path, len(prompts)) as answers:
            answer_prompts(llm, prompts, answers, params=params)
    return blocks


@pytest.mark.parametrize("other", [SPILLS, Policy(batch_size=7)])
def test_a_run_that_was_stopped_gives_what_one_run_gives(golden, tmp_path, rows, other):
    store = golden("opt-pre-ln").store
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert answer(store, rows, whole) == [4, 4, 4, 3]
    with pytest.raises(KeyboardInterrupt):
        answer(store, rows, resumed, stop_after=2)
    assert not resumed.exists()
    assert sum(answer(store, rows, resumed, policy=other)) == 7
    assert resumed.read_bytes() == whole.read_bytes()
    found = lines_of(whole)
    assert [line["index"] for line in found] == list(range(15))
    assert [line["input"]["id"] for line in found] == [f"row {i}" for i in range(15)]
    assert {len(line["output"]["token_ids"]) for line in found} == {9}
    tokens = {str(line["output"]["token_ids"]) for line in found}
    assert len(tokens) == 15, "equal prompts draw their tokens by their index"


def test_answers_are_those_of_generate(golden, tmp_path, rows):
    store, path = golden("opt-pre-ln").store, tmp_path / "answers.jsonl"
    params = dataclasses.replace(SAMPLED, logprobs=2)
    answer(store, rows, path, params)
    with LLM(store, policy=SPILLS, seed=3, offload_dir=tmp_path) as llm:
        outputs = llm.generate([row["prompt"] for row in lines_of(rows)], params)
    for line, output in zip(lines_of(path), outputs, strict=True):
        expected = json.loads(json.dumps(dataclasses.asdict(output.outputs[0])))
        assert line["output"] == {
            name: value
            for name, value in expected.items()
            if name != "index" and value is not None
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": dataclasses.replace(SAMPLED, top_k=5)}, "top_k 0, .* has 5"),
        ({"seed": 4}, "seed 3, and this run has 4"),
        (
            {"policy": dataclasses.replace(SPILLS, kv_cache_bits=8)},
            "kv_cache_bits None, and this run has 8",
        ),
    ],
)
def test_what_would_change_answers_is_refused(golden, tmp_path, rows, change, message):
    store, path = golden("opt-pre-ln").store, tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer(store, rows, path, stop_after=1)
    with pytest.raises(ValueError, match=message):
        answer(store, rows, path, **change)
    with pytest.raises(ValueError, match="begun with checksum of the model"):
        answer(golden("opt-gelu-no-bias").store, rows, path)
    rows.write_text(rows.read_text() + "[5]\n")
    with pytest.raises(ValueError, match="begun with checksum of the prompts"):
        answer(store, rows, path)


def test_a_killed_command_goes_on_where_it_was(golden, tmp_path, rows, capsys):
    path = tmp_path / "answers.jsonl"
    arguments = ("--model", str(golden("opt-pre-ln").store), "--prompts", str(rows))
    arguments += ("--batch-size", "2", "--weights", "disk=1", "--kv-cache", "device=1")
    arguments += ("--offload-dir", str(tmp_path), "--ignore-eos", "--max-tokens", "12")
    arguments += ("--temperature", "1", "--seed", "9")
    command = [sys.executable, "-m", "flexjax.generate", *arguments]
    process = subprocess.Popen([*command, "--output", str(path)])
    partial, answered = partial_path(path), 0
    while answered < 3 and process.poll() is None:
        time.sleep(0.01)
        answered = partial.read_bytes().count(b"\n") - 1 if partial.exists() else 0
    assert process.poll() is None, "it ended before it was killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not path.exists()
    metrics = tmp_path / "metrics.json"
    again = ("--output", str(path), "--json", str(metrics))
    assert run(*arguments, *again) == 0
    captured = capsys.readouterr()
    assert "of 15 answers; going on" in captured.err
    assert "15 answers in" in captured.err
    assert captured.out == ""
    report = json.loads(metrics.read_text())
    assert "outputs" not in report
    assert 0 < report["metrics"]["num_tokens"] <= 12 * (15 - answered)
    other = tmp_path / "other.jsonl"
    assert run(*arguments, "--output", str(other)) == 0
    assert path.read_bytes() == other.read_bytes()
    assert {p.name for p in tmp_path.iterdir() if "partial" in p.name} == set()
    assert run(*arguments, "--output", str(other)) == 2


def test_a_file_of_answers_is_for_as_many_prompts(golden, tmp_path, rows):
    path = tmp_path / "answers.jsonl"
    with (
        LLM(golden("opt-pre-ln").store, policy=SPILLS, offload_dir=tmp_path) as llm,
        PromptFile(rows) as prompts,
        AnswerFile(path, 3) as answers,
        pytest.raises(ValueError, match="opened for 3 prompts, but .* has 15"),
    ):
        answer_prompts(llm, prompts, answers, params=SAMPLED)


def test_what_is_whole_but_has_no_room_is_finished_without_the_model_running(
    golden, tmp_path, rows, monkeypatch
):
    store, path = golden("opt-pre-ln").store, tmp_path / "answers.jsonl"

    def full(path, pieces, *, beside):
        del pieces, beside
        raise OSError(f"cannot write {path}: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flexjax.answer_file.write_pieces_atomically", full)
        with pytest.raises(OSError, match="the disk takes as much"):
            answer(store, rows, path)
    assert answer(store, rows, path) == []
    assert len(lines_of(path)) == 15


def test_a_prompt_that_cannot_be_used_is_refused_before_the_first_block(
    golden, tmp_path, rows
):
    rows.write_text(rows.read_text() + '{"prompt": [5, 999]}\n')
    path = tmp_path / "answers.jsonl"
    policy = Policy(weights=Placement(host=1.0))
    with pytest.raises(ValueError, match=r"line 16 of .*rows.jsonl has token id 999"):
        answer(golden("opt-pre-ln").store, rows, path, policy=policy)
    assert not partial_path(path).exists(), "so it may be mended and run again"


def test_a_quantized_store_is_answered_on_under_a_policy_that_says_how(
    golden, tmp_path, rows
):
    """The store says how its weights are quantized, and a plan takes them so."""
    store, path = tmp_path / "store", tmp_path / "answers.jsonl"
    how = Quantization(bits=4, group_size=16, dtype="float32")
    source = open_source(golden("opt-pre-ln").folder)
    convert_to_store(source, store, np.dtype(np.float32), "quantizing", how)
    with pytest.raises(KeyboardInterrupt):
        answer(store, rows, path, policy=None, stop_after=1)
    said = Policy(batch_size=4, weight_bits=4, group_size=16)
    answer(store, rows, path, policy=said)
    assert len(lines_of(path)) == 15


def test_another_tokenizer_is_another_job(tmp_path):
    rows, path = tmp_path / "rows.txt", tmp_path / "answers.jsonl"
    rows.write_text("It is\nA truth\n")
    policy = Policy(batch_size=1)
    model = shutil.copytree(EMBEDDED_MODEL, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        answer(model, rows, path, policy=policy, stop_after=1)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["add_bos_token"] = not settings.get("add_bos_token", True)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="begun with checksum of the model"):
        answer(model, rows, path, policy=policy)
