"""The disk's limit while a run goes on: raw reads in pauses that do not count.

What a shared or virtual disk gives changes within seconds, and what was read a moment
ago it may give twice as fast. So a pause reads what a step reads, in a step's order,
from where the run stopped until the same place: the run finds the disk as it was.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.disk_limit import DiskRate, Way, read_files, store_files
from flexjax.checkpoint import WeightStore
from flexjax.memory.spill import PREFIX

LEAST_S = 4.0  # of the run, between two pauses
MOST_SHARE = 0.25  # of the time that pauses may take
WAY = Way(4 << 20, 8)  # as a run does
_SMALL_BYTES = 1 << 20  # files below, which a run reads too, would only cost time
_AHEAD = "layers.2."  # what a run has asked for already when a step ends is before it
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
        store, tensors: what the run reads in every step, in the model's order.
        num_batches: of the run.
        offload_dir: where it spills to; what lies there is read too.
    """

    def __init__(
        self,
        store: WeightStore,
        tensors: Sequence[str],
        num_batches: int,
        offload_dir: pathlib.Path,
    ) -> None:
        first = [n for n, name in enumerate(tensors) if name.startswith(_AHEAD)]
        start = min(first, default=0)
        files = store_files(store, [*tensors[start:], *tensors[:start]])
        self._files = [*_large(files)]
        self._offload_dir = offload_dir
        self._num_batches, self._num_calls = num_batches, 0
        self._inflight = _inflight_file(store.folder) if store.direct_io else None
        self._ready_s = time.perf_counter() + LEAST_S
        self._pauses: list[_Pause] = []

    @property
    def rates(self) -> list[DiskRate]:
        """What each pause found."""
        return [pause.rate for pause in self._pauses]

    def __call__(self, num_tokens: int) -> None:
        del num_tokens
        ended, batch = divmod(self._num_calls, self._num_batches)
        self._num_calls += 1
        # The prefill is not the disk's.
        if ended == 0 or batch > 0 or time.perf_counter() < self._ready_s:
            return
        if not self._files or not self._is_quiet():
            return
        begun_s = time.perf_counter()
        spilled = sorted(self._offload_dir.glob(f"{PREFIX}*/*"))
        rate = read_files([*self._files, *_large(spilled)], WAY, direct=True)
        now_s = time.perf_counter()
        seconds = now_s - begun_s
        self._ready_s = now_s + max(LEAST_S, seconds * (1 - MOST_SHARE) / MOST_SHARE)
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


def _large(paths: Iterable[pathlib.Path]) -> Iterator[pathlib.Path]:
    return (path for path in paths if path.stat().st_size >= _SMALL_BYTES)


def _inflight_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Where Linux says how many requests the disk of `folder` has; None if nowhere."""
    device = folder.stat().st_dev
    path = pathlib.Path(
        f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/inflight"
    )
    return path if path.exists() else None
