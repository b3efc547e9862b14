"""Rows that end by themselves, with preemption and without."""

import pytest

from bench import endings as module
from bench.endings import make_job, run_here
from checkpoints_tools.resolve import resolve_model
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.policy import Policy
from tests.test_bench_frontier import run_report
from tests.test_bench_lengths import compare

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_job_is_the_same_each_time_and_ends_at_a_share_of_the_vocabulary():
    prompts, params = make_job(1000)
    assert (prompts, params) == make_job(1000)
    assert {len(prompt) for prompt in prompts} == {module.PROMPT_LEN}
    assert len(set(params.stop_token_ids)) == 30
    assert max(params.stop_token_ids) < 1000


@pytest.mark.parametrize("apart", [False, True])
def test_a_run_says_what_it_took(tmp_path, monkeypatch, apart):
    job = {"NUM_PROMPTS": 12, "PROMPT_LEN": 4, "MAX_TOKENS": 90, "STOP_SHARE": 0.1}
    for name, value in job.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "POLICY", Policy(batch_size=4))
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = run_here(store, tmp_path, apart=apart)
    assert found["seconds"] == pytest.approx(found["prefill_s"] + found["decode_s"])
    assert (found["num_preemptions"] == 0) == apart
    assert 12 < found["num_tokens"] < 12 * 90
    assert found["tokens_per_s"] == found["num_tokens"] / found["seconds"]
    assert found["most_tokens"] <= found["num_steps"] + 3


def test_both_runs_are_compared(tmp_path, monkeypatch, capsys):
    together = {
        "seconds": 10.0,
        "num_tokens": 60,
        "num_preemptions": 7,
        "tokens_per_s": 6.0,
    }
    runs = {(): together, ("--apart",): together | {"seconds": 25.0}}
    report = compare(module.WAYS, runs, tmp_path / "endings.json", monkeypatch)
    assert "60 tokens in 10.0 s, 7 preemptions; each block to its end 25.0 s: 2.50" in (
        capsys.readouterr().out
    )
    assert report["together"] == together
    assert report["num_prompts"] == module.NUM_PROMPTS
    page = run_report(tmp_path / "endings.json", tmp_path / "out")
    assert "7 preemptions; each block to its end 25.0 s: 2.5 times as long" in page
