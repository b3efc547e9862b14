"""What the last run of an engine took and needed, and the report of it."""

import dataclasses
import resource
import sys
from collections.abc import Mapping
from typing import Any

from flexjax.memory.lanes import Lane
from flexjax.memory.ledger import Ledger
from flexjax.policy import Tier
from flexjax.schedule.footprint import Bytes, by_tier


@dataclasses.dataclass
class RunTimes:
    """Counted while the blocks of one call run.

    Attributes:
        prefill_s: seconds until the first token of every row of a block, over blocks.
        decode_s: seconds of everything after that.
        num_tokens: tokens that prompts asked for and got; padding does not count.
        busy_s: seconds for which each lane worked.
        predicted_peak: bytes that the largest block was predicted to need.
    """

    predicted_peak: Bytes = dataclasses.field(default_factory=dict)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_tokens: int = 0
    busy_s: Mapping[Lane, float] = dataclasses.field(default_factory=dict)

    @property
    def slowest(self) -> Lane | None:
        """The lane that worked longest."""
        return max(self.busy_s, key=lambda lane: self.busy_s[lane], default=None)


def metrics_report(times: RunTimes, ledger: Ledger) -> dict[str, Any]:
    """The metrics of a run, as plain values with their units in the names.

    `peak_rss_bytes` is the largest resident size that this process ever had.
    """
    seconds = times.prefill_s + times.decode_s
    return {
        "seconds": seconds,
        "prefill_s": times.prefill_s,
        "decode_s": times.decode_s,
        "num_tokens": times.num_tokens,
        "tokens_per_s": times.num_tokens / seconds if seconds else 0.0,
        "slowest": times.slowest and times.slowest.value,
        "busy_s": {lane.value: busy_s for lane, busy_s in times.busy_s.items()},
        "bytes_moved": {
            f"{source.value}->{target.value}": nbytes
            for (source, target), nbytes in ledger.moved().items()
        },
        "peak_bytes": {tier.value: ledger.peak(tier) for tier in Tier},
        "predicted_peak_bytes": {
            tier.value: nbytes for tier, nbytes in by_tier(times.predicted_peak).items()
        },
        "peak_rss_bytes": _peak_rss_bytes(),
    }


def _peak_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
