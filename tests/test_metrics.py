"""What a run took, by phase: times of a clock that the tests turn."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import metrics
from flexjax.memory.lanes import Lane, Timeline
from flexjax.memory.ledger import Ledger
from flexjax.metrics import RunTimes, joined_reports, metrics_report
from flexjax.policy import Kind, Tier

LINKS = [(Tier.DISK, Tier.HOST), (Tier.HOST, Tier.DEVICE)]


class Clockwork:
    """A run of which every second, byte and second of work is made up."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.ledger, self.timeline = Ledger(), Timeline()
        self.times = RunTimes(self.ledger, self.timeline)
        clock = SimpleNamespace(perf_counter=lambda: self.now_s)
        patch.setattr(metrics, "time", clock)

    def work(self, seconds: int) -> None:
        """Moves a number of bytes a second, on one link of the two."""
        self.ledger.move(*LINKS[seconds % 2], 10 * seconds)
        self.timeline.worked(Lane.WEIGHTS, "", self.now_s, self.now_s + seconds / 2)
        self.now_s += seconds

    def block(self, steps: list[list[int]]) -> None:
        """Steps of a block, each with the seconds until each batch has its token."""
        self.times.begin_block()
        for number, batches in enumerate(steps, 1):
            for seconds in batches:
                self.work(seconds)
                self.times.end_step(number)
        self.times.end_block()
        self.work(3)  # between blocks: nobody's time


SECONDS = st.integers(0, 9)
STEPS = st.lists(st.lists(SECONDS, min_size=1, max_size=3), min_size=1, max_size=4)


@given(blocks=st.lists(STEPS, max_size=3))
@example(blocks=[[[1]], [[2, 3], [4]]])
def test_phases_add_up_over_blocks(blocks):
    with pytest.MonkeyPatch.context() as patch:
        run = Clockwork(patch)
        for block in blocks:
            run.block(block)
    first = [sum(block[0]) for block in blocks]
    later = [sum(step) for block in blocks for step in block[1:]]
    assert run.times.prefill.seconds == sum(first)
    assert run.times.decode.seconds == sum(later)
    assert run.times.step_s == later
    report = metrics_report(run.times, run.ledger)
    for phase, steps in (
        ("prefill", [block[0] for block in blocks]),
        ("decode", [step for block in blocks for step in block[1:]]),
    ):
        moved = Counter()
        for seconds in (seconds for step in steps for seconds in step):
            source, target = LINKS[seconds % 2]
            moved[f"{source.value}->{target.value}"] += 10 * seconds
        assert Counter(report[phase]["bytes_moved"]) == moved
        assert sum(report[phase]["busy_s"].values()) == report[phase]["seconds"] / 2
    total = Counter(report["prefill"]["bytes_moved"])
    total.update(report["decode"]["bytes_moved"])
    assert Counter(report["bytes_moved"]) == total
    assert report["seconds"] == sum(first) + sum(later)


@given(runs=st.lists(st.lists(STEPS, min_size=1, max_size=2), min_size=1, max_size=3))
def test_runs_that_follow_one_another_add_up_to_one(runs):
    reports = []
    with pytest.MonkeyPatch.context() as patch:
        for blocks in runs:
            run = Clockwork(patch)
            run.times.num_tokens = len(blocks)
            for block in blocks:
                run.block(block)
            run.ledger.hold(Tier.HOST, Kind.WEIGHTS, len(blocks))
            reports.append(metrics_report(run.times, run.ledger))
        whole = Clockwork(patch)
        for block in itertools.chain.from_iterable(runs):
            whole.block(block)
        whole.times.num_tokens = sum(map(len, runs))
        whole.ledger.hold(Tier.HOST, Kind.WEIGHTS, max(map(len, runs)))
    expected = metrics_report(whole.times, whole.ledger)
    assert joined_reports(reports) == expected | {
        "peak_rss_bytes": max(report["peak_rss_bytes"] for report in reports)
    }


def test_without_a_decode_step_there_is_no_decode(monkeypatch):
    run = Clockwork(monkeypatch)
    run.block([[5, 2]])
    run.times.num_tokens = 14
    report = metrics_report(run.times, run.ledger)
    assert report["decode"] == {"seconds": 0.0, "bytes_moved": {}, "busy_s": {}}
    assert report["prefill"]["seconds"] == report["seconds"] == 7.0
    assert report["step_s"] == []
    assert report["tokens_per_s"] == 2.0


def test_batches_that_run_after_each_other_end_a_step_with_the_last(monkeypatch):
    """Row by row, and the first one lives longer: its last steps are long past."""
    run = Clockwork(monkeypatch)
    run.times.begin_block()
    for steps in ((1, 2, 3, 4), (1, 2)):
        for number in steps:
            run.work(1)
            run.times.end_step(number)
    run.times.end_block()
    assert run.times.prefill.seconds == 5
    assert run.times.decode.seconds == 1
    assert run.times.step_s == [1, 0, 0]


def test_before_a_run_everything_is_nothing():
    ledger = Ledger()
    report = metrics_report(RunTimes(ledger, Timeline()), ledger)
    assert report["seconds"] == report["tokens_per_s"] == 0
    assert report["bytes_moved"] == {}
    assert set(report["peak_bytes"]) == {tier.value for tier in Tier}


def test_the_slowest_lane_is_the_one_that_worked_longest():
    timeline = Timeline()
    times = RunTimes(Ledger(), timeline)
    assert times.slowest in Lane
    timeline.busy_s[Lane.DISK] = 2.0
    timeline.busy_s[Lane.COMPUTE] = 3.0
    assert times.slowest is Lane.COMPUTE


def test_a_report_is_plain_and_says_what_was_predicted(monkeypatch):
    run = Clockwork(monkeypatch)
    run.times.predicted_peak = {
        (Tier.HOST, Kind.WEIGHTS): 5,
        (Tier.HOST, Kind.KV_CACHE): 6,
    }
    run.ledger.hold(Tier.HOST, Kind.WEIGHTS, 4)
    run.block([[1], [2]])
    report = metrics_report(run.times, run.ledger)
    assert json.loads(json.dumps(report)) == report
    assert report["peak_bytes"] == {"device": 0, "host": 4, "disk": 0}
    assert report["predicted_peak_bytes"] == {"device": 0, "host": 11, "disk": 0}
    assert report["peak_rss_bytes"] > 1 << 20
