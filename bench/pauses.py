"""The disk's limit while a run goes on: raw reads in pauses that do not count.

A shared disk gives now more and now less, so that a limit from before a run and one
from after it may both be wrong for the run itself.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.disk_limit import DiskRate, Way, read_once
from flexjax.checkpoint import WeightStore

EVERY_S = 4.0  # of the run, between two pauses
WAYS = (Way(4 << 20, 4), Way(4 << 20, 8))  # pauses take turns
READ_BYTES = 512 << 20  # in a pause
_LOOK_S = 0.001  # between two looks at the disk
_QUIET_LOOKS = 3  # in a row; requests follow each other more quickly
_MOST_WAIT_S = 2.0  # for a disk that others use


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pause:
    step: int  # of the decode, from 0
    seconds: float
    rate: DiskRate


class DiskPauses:
    """Reads from the disk when a step of the decode ends, once the disk is quiet.

    To be called when a batch gets its tokens. The run's own requests are waited for
    before a pause begins, so that none is served while nobody counts; what a device
    still computes then is a fraction of a step.

    Args of the constructor:
        store, tensors: what to read; a pause goes on where the one before it ended.
        num_batches: of the run.
    """

    def __init__(
        self, store: WeightStore, tensors: Sequence[str], num_batches: int
    ) -> None:
        self._store, self._tensors = store, tensors
        self._num_batches, self._num_calls = num_batches, 0
        self._inflight = _inflight_file(store.folder) if store.direct_io else None
        self._ready_s = time.perf_counter()
        self._pauses: list[_Pause] = []

    @property
    def rates(self) -> list[DiskRate]:
        """What each pause found."""
        return [pause.rate for pause in self._pauses]

    def __call__(self, num_tokens: int) -> None:
        del num_tokens
        ended, batch = divmod(self._num_calls, self._num_batches)
        self._num_calls += 1
        if ended == 0 or batch > 0 or time.perf_counter() < self._ready_s + EVERY_S:
            return  # the prefill is not the disk's
        if not self._is_quiet():
            return
        begun_s = time.perf_counter()
        rate = read_once(
            self._store,
            self._tensors,
            WAYS[len(self._pauses) % len(WAYS)],
            READ_BYTES,
            turn=len(self._pauses),
        )
        self._ready_s = time.perf_counter()
        seconds = self._ready_s - begun_s
        self._pauses.append(_Pause(step=ended - 1, seconds=seconds, rate=rate))

    def without(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of a run as if there had been no pauses."""
        paused_s = sum(pause.seconds for pause in self._pauses)
        step_s = list(metrics["step_s"])
        for pause in self._pauses:
            step_s[pause.step] -= pause.seconds
        seconds, decode = metrics["seconds"] - paused_s, metrics["decode"]
        return {
            **metrics,
            "seconds": seconds,
            "tokens_per_s": metrics["num_tokens"] / seconds if seconds else 0.0,
            "decode": {**decode, "seconds": decode["seconds"] - paused_s},
            "step_s": step_s,
        }

    def _is_quiet(self) -> bool:
        """Waits until the disk has nothing to do; False if it has no end."""
        if self._inflight is None:
            return False
        until_s = time.perf_counter() + _MOST_WAIT_S
        quiet = 0
        while quiet < _QUIET_LOOKS:
            if time.perf_counter() > until_s:
                return False
            busy = any(map(int, self._inflight.read_text().split()))
            quiet = 0 if busy else quiet + 1
            time.sleep(_LOOK_S)
        return True


def _inflight_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Where Linux says how many requests the disk of `folder` has; None if nowhere."""
    device = folder.stat().st_dev
    path = pathlib.Path(
        f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/inflight"
    )
    return path if path.exists() else None
