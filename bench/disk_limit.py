"""What the disk can do: raw reads and writes past the page cache, several at a time."""

import dataclasses
import itertools
import os
import pathlib
import queue
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

    path: pathlib.Path
    offset: int


_Call = Callable[[int, list[np.ndarray], int], int]


def measure_read(
    store: WeightStore, tensors: Sequence[str], most_bytes: int = READ_BYTES
) -> DiskRate:
    """Reads the chunk files of `tensors`, in turns over the ways.

    A file is read once where there are enough of them.
    """
    paths = _spread(list(store_files(store, tensors)), most_bytes)

    def read(turn: int, way: Way) -> DiskRate:
        some = paths[turn :: len(WAYS)] or paths
        return read_files(some, way, direct=store.direct_io)

    return _best(read)


def read_files(paths: Sequence[pathlib.Path], way: Way, *, direct: bool) -> DiskRate:
    """Reads whole files, one after the other, in one way."""
    requests = [
        request
        for path in paths
        for request in _requests(path, path.stat().st_size, way)
    ]
    return _timed(os.preadv, os.O_RDONLY, requests, way, direct=direct)


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

        def write(turn: int, way: Way) -> DiskRate:
            requests = list(_requests(path, share_bytes, way))
            if turn == 0:  # the disk finds room
                _timed(os.pwritev, os.O_WRONLY, requests, way, direct=direct)
            return _timed(os.pwritev, os.O_WRONLY, requests, way, direct=direct)

        return _best(write)


def _best(move: Callable[[int, Way], DiskRate]) -> DiskRate:
    """The best of what `move` measures in each way; its bytes are those of all."""
    rates = [move(turn, way) for turn, way in enumerate(WAYS)]
    best = max(rates, key=lambda rate: rate.bytes_per_s)
    num_bytes = sum(rate.num_bytes for rate in rates)
    return dataclasses.replace(best, num_bytes=num_bytes)


def _spread(paths: list[pathlib.Path], most_bytes: int) -> list[pathlib.Path]:
    """Files of about `most_bytes`, taken evenly from all of them."""
    total_bytes = sum(path.stat().st_size for path in paths)
    return paths[:: max(1, total_bytes // most_bytes)]


def _requests(path: pathlib.Path, nbytes: int, way: Way) -> Iterator[_Request]:
    for offset in range(0, nbytes, way.request_bytes):
        yield _Request(path, offset)


def _timed(
    call: _Call, flags: int, requests: Sequence[_Request], way: Way, *, direct: bool
) -> DiskRate:
    """Moves the requests; buffers are ready by the time that counts."""
    buffers: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    random = np.random.default_rng(0)  # some disks are quick with zeros
    for _ in range(way.depth):
        buffer = page_aligned(way.request_bytes)
        buffer[:] = np.frombuffer(random.bytes(way.request_bytes), np.uint8)
        buffers.put(buffer)

    def move(request: _Request) -> int:
        buffer = buffers.get()
        file = os.open(request.path, flags | (os.O_DIRECT if direct else 0))
        try:
            return call(file, [buffer], request.offset)
        finally:
            os.close(file)
            buffers.put(buffer)

    with ThreadPoolExecutor(way.depth) as pool:
        list(pool.map(lambda _: None, itertools.repeat(None, way.depth)))
        begun_s = time.perf_counter()
        moved = sum(pool.map(move, requests))
        seconds = time.perf_counter() - begun_s
    return DiskRate(
        bytes_per_s=moved / seconds, way=way, direct=direct, num_bytes=moved
    )
