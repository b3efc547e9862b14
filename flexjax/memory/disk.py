"""The disk tier: one file an array in a spill folder, with a tail in host memory.

A file is a row of stripes; a stripe holds some slots of all rows, `[rows, groups,
slots, width]`, and is written once, whole. The slots of a prefill are one stripe. New
ones, which come one by one, wait in the tail until it is full: so a new token costs a
copy into host memory, and nothing on disk is ever read to be written again.

The first stripe is loaded as it is. What follows is put together in memory, and passes
through a few small buffers on its way, since the slots of a stripe lie apart there.
"""

import collections
import functools
import itertools
import pathlib
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future

import jax
import numpy as np

from flexjax.extents import Extent, as_bytes, read_extent, write_extent
from flexjax.memory.buffers import BufferPool, typed
from flexjax.memory.disk_queue import DiskQueue, Urgency
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Lender, Loan
from flexjax.memory.spilled import Passage, SpilledArray, Stripe
from flexjax.memory.tier import Pieces
from flexjax.policy import Kind, Tier

# A tail has a power of two of slots in this range, and about so many bytes: enough for
# a request at the disk's full speed, and no more, since every layer and batch has two.
MIN_TAIL_SLOTS, MAX_TAIL_SLOTS = 4, 32
TAIL_BYTES = 2 << 20
# What passes through a buffer on its way: rows of one stripe, of about this size.
PASSING_BYTES = 4 << 20
MOST_PASSING = 4  # such buffers, in each direction


def tail_slots(slot_bytes: int) -> int:
    """Slots in the tail of a growing array with `slot_bytes` bytes a slot."""
    slots = MAX_TAIL_SLOTS
    while slots > MIN_TAIL_SLOTS and slots * slot_bytes > TAIL_BYTES:
        slots //= 2
    return slots


