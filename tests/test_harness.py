"""lm-evaluation-harness runs on flexjax, and what it has answered is kept."""

# pyright: reportMissingImports=false

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from flexjax.policy import Policy, to_json
from flexjax.sampling_params import SamplingParams

pytest.importorskip("lm_eval", reason="the harness is an extra: CONTRIBUTING.md")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from flexjax.harness import FlexjaxLM, sampling_params

TEXT = "It is a truth universally acknowledged, that a single man in possession"
CHOICES = (" of a good fortune", " of a cat", " must be", " of a good")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    (folder / "policy.json").write_text(json.dumps(to_json(Policy(batch_size=2))))
    model = FlexjaxLM(policy=str(folder / "policy.json"), dtype="float32", batch_size=1)
    yield model
    model.llm.close()


def asked(kind, *args):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("t", 0, 1))
        for one in args
    ]


def likelihood(lm, sequence, count):
    """Of the last tokens of a sequence, scored by itself."""
    return float(lm.llm.score([sequence])[0][-count:].sum(dtype=float))


def test_a_continuation_is_scored_as_its_tokens_are(lm):
    pairs = [(TEXT, choice) for choice in CHOICES] + [("", "She"), ("A cat ", "ran.")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert lm.llm.metrics["num_shared_tokens"] > 0
    for (context, choice), (value, _) in zip(pairs, found, strict=True):
        whole = lm.tok_encode(context + choice)
        count = len(whole) - len(lm.tok_encode(context.rstrip()))
        assert value == pytest.approx(likelihood(lm, whole, count), abs=1e-3)


def test_greedy_says_what_would_be_generated(lm):
    (text,) = lm.generate_until(
        asked("generate_until", (TEXT, {"until": ["."], "max_gen_toks": 4}))
    )
    pairs = [(TEXT, text), (TEXT, " zebra")]
    found = lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_of_what_is_too_long_the_end_is_kept(lm):
    size = lm.max_length
    words = [5 + place % 80 for place in range(size + 20)]
    ((value, _),) = lm._loglikelihood_tokens([(("", ""), words, [7, 8])])
    assert value == pytest.approx(
        likelihood(lm, [*words, 7, 8][-size - 1 :], 2), abs=1e-3
    )
    with pytest.raises(ValueError, match="a continuation has"):
        lm._loglikelihood_tokens([(("", ""), [5], words)])


def test_a_long_text_is_scored_in_windows_each_token_once(lm):
    short, long = TEXT, TEXT * (lm.max_length // 8)
    found = lm.loglikelihood_rolling(
        asked("loglikelihood_rolling", (short,), (long,)), disable_tqdm=True
    )
    prefix = [lm.prefix_token_id]
    tokens = lm.tok_encode(short)
    count = len(tokens)
    assert found[0] == pytest.approx(likelihood(lm, prefix + tokens, count), abs=1e-3)
    tokens, total, first = lm.tok_encode(long), 0.0, 0
    assert len(tokens) > 2 * lm.max_length
    while first < len(tokens):
        end = min(len(tokens), first + lm.max_length)
        whole = (prefix + tokens)[max(0, end - lm.max_length) : end + 1]
        total += likelihood(lm, whole, end - first)
        first = end
    assert found[1] == pytest.approx(total, rel=1e-4)


def test_texts_are_generated_as_a_task_asks(lm):
    settings = [
        {"until": [" a", "\n\n", ""], "max_gen_toks": 9},
        {"until": [], "do_sample": True, "temperature": 0.7, "seed": 3},
    ]
    lm.max_gen_toks = 5
    texts = lm.generate_until(
        asked("generate_until", *((TEXT, one) for one in settings))
    )
    params = [
        SamplingParams(max_tokens=9, stop=[" a", "\n\n"], temperature=0.0),
        SamplingParams(max_tokens=5, temperature=0.7, seed=3),
    ]
    outputs = lm.llm.generate([TEXT] * 2, params)
    assert texts == [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "top_p": 0, "top_k": None}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1.0, "top_k": 5}),
        ({"num_beams": 1, "temperature": 0.5}, {"temperature": 0.5}),
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_in_the_harness(settings, expected):
    found = sampling_params(settings | {"until": "x"}, 16)
    assert found == SamplingParams(max_tokens=16, stop=["x"], **expected)


def test_a_setting_that_is_not_known_is_named(lm):
    with pytest.raises(ValueError, match="num_beams, which flexjax does not know"):
        sampling_params({"num_beams": 4}, 16)
    with pytest.raises(ValueError, match="max_length in model_args is not known"):
        FlexjaxLM(max_length=5)
    with pytest.raises(ValueError, match="max_gen_toks is 512, but the model has"):
        lm.generate_until(asked("generate_until", (TEXT, {"max_gen_toks": 512})))


def test_what_stands_behind_nothing_is_scored_behind_the_first_token(lm):
    assert lm.prefix_token_id == lm.tokenizer.bos_token_id
    ((found, _),) = lm._loglikelihood_tokens([((" ", "x"), [], [7, 8, 9])])
    whole = [lm.prefix_token_id, 7, 8, 9]
    assert found == pytest.approx(likelihood(lm, whole, 3), abs=1e-3)


def test_a_continuation_without_tokens_is_refused(lm):
    with pytest.raises(ValueError, match="the continuation '' has no token"):
        lm.loglikelihood(asked("loglikelihood", (TEXT, "")), disable_tqdm=True)


class Killed(Exception):
    pass


def test_what_was_answered_before_a_crash_is_not_asked_again(lm, tmp_path, monkeypatch):
    path = str(tmp_path / "cache.db")
    pairs = [(word * 9, " cat") for word in ("one ", "two ", "six ", "ten ", "red ")]
    requests = asked("loglikelihood", *pairs)
    expected = lm.loglikelihood(requests, disable_tqdm=True)
    score_each, calls = lm.llm.score_each, []

    def killed(sequences, *, on_scores):
        def give(scores):
            if calls:
                raise Killed
            calls.append(len(sequences))
            on_scores(scores)

        score_each(sequences, on_scores=give)

    monkeypatch.setattr(lm.llm, "score_each", killed)
    with pytest.raises(Killed):
        CachingLM(lm, path).loglikelihood(requests)

    def counted(sequences, *, on_scores):
        calls.append(len(sequences))
        score_each(sequences, on_scores=on_scores)

    monkeypatch.setattr(lm.llm, "score_each", counted)
    found = CachingLM(lm, path).loglikelihood(requests)
    lm.set_cache_hook(type(lm.cache_hook)(None))
    assert calls == [5, 3]  # a batch of two had its answers
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected])


TASK = """task: which_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def evaluate(*arguments, **options):
    command = [sys.executable, "-m", "flexjax.evaluate", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, **options
    )


def test_a_task_runs_from_the_command_line(tmp_path):
    documents = [
        {"question": TEXT, "choices": [" of", " zebra"], "answer": 0},
        {"question": "She had never", "choices": [" zebra", " been"], "answer": 0},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "which_word.yaml").write_text(TASK.format(data=data))
    done = evaluate(
        *("--tasks", "which_word", "--include_path", str(tmp_path)),
        *("--output_path", str(tmp_path / "out")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (report,) = pathlib.Path(tmp_path / "out").rglob("results_*.json")
    results = json.loads(report.read_text())
    assert results["results"]["which_word"]["acc,none"] == 0.5
    assert results["config"]["model"] == "flexjax"


def test_a_model_that_is_not_there_is_one_sentence():
    done = evaluate(
        "--tasks", "lambada_openai", "--model_args", "pretrained=/no/such/folder"
    )
    assert done.returncode == 2
    assert "/no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr
