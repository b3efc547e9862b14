"""The disk tier: zarr3 arrays in a spill folder, each with a tail in host memory.

A chunk holds some slots of some rows and is written once, whole: what does not fill a
chunk yet waits in the tail. So a new token costs a copy into host memory, and a disk
write only when its chunk is full; nothing on disk is ever read to be written again.
"""

import dataclasses
import pathlib
import shutil
import threading
from collections.abc import Hashable

import jax
import numpy as np
import tensorstore as ts

from flexjax.checkpoint import tensorstore_message
from flexjax.memory.buffers import BufferPool, typed
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan
from flexjax.policy import Kind, Tier

CHUNK_BYTES = 8 << 20
# A chunk of a growing array has a power of two of slots in this range, whatever its
# size: fewer make files too small to stream, more make the tails too large.
MIN_CHUNK_SLOTS, MAX_CHUNK_SLOTS = 8, 32
_UNBOUNDED_SLOTS = 1 << 24


def chunk_slots(slot_bytes: int) -> int:
    """Slots in a chunk of a growing array with `slot_bytes` bytes a slot."""
    slots = MAX_CHUNK_SLOTS
    while slots > MIN_CHUNK_SLOTS and slots * slot_bytes > CHUNK_BYTES:
        slots //= 2
    return slots


@dataclasses.dataclass(kw_only=True)
class _Entry:
    """One array: its file, and the slots that are not in it yet."""

    folder: pathlib.Path
    handle: ts.TensorStore
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    chunk: int  # slots
    flushed: int = 0  # slots on disk
    used: int = 0  # slots in all
    tail: np.ndarray | None = None  # [rows, groups, chunk, width]

    @property
    def slot_bytes(self) -> int:
        rows, groups, _, width = self.shape
        return rows * groups * width * self.dtype.itemsize