def passing_bytes(rows: int, row_bytes: int, *, stripes: int) -> int:
    """Bytes of the buffers through which an array of `rows` rows passes, at most.

    Args:
        rows: of the array.
        row_bytes: of a row of the longest stripe.
        stripes: that the array has at most; passages of several may be under way.
    """
    whole, passage = rows * row_bytes, max(PASSING_BYTES, row_bytes)
    return min(stripes * whole, MOST_PASSING * passage)


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
        lender: Lender | None = None,
    ) -> None:
        self._ledger, self._kind, self._link = ledger, kind, link
        self._lender = lender or link
        self._disk, self._folder = disk, folder
        self._stage = BufferPool(
            ledger, self._lender.stage_tier, kind, self._lender.host_memory
        )
        self._tails = BufferPool(ledger, Tier.HOST, kind)
        self._passing = BufferPool(ledger, Tier.HOST, kind)
        self._entries: dict[Hashable, SpilledArray] = {}
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

    def load(self, key: Hashable) -> Callable[[], Pieces]:
        with self._lock:
            entry = self._entries[key]
        first = entry.stripes[0].slots
        sizes = [first, entry.shape[2] - first] if entry.shape[2] > first else [first]
        buffers: list[np.ndarray] = []
        try:
            buffers.extend(
                self._stage.take(entry.slot_bytes * slots) for slots in sizes
            )
            # It needs no way through small buffers: it lies in memory as on disk.
            whole = Extent(entry.path, entry.stripes[0].offset, buffers[0])
            done = self._submit(read_extent, "read", key, whole)
        except BaseException:
            self._give(buffers)
            raise

        def finish() -> Pieces:
            try:
                self._fill(key, entry, buffers, done)
            except BaseException:
                self._give(buffers)
                raise
            return self._lend(entry, sizes, buffers)

        return finish

    def _give(self, buffers: list[np.ndarray]) -> None:
        for buffer in buffers:
            self._stage.give(buffer)

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

    def _entry(
        self, key: Hashable, part: np.ndarray, at: int, slots: int
    ) -> SpilledArray:
        """The entry to write into: the one that is there, emptied if `at` is 0, or new.

        A file that is there is written over, which saves the disk from finding room.
        """
        with self._lock:
            entry = self._entries.get(key)
        if at > 0:
            assert entry is not None, f"{key} was never begun"
            return entry
        shape = (*part.shape[:2], slots, part.shape[3])
        if entry is not None:
            self._empty(entry)
            entry.shape, entry.dtype = shape, part.dtype
            return entry
        path = self._folder / f"{self._kind.value}-{next(self._numbers)}"
        entry = SpilledArray(path=path, shape=shape, dtype=part.dtype)
        with self._lock:
            self._entries[key] = entry
        return entry

    def _empty(self, entry: SpilledArray) -> None:
        self._ledger.hold(Tier.DISK, self._kind, -entry.flushed * entry.slot_bytes)
        entry.stripes.clear()
        entry.used = 0
        if entry.tail is not None:
            self._tails.give(as_bytes(entry.tail))
            entry.tail = None

    def _add_to_tail(
        self, key: Hashable, entry: SpilledArray, slot: np.ndarray
    ) -> None:
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

    def _write(self, key: Hashable, entry: SpilledArray, part: np.ndarray) -> None:
        """Writes `[rows, groups, slots, width]` as the next stripe."""
        stripe = entry.next_stripe(part.shape[2])

        def start(passage: Passage) -> Future[None]:
            entry.view(passage)[:] = part[passage.rows]
            return self._move(write_extent, "written", key, entry, passage)

        self._pass_through(entry, [stripe], start, lambda passage: None)
        entry.stripes.append(stripe)
        self._ledger.hold(Tier.DISK, self._kind, part.nbytes)
        self._ledger.move(Tier.HOST, Tier.DISK, part.nbytes)

    def _fill(
        self,
        key: Hashable,
        entry: SpilledArray,
        buffers: list[np.ndarray],
        first: Future[None],
    ) -> None:
        """Waits for the first stripe, and reads what follows into another buffer."""
        try:
            if len(buffers) > 1:
                rows, groups, slots, width = entry.shape
                shape = (rows, groups, slots - entry.stripes[0].slots, width)
                self._fill_rest(key, entry, typed(buffers[1], shape, entry.dtype))
        except BaseException:
            first.exception()  # the disk may still be busy with the buffer
            raise
        self._disk.wait(first)
        nbytes = entry.flushed * entry.slot_bytes
        self._ledger.move(Tier.DISK, self._lender.stage_tier, nbytes)

    def _fill_rest(self, key: Hashable, entry: SpilledArray, array: np.ndarray) -> None:
        """Reads the slots behind the first stripe; those not in use become zero."""
        begin = entry.stripes[0].slots

        def start(passage: Passage) -> Future[None]:
            return self._move(read_extent, "read", key, entry, passage)

        def finish(passage: Passage) -> None:
            first, slots, _ = passage.stripe
            into = array[passage.rows, :, first - begin : first - begin + slots]
            into[:] = entry.view(passage)

        flushed, used = entry.flushed - begin, entry.used - begin
        if entry.tail is not None:
            array[:, :, flushed:used] = entry.tail[:, :, : used - flushed]
        array[:, :, used:] = 0
        self._pass_through(entry, entry.stripes[1:], start, finish)

    def _lend(
        self, entry: SpilledArray, sizes: list[int], buffers: list[np.ndarray]
    ) -> Pieces:
        """The filled buffers on the device."""
        rows, groups, _, width = entry.shape
        loans: list[Loan] = []
        for slots, buffer in zip(sizes, buffers, strict=True):
            array = typed(buffer, (rows, groups, slots, width), entry.dtype)
            give = functools.partial(self._stage.give, buffer)
            try:
                loans.append(self._lender.lend(array, self._kind, give))
            except BaseException:
                for loan in loans:
                    loan.release()
                self._give(buffers[len(loans) + 1 :])
                raise
        return tuple(loans)

    def _pass_through(
        self,
        entry: SpilledArray,
        stripes: Iterable[Stripe],
        start: Callable[[Passage], Future[None]],
        finish: Callable[[Passage], None],
    ) -> None:
        """Moves stripes in passages, a few of which are under way at the same time."""
        under_way: collections.deque[tuple[Passage, Future[None]]] = collections.deque()

        def finish_first() -> None:
            passage, done = under_way[0]
            self._disk.wait(done)
            finish(passage)
            self._passing.give(passage.buffer)
            under_way.popleft()

        try:
            for stripe in stripes:
                for rows, nbytes in entry.cut(stripe, PASSING_BYTES):
                    if len(under_way) == MOST_PASSING:
                        finish_first()
                    buffer = self._passing.take(nbytes)
                    passage = Passage(stripe, rows, buffer)
                    try:
                        under_way.append((passage, start(passage)))
                    except BaseException:
                        self._passing.give(buffer)
                        raise
            while under_way:
                finish_first()
        finally:
            for passage, done in under_way:
                done.exception()  # the disk may still be busy with the buffer
                self._passing.give(passage.buffer)

    def _move(
        self,
        move: Callable[[Extent], None],
        verb: str,
        key: Hashable,
        entry: SpilledArray,
        passage: Passage,
    ) -> Future[None]:
        """Starts to read or write a passage."""
        stripe, rows, buffer = passage
        offset = stripe.offset + rows.start * entry.row_bytes(stripe.slots)
        return self._submit(move, verb, key, Extent(entry.path, offset, buffer))

    def _submit(
        self, move: Callable[[Extent], None], verb: str, key: Hashable, extent: Extent
    ) -> Future[None]:
        def describe(error: OSError) -> OSError:
            return OSError(
                f"{key} could not be {verb} in {self._folder}: {error}; check the disk "
                "and its free space"
            )

        return self._disk.submit(
            move,
            [extent],
            name=f"{key}",
            urgency=Urgency.NOW,
            describe=describe,
        )
