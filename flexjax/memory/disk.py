"""The disk tier: one file an array in a spill folder, with a tail in host memory.

A file is a row of segments; a segment holds some slots of all rows, `[rows, groups,
slots, width]`, and is written once, whole. The slots of a prefill are one segment. New
ones, which come one by one, wait in the tail until it is full: so a new token costs a
copy into host memory, and nothing on disk is ever read to be written again.

Arrays pass through a few small buffers on their way, since the slots of a segment lie
apart in the array that is loaded.
"""

import collections
import dataclasses
import itertools
import pathlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import jax
import numpy as np

from flexjax.extents import BLOCK_BYTES, Extent, as_bytes, read_extent, write_extent
from flexjax.memory.buffers import BufferPool, typed
from flexjax.memory.disk_queue import DiskQueue, Urgency
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan
from flexjax.policy import Kind, Tier

# A tail has a power of two of slots in this range, and about so many bytes: enough for
# a request at the disk's full speed, and no more, since every layer and batch has two.
MIN_TAIL_SLOTS, MAX_TAIL_SLOTS = 4, 32
TAIL_BYTES = 2 << 20
# What passes through a buffer on its way: rows of one segment, of about this size.
PASSING_BYTES = 4 << 20
MOST_PASSING = 4  # such buffers, in each direction


def tail_slots(slot_bytes: int) -> int:
    """Slots in the tail of a growing array with `slot_bytes` bytes a slot."""
    slots = MAX_TAIL_SLOTS
    while slots > MIN_TAIL_SLOTS and slots * slot_bytes > TAIL_BYTES:
        slots //= 2
    return slots


def passing_bytes(rows: int, row_bytes: int, *, segments: int) -> int:
    """Bytes of the buffers through which an array of `rows` rows passes, at most.

    Args:
        rows: of the array.
        row_bytes: of a row of the longest segment.
        segments: that the array has at most; pieces of several may be under way.
    """
    whole, piece = rows * row_bytes, max(PASSING_BYTES, row_bytes)
    return min(segments * whole, MOST_PASSING * piece)