class DiskStore:
    """Holds arrays on disk; a load reads them into a stage buffer."""

    tier = Tier.DISK

    def __init__(
        self, ledger: Ledger, kind: Kind, link: DeviceLink, folder: pathlib.Path
    ) -> None:
        self._ledger, self._kind, self._link = ledger, kind, link
        self._folder = folder
        self._stage = BufferPool(ledger, link.stage_tier, kind)
        self._tails = BufferPool(ledger, Tier.HOST, kind)
        self._context = ts.Context({"file_io_sync": False})
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.Lock()
        self._num_created = 0

    def store(
        self, key: Hashable, value: jax.Array, rows: slice, *, at: int, slots: int
    ) -> None:
        part = self._link.download(value, rows)
        entry = self._entry(key, part, at, slots)
        entry.shape = (*entry.shape[:2], slots, entry.shape[3])
        entry.used = at + part.shape[2]
        if entry.tail is not None:
            room = min(part.shape[2], entry.flushed + entry.chunk - at)
            begin = at - entry.flushed
            entry.tail[:, :, begin : begin + room] = part[:, :, :room]
            if begin + room < entry.chunk:
                return
            self._write(key, entry, entry.tail)
            part = part[:, :, room:]
        grows = entry.used < slots
        whole = part.shape[2] // entry.chunk * entry.chunk if grows else part.shape[2]
        if whole:
            self._write(key, entry, part[:, :, :whole])
        self._keep_tail(entry, part[:, :, whole:])

    def load(self, key: Hashable) -> Loan:
        with self._lock:
            entry = self._entries[key]
        buffer = self._stage.take(entry.slot_bytes * entry.shape[2])
        array = typed(buffer, entry.shape, entry.dtype)
        try:
            self._read(key, entry, array)
        except BaseException:
            self._stage.give(buffer)
            raise
        return self._link.lend(array, self._kind, lambda: self._stage.give(buffer))

    def free(self, key: Hashable) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            self._hold(-entry.flushed * entry.slot_bytes)
            self._keep_tail(entry, None)
            shutil.rmtree(entry.folder, ignore_errors=True)

    def clear(self) -> None:
        self._stage.clear()
        self._tails.clear()

    def _entry(self, key: Hashable, part: np.ndarray, at: int, slots: int) -> _Entry:
        """The entry to write into: the one that is there, or a new one at slot 0."""
        with self._lock:
            entry = self._entries.get(key)
        if at > 0 and entry is not None:
            return entry
        shape = (*part.shape[:2], slots, part.shape[3])
        if entry is not None and (entry.shape, entry.dtype) == (shape, part.dtype):
            self._hold(-entry.flushed * entry.slot_bytes)
            self._keep_tail(entry, None)
            entry.flushed = 0
            return entry
        self.free(key)
        grows = part.shape[2] < slots
        slot_bytes = part[:, :, 0].nbytes
        chunk = chunk_slots(slot_bytes) if grows else slots
        with self._lock:
            self._num_created += 1
            folder = self._folder / f"{self._kind.value}-{self._num_created}"
        entry = _Entry(
            folder=folder,
            handle=self._create(key, part, chunk, folder),
            shape=shape,
            dtype=part.dtype,
            chunk=chunk,
        )
        with self._lock:
            self._entries[key] = entry
        return entry

    def _create(
        self, key: Hashable, part: np.ndarray, chunk: int, folder: pathlib.Path
    ) -> ts.TensorStore:
        rows, groups, _, width = part.shape
        row_bytes = groups * chunk * width * part.dtype.itemsize
        pieces = min(rows, max(1, -(-rows * row_bytes // CHUNK_BYTES)))
        grid = {"chunk_shape": [-(-rows // pieces), groups, chunk, width]}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": [rows, groups, _UNBOUNDED_SLOTS, width],
                "data_type": part.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": grid},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "fill_missing_data_reads": False,
        }
        try:
            return ts.open(
                spec, context=self._context, create=True, open=False
            ).result()
        except ValueError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise self._failure("written", key, error) from error

    def _write(self, key: Hashable, entry: _Entry, part: np.ndarray) -> None:
        first, last = entry.flushed, entry.flushed + part.shape[2]
        try:
            entry.handle[:, :, first:last].write(part).result()
        except ValueError as error:
            raise self._failure("written", key, error) from error
        entry.flushed = last
        self._hold(part.nbytes)
        self._ledger.move(Tier.HOST, Tier.DISK, part.nbytes)

    def _read(self, key: Hashable, entry: _Entry, array: np.ndarray) -> None:
        flushed, used = entry.flushed, entry.used
        reading = None
        if flushed:
            target = ts.array(array[:, :, :flushed])
            source = entry.handle[:, :, :flushed]
            reading = target.write(source).commit
        if entry.tail is not None:
            array[:, :, flushed:used] = entry.tail[:, :, : used - flushed]
        array[:, :, used:] = 0
        if reading is not None:
            try:
                reading.result()
            except ValueError as error:
                raise self._failure("read", key, error) from error
            nbytes = flushed * entry.slot_bytes
            self._ledger.move(Tier.DISK, self._link.stage_tier, nbytes)

    def _keep_tail(self, entry: _Entry, part: np.ndarray | None) -> None:
        """Makes `part` the tail; None, or nothing more to come, leaves no tail."""
        wants = part is not None and entry.used < entry.shape[2]
        if entry.tail is not None and not wants:
            self._tails.give(entry.tail.reshape(-1).view(np.uint8))
            entry.tail = None
        if wants:
            assert part is not None
            if entry.tail is None:
                rows, groups, _, width = entry.shape
                buffer = self._tails.take(entry.slot_bytes * entry.chunk)
                entry.tail = typed(
                    buffer, (rows, groups, entry.chunk, width), entry.dtype
                )
            entry.tail[:, :, : part.shape[2]] = part

    def _hold(self, nbytes: int) -> None:
        self._ledger.hold(Tier.DISK, self._kind, nbytes)

    def _failure(self, verb: str, key: Hashable, error: ValueError) -> OSError:
        return OSError(
            f"{key} could not be {verb} in {self._folder}: "
            f"{tensorstore_message(error)}; check the disk and its free space"
        )
