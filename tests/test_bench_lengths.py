"""Prompts of different lengths, in parts and under one plan."""

import json

import pytest

from bench import lengths as module
from bench import two_ways
from bench.lengths import make_prompts, run_here
from checkpoints_tools.resolve import resolve_model
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.cli import run_command
from tests.test_bench_frontier import run_report

pytestmark = pytest.mark.usefixtures("own_cache")


def test_prompts_are_of_all_groups_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(module, "GROUPS", ((2, 70, 80), (30, 2, 6)))
    prompts = make_prompts(500)
    assert prompts == make_prompts(500)
    lengths = sorted(map(len, prompts))
    assert len(lengths) == 32
    assert set(lengths[:30]) == {2, 3, 4, 5, 6}
    assert all(70 <= length <= 80 for length in lengths[30:])
    assert max(map(max, prompts)) < 500


@pytest.mark.parametrize("as_one", [False, True])
def test_a_run_says_what_it_took(tmp_path, monkeypatch, as_one):
    monkeypatch.setattr(module, "GROUPS", ((1, 70, 80), (5, 2, 6)))
    monkeypatch.setattr(module.LLM, "generate", with_prediction(module.LLM.generate))
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = run_here(store, tmp_path, as_one=as_one)
    assert found["seconds"] == pytest.approx(found["prefill_s"] + found["decode_s"])
    assert found["predicted_s"] == (None if as_one else 7.0)
    assert found["parts"] == []


def with_prediction(generate):
    """What fits on the device is not planned, and so not predicted."""

    def run(self, *args):
        outputs = generate(self, *args)
        self.metrics |= {"predicted": {"total_s": 7.0}}
        return outputs

    return run


def test_both_runs_are_compared(tmp_path, monkeypatch, capsys):
    runs = {
        (): {"seconds": 2.0, "predicted_s": 2.2, "parts": [3, 4]},
        ("--as-one",): {"seconds": 5.0, "predicted_s": None, "parts": []},
    }
    report = compare(module.WAYS, runs, tmp_path / "lengths.json", monkeypatch)
    assert "parts: 2; 2.0 s, predicted 2.2 s; as one 5.0 s: 2.50 times as long" in (
        capsys.readouterr().out
    )
    assert report["ratio"] == 2.5
    assert report["memory_cap_bytes"] == 2_000_000_000
    assert report["command"] == "python -m bench.lengths opt-1.3b --memory-cap 2GB"
    page = run_report(tmp_path / "lengths.json", tmp_path / "out")
    assert "parts: 2; 2.0 s, predicted 2.2 s; as one 5.0 s: 2.5 times as long" in page


def compare(ways, runs, path, monkeypatch):
    """What is written of runs that are told beforehand, by their switches."""
    monkeypatch.setattr(two_ways, "calibrated", lambda *_: None)
    monkeypatch.setattr(two_ways, "ensure_can_cap", lambda cap_bytes: None)
    monkeypatch.setattr(two_ways, "weights_folder", lambda name: None)
    monkeypatch.setattr(
        two_ways, "result_under_cap", lambda _, words, cap_bytes: runs[tuple(words[1:])]
    )
    argv = ["opt-1.3b", "--memory-cap", "2GB", "--json", str(path)]
    assert run_command(ways.main, ways.parser(""), argv) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--json", "lengths.json"), "--json is for what --memory-cap compares"),
        (("--as-one", "--memory-cap", "2GB"), "--memory-cap makes both"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr(two_ways, "weights_folder", None)
    argv = ["opt-1.3b", *words]
    assert run_command(module.WAYS.main, module.build_parser(), argv) == 2
    assert message in capsys.readouterr().err
