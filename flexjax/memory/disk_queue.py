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

# Requests under way: on the disk measured (raw reads at 1.5 GB/s), 2 to 8 were equal to
# within its noise, in pieces of 2 to 8 MiB; smaller ones cost more of the processor.
DEPTH = 4
PIECE_BYTES = 4 << 20


class Urgency(enum.IntEnum):
    """What goes first when several requests wait; a smaller number is more urgent."""

    NOW = 0  # a compute call, or a buffer, waits for this alone
    AHEAD = 1  # a layer that is still to come
    LAST = 2


class _Request:
    """Pieces that belong together; resolved once none of them is under way any more."""

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

    def end_piece(self, error: BaseException | None) -> None:
        with self._lock:
            self._left -= 1
            self._error = self._error or error
            if self._left:
                return
        if isinstance(self._error, OSError):
            described = self._describe(self._error)
            described.__cause__ = self._error
            self.done.set_exception(described)
        elif self._error is not None:
            self.done.set_exception(self._error)
        else:
            self.done.set_result(None)


class _Piece(NamedTuple):
    urgency: Urgency
    number: int  # of the piece, in the order of issue; no two pieces share one
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
        self._waiting: queue.PriorityQueue[_Piece | _End] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._under_way, self._busy_since_s = 0, 0.0
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
        if not self._threads:
            raise RuntimeError("the disk's queue is closed")
        pieces = cut(extents, PIECE_BYTES)
        request = _Request(len(pieces), name, describe)
        if not pieces:
            request.done.set_result(None)
        for piece in pieces:
            number = next(self._numbers)
            self._waiting.put(_Piece(urgency, number, move, piece, request))
        return request.done

    def close(self) -> None:
        """Ends the threads once everything that was submitted is done."""
        for _ in self._threads:
            self._waiting.put(_End(Urgency.LAST, next(self._numbers)))
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while isinstance(piece := self._waiting.get(), _Piece):
            request, error = piece.request, None
            if not request.has_failed:
                begin_s = self._begin()
                try:
                    piece.move(piece.extent)
                except BaseException as raised:  # noqa: BLE001  (the future raises it)
                    error = raised
                size = piece.extent.memory.nbytes
                span = Span(Lane.DISK, request.name, begin_s, self._end(), size)
                self._timeline.add(span)
            request.end_piece(error)
            del piece, request, error  # an idle thread must not keep a buffer alive

    def _begin(self) -> float:
        now_s = time.perf_counter()
        with self._lock:
            if not self._under_way:
                self._busy_since_s = now_s
            self._under_way += 1
        return now_s

    def _end(self) -> float:
        now_s = time.perf_counter()
        with self._lock:
            self._under_way -= 1
            if not self._under_way:
                self._timeline.busy_s[Lane.DISK] += now_s - self._busy_since_s
        return now_s
