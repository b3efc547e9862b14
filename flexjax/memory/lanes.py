"""Lanes: threads that each do one kind of work in the order in which it was issued.

A task may wait for tasks that were issued before it, in any lane. Since every lane
keeps to the order of issue, the oldest unfinished task can always run: lanes cannot
deadlock.
"""

import contextlib
import enum
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


class Lane(enum.Enum):
    """What a lane carries."""

    DISK = "disk"  # many requests at once: a `DiskQueue`, not a thread of `Lanes`
    WEIGHTS = "weights in"
    WIDEN = "weights made wide"
    CACHE_IN = "cache in"
    CACHE_OUT = "cache out"
    HIDDEN = "hidden in and out"
    TO_DEVICE = "copies to the device"  # of all kinds: a `DeviceLink` follows them
    # Where attention is apart from a layer's step: what comes before it, and itself.
    PROJECT = "projections"
    ATTENTION = "attention apart"
    DISPATCH = "dispatch"
    COMPUTE = "compute"  # follows the device: its tasks end when the device's do


# What has no thread of its own here is done by others.
THREADS = tuple(lane for lane in Lane if lane not in (Lane.DISK, Lane.TO_DEVICE))


class Span(NamedTuple):
    """A stretch of work of a lane; times are `time.perf_counter`'s."""

    lane: Lane
    name: str
    begin_s: float
    end_s: float
    nbytes: int = 0


class Timeline:
    """When which lane worked.

    Attributes:
        busy_s: seconds for which each lane has worked, not counting the time in which
            its tasks waited for those of other lanes.
        spans: everything that was done, where that is kept.
    """

    def __init__(self, *, keeps_spans: bool = False) -> None:
        self.busy_s = dict.fromkeys(Lane, 0.0)
        self.spans: list[Span] = []
        self._keeps_spans = keeps_spans
        self._work = threading.local()  # what a thread counts: lane, name, begin_s

    def start(self) -> None:
        """Begins a new run."""
        self.busy_s = dict.fromkeys(Lane, 0.0)
        self.spans = []

    def add(self, span: Span) -> None:
        """Keeps what a lane did, if anything is kept."""
        if self._keeps_spans:
            self.spans.append(span)

    @contextlib.contextmanager
    def working(self, lane: Lane, name: str) -> Iterator[None]:
        """Counts the time in the block as work of `lane`, but for what is `waiting`."""
        self._work.lane, self._work.name = lane, name
        self._work.begin_s = time.perf_counter()
        try:
            yield
        finally:
            self._stop_working()
            self._work.lane = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Leaves the time in the block out of the work that this thread counts."""
        self._stop_working()
        try:
            yield
        finally:
            self._work.begin_s = time.perf_counter()

    def _stop_working(self) -> None:
        lane = getattr(self._work, "lane", None)
        if lane is not None:
            self.worked(lane, self._work.name, self._work.begin_s, time.perf_counter())

    def worked(
        self, lane: Lane, name: str, begin_s: float, end_s: float, nbytes: int = 0
    ) -> None:
        """Counts what a lane did that does one thing at a time."""
        self.busy_s[lane] += end_s - begin_s
        self.add(Span(lane, name, begin_s, end_s, nbytes))


class Lanes:
    """One thread for each lane of `THREADS`; futures raise what tasks raise."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._threads = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"flexjax {lane.value}")
            for lane in THREADS
        }

    def submit[T](self, lane: Lane, task: Callable[..., T], *args: Any) -> Future[T]:
        """Issues `task(*args)`; returns at once."""
        return self._threads[lane].submit(task, *args)

    def working(self, lane: Lane, name: str) -> contextlib.AbstractContextManager[None]:
        """Counts the time in a block as work of `lane`, in whose thread it runs."""
        return self._timeline.working(lane, name)

    def drain(self) -> None:
        """Waits until every task that was issued has ended, well or badly."""
        for thread in self._threads.values():
            thread.submit(lambda: None).result()

    def close(self) -> None:
        """Lets the running tasks end, drops the waiting ones and ends the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
