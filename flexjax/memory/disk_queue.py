"""The disk's queue: a few requests under way at once, the most urgent first."""

import enum
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from flexjax.extents import Extent, cut
from flexjax.memory.lanes import Lane, Span, Timeline

# Requests under way. Alone, a disk of 1.5 GB/s is as fast with 2 as with 8; but while
# layers are computed on all cores, threads wake late: a step that reads all weights
# took 2.10, 1.98 and 1.85 s with 4, 8 and 16. What is urgent still waits for what is
# under way: with most of the cache on disk too, a step took 3.0 s with 6, 3.6 with 16.
DEPTH = 8
# Few requests take little of the processor's time: a layer of OPT-6.7B took 1.09 times
# as long beside reads of 2 MiB, and 1.01 beside as many bytes in reads of 4 MiB. But
# what is urgent waits for those under way: with caches and half of the weights on disk,
# decoding took 1.08 to 1.15 times as long with 8 MiB as with 4. So a store's small
# chunks, of 4 to 5 MB, are one request each, and its large ones two.
REQUEST_BYTES = 5 << 20


class Urgency(enum.IntEnum):
    """What goes first when several requests wait; a smaller number is more urgent."""

    NOW = 0  # a compute call, or a buffer, waits for this alone
    AHEAD = 1  # a layer that is still to come
    LAST = 2


class _Request:
    """Transfers that belong together; resolved once none is under way any more."""

    def __init__(
        self, count: int, name: str, describe: Callable[[OSError], Exception]
    ) -> None:
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()
        self.name = name
        self._describe, self._left = describe, count
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def end_transfer(self, error: BaseException | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if self._left:
                return
        if self._error is None:
            self.done.set_result(None)
            return
        raised = self._error
        if isinstance(raised, OSError):
            try:
                raised = self._describe(raised)
                raised.__cause__ = self._error
            except Exception as error:  # noqa: BLE001  (whoever waits must hear of it)
                raised = error
        self.done.set_exception(raised)


class _Transfer(NamedTuple):
    urgency: Urgency
    number: int  # of the transfer, in the order of issue; no two transfers share one
    move: Callable[[Extent], None]
    extent: Extent
    request: _Request


class _End(NamedTuple):
    """Ends the thread that gets it."""

    urgency: Urgency
    number: int


class DiskQueue:
    """Moves extents in threads of its own.

    Requests of the same urgency are begun in the order in which they were issued.
    """

    def __init__(self, timeline: Timeline, depth: int = DEPTH) -> None:
        self._timeline = timeline
        self._waiting: queue.PriorityQueue[_Transfer | _End] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock, self._is_closed = threading.Lock(), False
        self._under_way, self._changed_s = 0, 0.0
        self._threads = [
            threading.Thread(
                target=self._work, name=f"flexjax disk {index}", daemon=True
            )
            for index in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        move: Callable[[Extent], None],
        extents: Sequence[Extent],
        *,
        name: str,
        urgency: Urgency,
        describe: Callable[[OSError], Exception],
    ) -> Future[None]:
        """Starts to move `extents`; their memory is the queue's until it is done.

        Args:
            move: `read_extent` or `write_extent`.
            extents: any number.
            name: of what is moved, for the timeline.
            urgency: which requests it overtakes.
            describe: makes what the future raises of what went wrong.

        Raises:
            RuntimeError: the queue is closed.
        """
        smaller = cut(extents, REQUEST_BYTES)
        request = _Request(len(smaller), name, describe)
        if not smaller:
            request.done.set_result(None)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the disk's queue is closed")
            for extent in smaller:
                number = next(self._numbers)
                self._waiting.put(_Transfer(urgency, number, move, extent, request))
        return request.done

    def wait(self, done: Future[None]) -> None:
        """Waits for what `submit` returned, and does not count it as the lane's work.

        Raises:
            Exception: what the future raises.
        """
        with self._timeline.waiting():
            done.result()

    def close(self) -> None:
        """Ends the threads once everything that was submitted is done."""
        with self._lock:
            if not self._is_closed:
                for _ in self._threads:
                    self._waiting.put(_End(Urgency.LAST, next(self._numbers)))
            self._is_closed = True
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while isinstance(transfer := self._waiting.get(), _Transfer):
            request, error = transfer.request, None
            if not request.has_failed:
                begin_s = self._count(1)
                try:
                    transfer.move(transfer.extent)
                except BaseException as raised:  # noqa: BLE001  (the future raises it)
                    error = raised
                size = transfer.extent.memory.nbytes
                span = Span(Lane.DISK, request.name, begin_s, self._count(-1), size)
                self._timeline.add(span)
            request.end_transfer(error)
            del transfer, request, error  # an idle thread must not keep a buffer alive

    def _count(self, added: int) -> float:
        """Counts the time since the last change, if anything was under way; now."""
        with self._lock:
            now_s = time.perf_counter()
            if self._under_way:
                self._timeline.busy_s[Lane.DISK] += now_s - self._changed_s
            self._under_way += added
            self._changed_s = now_s
        return now_s
