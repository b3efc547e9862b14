"""What the last run of an engine took and needed, and the report of it."""

import dataclasses
import itertools
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flexjax.memory.lanes import Lane, Timeline
from flexjax.memory.ledger import Ledger, Link
from flexjax.policy import Kind, Tier
from flexjax.schedule.footprint import Bytes, by_tier
from flexjax.sizes import format_bytes


class _Reading(NamedTuple):
    """The counters of a run at one moment."""

    time_s: float
    moved: Counter[Link]
    busy_s: Counter[Lane]


def _later(one: _Reading, other: _Reading) -> _Reading:
    return max(one, other, key=lambda reading: reading.time_s)


@dataclasses.dataclass
class Phase:
    """A part of a run, over all its blocks.

    Attributes:
        seconds: that it took.
        moved: bytes, by link.
        busy_s: seconds for which each lane worked.
    """

    seconds: float = 0.0
    moved: Counter[Link] = dataclasses.field(default_factory=Counter)
    busy_s: Counter[Lane] = dataclasses.field(default_factory=Counter)

    def add(self, begin: _Reading, end: _Reading) -> None:
        self.seconds += end.time_s - begin.time_s
        self.moved.update(end.moved - begin.moved)
        self.busy_s.update(end.busy_s - begin.busy_s)


class RunTimes:
    """Counted while the blocks of one call run.

    The prefill of a block lasts until the first token of every row; its decode is
    everything after that.

    Attributes:
        prefill, decode: the two phases.
        step_s: seconds of each step of the decode, until every row had its token; the
            steps of all blocks in a row.
        num_tokens: tokens that prompts asked for and got; padding does not count.
        num_preemptions: how often a row was left to a later block.
        num_shared: tokens of prompts that were not computed for them, since another
            one of their block begins with them too.
        predicted_peak: bytes, of each kind what the block that needs most of it was
            predicted to need.
    """

    def __init__(
        self, ledger: Ledger, timeline: Timeline, predicted_peak: Bytes | None = None
    ) -> None:
        self._ledger, self._timeline = ledger, timeline
        self.predicted_peak = predicted_peak or {}
        self.prefill, self.decode = Phase(), Phase()
        self.step_s: list[float] = []
        self.num_tokens = self.num_preemptions = self.num_shared = 0
        self._ends: dict[int, _Reading] = {}  # of the steps of this block, by number

    @property
    def slowest(self) -> Lane:
        """The lane that has worked longest so far."""
        busy_s = self._timeline.busy_s
        return max(busy_s, key=lambda lane: busy_s[lane])

    def expect(self, peak: Bytes) -> None:
        """A block comes that is predicted to need so much."""
        self.predicted_peak = dict(Counter(self.predicted_peak) | Counter(peak))

    def begin_block(self) -> None:
        self._ends = {0: self._read()}

    def end_step(self, number: int) -> None:
        """A batch has its token of step `number`, counted from 1; called for each."""
        self._ends[number] = self._read()

    def end_block(self) -> None:
        """Every row has its last token."""
        begin, *found = (self._ends[number] for number in sorted(self._ends))
        # Where batches run one after the other, a later step of one that lived longer
        # may be long past when the last batch ends an earlier one.
        ends = list(itertools.accumulate(found, _later))
        self.prefill.add(begin, ends[0])
        self.decode.add(ends[0], ends[-1])
        self.step_s += [
            after.time_s - before.time_s for before, after in itertools.pairwise(ends)
        ]

    def _read(self) -> _Reading:
        moved = Counter(self._ledger.moved())
        return _Reading(time.perf_counter(), moved, Counter(self._timeline.busy_s))


def metrics_report(times: RunTimes, ledger: Ledger) -> dict[str, Any]:
    """The metrics of a run, as plain values with their units in the names.

    `peak_rss_bytes` is the largest resident size that this process ever had.
    """
    seconds = times.prefill.seconds + times.decode.seconds
    return {
        "seconds": seconds,
        "num_tokens": times.num_tokens,
        "num_preemptions": times.num_preemptions,
        "num_shared_tokens": times.num_shared,
        "tokens_per_s": times.num_tokens / seconds if seconds else 0.0,
        "slowest": times.slowest.value,
        "bytes_moved": _by_name(times.prefill.moved + times.decode.moved),
        "prefill": _phase_report(times.prefill),
        "decode": _phase_report(times.decode),
        "step_s": times.step_s,
        "peak_bytes": {tier.value: ledger.peak(tier) for tier in Tier},
        "predicted_peak_bytes": {
            tier.value: nbytes for tier, nbytes in by_tier(times.predicted_peak).items()
        },
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def joined_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of runs that followed one another, as of one."""
    if len(reports) == 1:
        return dict(reports[0])
    phases = {
        phase: {
            "seconds": sum(report[phase]["seconds"] for report in reports),
            **{
                counts: dict(_added(report[phase][counts] for report in reports))
                for counts in ("bytes_moved", "busy_s")
            },
        }
        for phase in ("prefill", "decode")
    }
    seconds = sum(report["seconds"] for report in reports)
    num_tokens = sum(report["num_tokens"] for report in reports)
    busy_s = _added(phase["busy_s"] for phase in phases.values())
    return {
        "seconds": seconds,
        "num_tokens": num_tokens,
        "num_preemptions": sum(report["num_preemptions"] for report in reports),
        "num_shared_tokens": sum(report["num_shared_tokens"] for report in reports),
        "tokens_per_s": num_tokens / seconds if seconds else 0.0,
        "slowest": max(Lane, key=lambda lane: busy_s[lane.value]).value,
        "bytes_moved": dict(_added(report["bytes_moved"] for report in reports)),
        **phases,
        "step_s": [step_s for report in reports for step_s in report["step_s"]],
        **{
            peaks: {
                tier.value: max(report[peaks][tier.value] for report in reports)
                for tier in Tier
            }
            for peaks in ("peak_bytes", "predicted_peak_bytes")
        },
        "peak_rss_bytes": max(report["peak_rss_bytes"] for report in reports),
    }


def _added(counts: Iterable[Mapping[str, float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total


def _phase_report(phase: Phase) -> dict[str, Any]:
    return {
        "seconds": phase.seconds,
        "bytes_moved": _by_name(phase.moved),
        "busy_s": {lane.value: busy_s for lane, busy_s in phase.busy_s.items()},
    }


def is_shortage(error: Exception) -> bool:
    """Whether memory ran out, of the process or of the device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def shortage_report(times: RunTimes, ledger: Ledger) -> str:
    """What each tier held at most, and what had been predicted, by kind."""
    predicted = times.predicted_peak
    tiers = []
    for tier in (Tier.DEVICE, Tier.HOST):
        kinds = ", ".join(
            f"{kind.value} {format_bytes(predicted.get((tier, kind), 0))}"
            for kind in Kind
        )
        tiers.append(
            f"{tier.value} {format_bytes(ledger.peak(tier))} counted, with "
            f"workspaces {kinds} predicted"
        )
    return (
        "out of memory under a policy that was planned, which is a mistake of the plan "
        f"({'; '.join(tiers)}); give a policy with smaller batches, and report this"
    )


def _by_name(moved: Mapping[Link, int]) -> dict[str, int]:
    return {
        f"{source.value}->{target.value}": nbytes
        for (source, target), nbytes in moved.items()
    }


def _peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
