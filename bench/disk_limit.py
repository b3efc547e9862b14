"""What the disk can do: raw reads and writes past the page cache, several at a time."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from flexjax.checkpoint import WeightStore
from flexjax.extents import reads_direct
from flexjax.memory.buffers import page_aligned
from flexjax.store_format import chunk_path


class Way(NamedTuple):
    """A way to keep a disk busy."""

    request_bytes: int
    depth: int  # requests under way at once


# The best of these counts.
WAYS = (Way(1 << 20, 4), Way(4 << 20, 2), Way(4 << 20, 4), Way(4 << 20, 8))
READ_BYTES = 2 << 30  # in all, or the whole store if it is smaller
LEAST_WRITE_BYTES, MOST_WRITE_BYTES = 64 << 20, 256 << 20  # in each way


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


class _Request(NamedTuple):
    """A request of a way's size, or of what the file has left."""

    file: int
    offset: int


_Call = Callable[[int, list[np.ndarray], int], int]


def measure_read(
    store: WeightStore, tensors: Sequence[str], most_bytes: int = READ_BYTES
) -> DiskRate:
    """Reads the chunk files of `tensors`, in turns over the ways.

    A file is read once where there are enough of them.
    """
    paths = _spread(list(store_files(store, tensors)), most_bytes)

    def read(turn: int, way: Way) -> tuple[int, float]:
        some = paths[turn :: len(WAYS)] or paths
        return _read(some, way, direct=store.direct_io)

    return _best(read, direct=store.direct_io)


def read_once(
    store: WeightStore, tensors: Sequence[str], way: Way, num_bytes: int, turn: int
) -> DiskRate:
    """Reads about `num_bytes` of the larger chunk files of `tensors` in one way.

    Args:
        store, tensors: what to read from.
        way: how.
        num_bytes: how much.
        turn: each reads other files, until all were read.
    """
    sizes = {path: path.stat().st_size for path in store_files(store, tensors)}
    large = [path for path in sizes if sizes[path] >= way.request_bytes] or [*sizes]
    mean_bytes = statistics.mean(sizes[path] for path in large)
    many = min(len(large), max(1, round(num_bytes / mean_bytes)))
    some = [large[(turn * many + index) % len(large)] for index in range(many)]
    moved, seconds = _read(some, way, direct=store.direct_io)
    return DiskRate(
        bytes_per_s=moved / seconds, way=way, direct=store.direct_io, num_bytes=moved
    )


def store_files(store: WeightStore, tensors: Sequence[str]) -> Iterator[pathlib.Path]:
    """The files that hold `tensors`."""
    for name in tensors:
        entry = store.tensors[name]
        for index in range(entry.num_chunks):
            yield chunk_path(store.folder, name, entry, index)


def measure_write(folder: pathlib.Path, num_bytes: int) -> DiskRate:
    """Writes over a file below `folder`, in each way.

    The file is there already, as most of a run's spill files are when it writes them,
    and nothing waits for the disk's own cache: a run does not either.

    Args:
        folder: on the disk.
        num_bytes: what the run spills; a way writes a share of it, within limits.
    """
    share_bytes = num_bytes // len(WAYS)
    share_bytes = min(max(share_bytes, LEAST_WRITE_BYTES), MOST_WRITE_BYTES)
    with tempfile.TemporaryDirectory(prefix="flexjax-limit-", dir=folder) as scratch:
        path = pathlib.Path(scratch, "data")
        path.write_bytes(bytes(1 << 20))
        direct = reads_direct(path)
        flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        file = os.open(path, flags)

        def write(turn: int, way: Way) -> tuple[int, float]:
            requests = list(_requests(file, share_bytes, way))
            if turn == 0:
                _timed(os.pwritev, requests, way)  # the disk finds room
            return _timed(os.pwritev, requests, way)

        try:
            return _best(write, direct=direct)
        finally:
            os.close(file)


def _read(
    paths: Sequence[pathlib.Path], way: Way, *, direct: bool
) -> tuple[int, float]:
    """Bytes of whole files, and the seconds that they took."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    with contextlib.ExitStack() as stack:
        requests: list[_Request] = []
        for path in paths:
            file = os.open(path, flags)
            stack.callback(os.close, file)
            requests += _requests(file, path.stat().st_size, way)
        return _timed(os.preadv, requests, way)


def _best(move: Callable[[int, Way], tuple[int, float]], *, direct: bool) -> DiskRate:
    """Runs `move` in each way; it returns the bytes that it moved, and the seconds."""
    rates, num_bytes = {}, 0
    for turn, way in enumerate(WAYS):
        moved, seconds = move(turn, way)
        rates[way] = moved / seconds
        num_bytes += moved
    way = max(rates, key=lambda way: rates[way])
    return DiskRate(bytes_per_s=rates[way], way=way, direct=direct, num_bytes=num_bytes)


def _spread(paths: list[pathlib.Path], most_bytes: int) -> list[pathlib.Path]:
    """Files of about `most_bytes`, taken evenly from all of them."""
    total_bytes = sum(path.stat().st_size for path in paths)
    return paths[:: max(1, total_bytes // most_bytes)]


def _requests(file: int, nbytes: int, way: Way) -> Iterator[_Request]:
    for offset in range(0, nbytes, way.request_bytes):
        yield _Request(file, offset)


def _timed(call: _Call, requests: Sequence[_Request], way: Way) -> tuple[int, float]:
    """Bytes that the requests moved, and the seconds; buffers are ready by then."""
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    random = np.random.default_rng(0)  # some disks are quick with zeros
    for _ in range(way.depth):
        buffer = page_aligned(way.request_bytes)
        buffer[:] = np.frombuffer(random.bytes(way.request_bytes), np.uint8)
        buffers.put(buffer)

    def move(request: _Request) -> int:
        buffer = buffers.get()
        try:
            return call(request.file, [buffer], request.offset)
        finally:
            buffers.put(buffer)

    with ThreadPoolExecutor(way.depth) as pool:
        list(pool.map(lambda _: None, itertools.repeat(None, way.depth)))
        begun_s = time.perf_counter()
        moved = sum(pool.map(move, requests))
        return moved, time.perf_counter() - begun_s
