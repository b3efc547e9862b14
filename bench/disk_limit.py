"""What the disk can do: raw reads and writes past the page cache, several at a time."""

import dataclasses
import mmap
import os
import pathlib
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from flexjax.checkpoint import WeightStore
from flexjax.store_format import chunk_path


class Way(NamedTuple):
    """A way to keep a disk busy."""

    request_bytes: int
    depth: int  # requests under way at once


WAYS = (Way(1 << 20, 4), Way(4 << 20, 2), Way(4 << 20, 4), Way(8 << 20, 4))
READ_BYTES = 2 << 30  # in all, or the whole store if it is smaller
WRITE_BYTES = 1 << 30  # in all, or as much as the run spills


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiskRate:
    """What one measurement found.

    Attributes:
        bytes_per_s: of the best way.
        way: that one.
        direct: whether the requests went past the page cache.
        num_bytes: moved in all, over all ways.
    """

    bytes_per_s: float
    way: Way
    direct: bool
    num_bytes: int


def measure_read(
    store: WeightStore, tensors: Sequence[str], most_bytes: int = READ_BYTES
) -> DiskRate:
    """Reads the chunk files of `tensors`, in turns over the ways.

    A file is read once where there are enough of them.
    """
    paths = _spread(list(store_files(store, tensors)), most_bytes)
    flags = os.O_RDONLY | (os.O_DIRECT if store.direct_io else 0)

    def read(paths: Sequence[pathlib.Path], way: Way) -> int:
        buffers = _buffers(way)
        with ThreadPoolExecutor(way.depth) as pool:
            return sum(pool.map(lambda path: _read_file(path, flags, buffers), paths))

    shares = [paths[turn :: len(WAYS)] or paths for turn in range(len(WAYS))]
    return _best(lambda turn: read(shares[turn], WAYS[turn]), direct=store.direct_io)


def store_files(store: WeightStore, tensors: Sequence[str]) -> Iterator[pathlib.Path]:
    """The files that hold `tensors`."""
    for name in tensors:
        entry = store.tensors[name]
        for index in range(entry.num_chunks):
            yield chunk_path(store.folder, name, entry, index)


def measure_write(folder: pathlib.Path, num_bytes: int) -> DiskRate:
    """Writes a file below `folder` in each way, until the disk has all of it.

    Together they have about `num_bytes`, but at most `WRITE_BYTES`.
    """
    num_bytes = min(num_bytes, WRITE_BYTES)
    share_bytes = num_bytes // len(WAYS)
    with tempfile.TemporaryDirectory(prefix="flexjax-limit-", dir=folder) as scratch:
        path = pathlib.Path(scratch, "data")
        direct = _writes_direct(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)

        def write(turn: int) -> int:
            return _write_file(path, flags, share_bytes, WAYS[turn])

        return _best(write, direct=direct)


def _best(move: Callable[[int], int], *, direct: bool) -> DiskRate:
    """Times `move(turn)`, which returns the bytes that it moved, for each way."""
    rates, num_bytes = {}, 0
    for turn, way in enumerate(WAYS):
        begun_s = time.perf_counter()
        moved = move(turn)
        rates[way] = moved / (time.perf_counter() - begun_s)
        num_bytes += moved
    way = max(rates, key=lambda way: rates[way])
    return DiskRate(bytes_per_s=rates[way], way=way, direct=direct, num_bytes=num_bytes)


def _spread(paths: list[pathlib.Path], most_bytes: int) -> list[pathlib.Path]:
    """Files of about `most_bytes`, taken evenly from all of them."""
    total_bytes = sum(path.stat().st_size for path in paths)
    return paths[:: max(1, total_bytes // most_bytes)]


def _buffers(way: Way) -> queue.SimpleQueue[mmap.mmap]:
    """Page-aligned buffers of a request each, to be taken and put back."""
    buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    for _ in range(way.depth):
        buffers.put(mmap.mmap(-1, way.request_bytes))
    return buffers


def _read_file(
    path: pathlib.Path, flags: int, buffers: queue.SimpleQueue[mmap.mmap]
) -> int:
    buffer, file, done = buffers.get(), os.open(path, flags), 0
    try:
        while count := os.preadv(file, [buffer], done):
            done += count
            if count < len(buffer):
                break
    finally:
        os.close(file)
        buffers.put(buffer)
    return done


def _write_file(path: pathlib.Path, flags: int, num_bytes: int, way: Way) -> int:
    buffer = mmap.mmap(-1, way.request_bytes)
    buffer[:] = os.urandom(way.request_bytes)  # some disks are quick with zeros
    requests = max(1, num_bytes // way.request_bytes)
    file = os.open(path, flags)
    try:
        with ThreadPoolExecutor(way.depth) as pool:
            counts = pool.map(
                lambda index: os.pwritev(file, [buffer], index * way.request_bytes),
                range(requests),
            )
            done = sum(counts)
        os.fdatasync(file)
    finally:
        os.close(file)
    return done


def _writes_direct(path: pathlib.Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True
