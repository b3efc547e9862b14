"""Lanes: threads that each do one kind of work in the order in which it was issued.

A task may wait for tasks that were issued before it, in any lane. Since every lane
keeps to the order of issue, the oldest unfinished task can always run: lanes cannot
deadlock.
"""

import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Lane(enum.Enum):
    """What a lane carries."""

    WEIGHTS = "weights in"
    CACHE_IN = "cache in"
    CACHE_OUT = "cache out"
    HIDDEN = "hidden in and out"
    DISPATCH = "dispatch"
    COMPUTE = "compute"  # follows the device: its tasks end when the device's do


class Lanes:
    """One thread for each `Lane`; what a task raises is raised by its future.

    `busy_s` holds the seconds for which each lane has worked, not counting the time in
    which its tasks waited for those of other lanes.
    """

    def __init__(self) -> None:
        self.busy_s = dict.fromkeys(Lane, 0.0)
        self._threads = {
            lane: ThreadPoolExecutor(1, thread_name_prefix=f"flexjax {lane.value}")
            for lane in Lane
        }

    def submit[T](self, lane: Lane, task: Callable[..., T], *args: Any) -> Future[T]:
        """Issues `task(*args)`; returns at once."""
        return self._threads[lane].submit(task, *args)

    @contextlib.contextmanager
    def working(self, lane: Lane) -> Iterator[None]:
        """Counts the time in the block as work of `lane`, in whose thread it runs."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.busy_s[lane] += time.perf_counter() - begun

    def drain(self) -> None:
        """Waits until every task that was issued has ended, well or badly."""
        for lane in Lane:
            self._threads[lane].submit(lambda: None).result()

    def close(self) -> None:
        """Lets the running tasks end, drops the waiting ones and ends the threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=True, cancel_futures=True)
