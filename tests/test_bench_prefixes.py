"""Prompts that begin alike, and such that do not."""

import pytest

from bench import choices, subjects
from bench import prefixes as module
from bench.prefixes import make_prompts, run_here
from checkpoints_tools.resolve import resolve_model
from flexjax import shared_prefixes
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from tests.test_bench_frontier import run_report
from tests.test_bench_lengths import compare

pytestmark = pytest.mark.usefixtures("own_cache")


def test_prompts_differ_in_their_first_token_alone():
    alike, different = (make_prompts(1000, different=d) for d in (False, True))
    assert alike == make_prompts(1000, different=False)
    assert len({tuple(prompt[: module.NUM_COMMON]) for prompt in alike}) == 1
    assert len({prompt[0] for prompt in different}) == module.NUM_PROMPTS
    assert [one[1:] for one in alike] == [other[1:] for other in different]
    least, most = module.OWN
    assert {len(p) - module.NUM_COMMON for p in alike} <= set(range(least, most + 1))


@pytest.mark.parametrize("different", [False, True])
def test_a_run_says_what_it_took(tmp_path, monkeypatch, different):
    for name, value in {"NUM_PROMPTS": 4, "NUM_COMMON": 70, "OWN": (2, 9)}.items():
        monkeypatch.setattr(module, name, value)
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = run_here(store, tmp_path, different=different)
    assert found["num_shared_tokens"] == (0 if different else 3 * 70)
    assert found["seconds"] == pytest.approx(found["prefill_s"] + found["decode_s"])
    assert found["policy"].startswith("policy: everything on the device")


def test_both_runs_are_compared(tmp_path, monkeypatch, capsys):
    alike = {"seconds": 10.0, "num_shared_tokens": 70}
    runs = {(): alike, ("--different",): {"seconds": 25.0, "num_shared_tokens": 0}}
    report = compare(module.WAYS, runs, tmp_path / "prefixes.json", monkeypatch)
    words = "70 tokens of prompts shared: 10.0 s; with nothing in common 25.0 s: 2.5"
    assert words in capsys.readouterr().out
    assert report["alike"] == alike
    assert report["num_common"] == module.NUM_COMMON
    assert words in run_report(tmp_path / "prefixes.json", tmp_path / "out")


def test_subjects_come_in_turns_and_begin_their_own_way():
    alike, different = (
        subjects.make_prompts(50_000, different=each) for each in (False, True)
    )
    assert alike == subjects.make_prompts(50_000, different=False)
    assert [one[1:] for one in alike] == [other[1:] for other in different]
    count, (least, most) = subjects.NUM_SUBJECTS, subjects.EXAMPLES
    assert len(alike) == count * subjects.PROMPTS_EACH
    begins = {tuple(prompt[:least]) for prompt in alike}
    assert begins == {tuple(prompt[:least]) for prompt in alike[:count]}
    assert len(begins) == count
    assert all(least < len(p) <= most + subjects.OWN[1] for p in alike)


@pytest.mark.parametrize("different", [False, True])
def test_subjects_share_what_they_begin_with(tmp_path, monkeypatch, different):
    sizes = {"NUM_SUBJECTS": 2, "PROMPTS_EACH": 3, "EXAMPLES": (70, 80), "OWN": (2, 9)}
    for name, value in sizes.items():
        monkeypatch.setattr(subjects, name, value)
    monkeypatch.setattr(shared_prefixes, "LEAST_BATCH", 1)
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = subjects.run_here(store, tmp_path, different=different)
    assert different == (found["num_shared_tokens"] == 0)
    assert found["num_shared_tokens"] < 2 * 2 * 80


def test_both_runs_of_subjects_are_compared(tmp_path, monkeypatch):
    alike = {"seconds": 10.0, "num_shared_tokens": 1070}
    runs = {(): alike, ("--different",): {"seconds": 25.0, "num_shared_tokens": 0}}
    report = compare(subjects.WAYS, runs, tmp_path / "subjects.json", monkeypatch)
    assert report["num_subjects"] == subjects.NUM_SUBJECTS
    words = "1,070 tokens of prompts shared: 10.0 s; with nothing in common 25.0 s: 2.5"
    assert words in run_report(tmp_path / "subjects.json", tmp_path / "out")


def test_choices_of_a_question_begin_alike(tmp_path, monkeypatch):
    alike, different = (
        choices.make_sequences(50_000, different=each) for each in (False, True)
    )
    assert alike == choices.make_sequences(50_000, different=False)
    assert [one[1:] for one in alike] == [other[1:] for other in different]
    least, each = choices.CONTEXT[0], choices.CHOICES_EACH
    begins = [tuple(sequence[:least]) for sequence in alike]
    assert begins[::each] == begins[1::each]
    assert len(set(begins)) == choices.NUM_QUESTIONS
    assert len({sequence[0] for sequence in different}) == len(different)
    monkeypatch.setattr(choices, "NUM_QUESTIONS", 2)
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = choices.run_here(store, tmp_path, different=False)
    assert found["num_shared_tokens"] > 2 * 3 * (least - 2)
    assert found["decode_s"] == 0