def _piece_rows(row_bytes: int) -> int:
    return max(1, PASSING_BYTES // row_bytes)


class _Segment(NamedTuple):
    """Slots `first` to `first + slots - 1`, at `offset` of the file."""

    first: int
    slots: int
    offset: int


class _Piece(NamedTuple):
    """Some rows of a segment, and the buffer through which they pass."""

    segment: _Segment
    rows: slice
    buffer: np.ndarray


@dataclasses.dataclass(kw_only=True)
class _Entry:
    """One array: its file, and the slots that are not in it yet."""

    path: pathlib.Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    segments: list[_Segment] = dataclasses.field(default_factory=list)
    used: int = 0  # slots in all
    tail: np.ndarray | None = None  # [rows, groups, tail slots, width]

    @property
    def slot_bytes(self) -> int:
        rows, groups, _, width = self.shape
        return rows * groups * width * self.dtype.itemsize

    @property
    def flushed(self) -> int:
        """Slots on disk."""
        return sum(segment.slots for segment in self.segments)

    def next_segment(self, slots: int) -> _Segment:
        """A segment behind the last one; it begins at a block, for direct I/O."""
        last = self.segments[-1] if self.segments else _Segment(0, 0, 0)
        end = last.offset + last.slots * self.slot_bytes
        offset = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        return _Segment(last.first + last.slots, slots, offset)

    def row_bytes(self, slots: int) -> int:
        """Bytes of one row of a segment."""
        return self.slot_bytes // self.shape[0] * slots

    def cut(self, segment: _Segment) -> Iterator[tuple[slice, int]]:
        """Rows that pass through one buffer at a time, and its bytes."""
        row_bytes = self.row_bytes(segment.slots)
        step = _piece_rows(row_bytes)
        for first in range(0, self.shape[0], step):
            rows = slice(first, min(first + step, self.shape[0]))
            yield rows, (rows.stop - rows.start) * row_bytes

    def view(self, piece: _Piece) -> np.ndarray:
        """The buffer of a piece as `[rows, groups, slots, width]`."""
        rows, groups, width = piece.rows, self.shape[1], self.shape[3]
        shape = (rows.stop - rows.start, groups, piece.segment.slots, width)
        return typed(piece.buffer, shape, self.dtype)


class DiskStore:
    """Holds arrays on disk; a load reads them into a stage buffer."""

    tier = Tier.DISK

    def __init__(
        self,
        ledger: Ledger,
        kind: Kind,
        link: DeviceLink,
        disk: DiskQueue,
        folder: pathlib.Path,
    ) -> None:
        self._ledger, self._kind, self._link = ledger, kind, link
        self._disk, self._folder = disk, folder
        self._stage = BufferPool(ledger, link.stage_tier, kind)
        self._tails = BufferPool(ledger, Tier.HOST, kind)
        self._passing = BufferPool(ledger, Tier.HOST, kind)
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def store(
        self, key: Hashable, value: jax.Array, rows: slice, *, at: int, slots: int
    ) -> None:
        part = self._link.download(value, rows)
        entry = self._entry(key, part, at, slots)
        entry.shape = (*entry.shape[:2], slots, entry.shape[3])
        if at == 0:
            self._write(key, entry, part)
            entry.used = part.shape[2]
            return
        for slot in range(part.shape[2]):
            self._add_to_tail(key, entry, part[:, :, slot : slot + 1])

    def load(self, key: Hashable) -> Loan:
        with self._lock:
            entry = self._entries[key]
        buffer = self._stage.take(entry.slot_bytes * entry.shape[2])
        array = typed(buffer, entry.shape, entry.dtype)
        try:
            self._fill(key, entry, array)
        except BaseException:
            self._stage.give(buffer)
            raise
        return self._link.lend(array, self._kind, lambda: self._stage.give(buffer))

    def free(self, key: Hashable) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            self._empty(entry)
            entry.path.unlink(missing_ok=True)

    def clear(self) -> None:
        self._stage.clear()
        self._tails.clear()
        self._passing.clear()

    def _entry(self, key: Hashable, part: np.ndarray, at: int, slots: int) -> _Entry:
        """The entry to write into: the one that is there, emptied if `at` is 0, or new.

        A file that is there is written over, which saves the disk from finding room.
        """
        with self._lock:
            entry = self._entries.get(key)
        if at > 0 and entry is not None:
            return entry
        shape = (*part.shape[:2], slots, part.shape[3])
        if entry is not None:
            self._empty(entry)
            entry.shape, entry.dtype = shape, part.dtype
            return entry
        path = self._folder / f"{self._kind.value}-{next(self._numbers)}"
        entry = _Entry(path=path, shape=shape, dtype=part.dtype)
        with self._lock:
            self._entries[key] = entry
        return entry

    def _empty(self, entry: _Entry) -> None:
        self._ledger.hold(Tier.DISK, self._kind, -entry.flushed * entry.slot_bytes)
        entry.segments.clear()
        entry.used = 0
        if entry.tail is not None:
            self._tails.give(as_bytes(entry.tail))
            entry.tail = None

    def _add_to_tail(self, key: Hashable, entry: _Entry, slot: np.ndarray) -> None:
        if entry.tail is None:
            rows, groups, _, width = entry.shape
            size = tail_slots(entry.slot_bytes)
            buffer = self._tails.take(entry.slot_bytes * size)
            entry.tail = typed(buffer, (rows, groups, size, width), entry.dtype)
        at = entry.used - entry.flushed
        entry.tail[:, :, at : at + 1] = slot
        entry.used += 1
        if at + 1 == entry.tail.shape[2]:
            self._write(key, entry, entry.tail)

    def _write(self, key: Hashable, entry: _Entry, part: np.ndarray) -> None:
        """Writes `[rows, groups, slots, width]` as the next segment."""
        segment = entry.next_segment(part.shape[2])

        def start(piece: _Piece) -> Future[None]:
            entry.view(piece)[:] = part[piece.rows]
            return self._move(write_extent, "written", key, entry, piece)

        self._pass_through(entry, [segment], start, lambda piece: None)
        entry.segments.append(segment)
        self._ledger.hold(Tier.DISK, self._kind, part.nbytes)
        self._ledger.move(Tier.HOST, Tier.DISK, part.nbytes)

    def _fill(self, key: Hashable, entry: _Entry, array: np.ndarray) -> None:
        """Reads every slot that is in use into `array`; the others become zero."""

        def start(piece: _Piece) -> Future[None]:
            return self._move(read_extent, "read", key, entry, piece)

        def finish(piece: _Piece) -> None:
            first, slots, _ = piece.segment
            into = array[piece.rows, :, first : first + slots]
            into[:] = entry.view(piece)

        flushed = entry.flushed
        if entry.tail is not None:
            array[:, :, flushed : entry.used] = entry.tail[:, :, : entry.used - flushed]
        array[:, :, entry.used :] = 0
        self._pass_through(entry, entry.segments, start, finish)
        nbytes = flushed * entry.slot_bytes
        self._ledger.move(Tier.DISK, self._link.stage_tier, nbytes)

    def _pass_through(
        self,
        entry: _Entry,
        segments: Iterable[_Segment],
        start: Callable[[_Piece], Future[None]],
        finish: Callable[[_Piece], None],
    ) -> None:
        """Moves segments in pieces, a few of which are under way at the same time."""
        under_way: collections.deque[tuple[_Piece, Future[None]]] = collections.deque()

        def finish_first() -> None:
            piece, done = under_way[0]
            self._disk.wait(done)
            finish(piece)
            self._passing.give(piece.buffer)
            under_way.popleft()

        try:
            for segment in segments:
                for rows, nbytes in entry.cut(segment):
                    if len(under_way) == MOST_PASSING:
                        finish_first()
                    buffer = self._passing.take(nbytes)
                    piece = _Piece(segment, rows, buffer)
                    try:
                        under_way.append((piece, start(piece)))
                    except BaseException:
                        self._passing.give(buffer)
                        raise
            while under_way:
                finish_first()
        finally:
            for piece, done in under_way:
                done.exception()  # the disk may still be busy with the buffer
                self._passing.give(piece.buffer)

    def _move(
        self,
        move: Callable[[Extent], None],
        verb: str,
        key: Hashable,
        entry: _Entry,
        piece: _Piece,
    ) -> Future[None]:
        """Starts to read or write a piece."""
        segment, rows, buffer = piece
        offset = segment.offset + rows.start * entry.row_bytes(segment.slots)

        def describe(error: OSError) -> OSError:
            return OSError(
                f"{key} could not be {verb} in {self._folder}: {error}; check the disk "
                "and its free space"
            )

        return self._disk.submit(
            move,
            [Extent(entry.path, offset, buffer)],
            name=f"{key}",
            urgency=Urgency.NOW,
            describe=describe,
        )
