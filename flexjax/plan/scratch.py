"""What the disk of a folder can do, by a file that is moved as a run moves its own."""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

import numpy as np

from flexjax.checkpoint import WeightStore
from flexjax.extents import Extent, read_extent, reads_direct, write_extent
from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.disk_queue import DiskQueue, Urgency
from flexjax.memory.lanes import Timeline
from flexjax.memory.spill import SpillFolder
from flexjax.safe_files import ensure_space

SCRATCH_BYTES = 8 << 30  # half of what is free where that is less
# Of a file, as large as a chunk of a weight store, and of all memory. Many files take
# longer to read than one: 3.5 GB/s for 3.9 on a virtual disk.
PART_BYTES, BUFFER_BYTES = 8 << 20, 256 << 20
PARTS_AHEAD = 16  # so that the queue never runs dry
STORE_S, STORE_TENSORS_AHEAD = 3.0, 4
FILL_S = 5.0  # a slow disk gets a smaller file


class Scratch:
    """Files on the disk that is measured; what goes wrong is an OSError."""

    def __init__(self, path: pathlib.Path, queue: DiskQueue) -> None:
        self._path, self._queue = path, queue
        free = shutil.disk_usage(path.parent).free
        firsts = range(0, min(SCRATCH_BYTES, free // 2), PART_BYTES)
        memory = page_aligned(BUFFER_BYTES)
        # Some disks are quick with zeros.
        random = np.random.default_rng(0).bytes(BUFFER_BYTES)
        memory[:] = np.frombuffer(random, np.uint8)
        pieces = itertools.cycle(memory.reshape(-1, PART_BYTES))
        self._parts = [
            Extent(path.with_name(f"{path.name}-{first}"), 0, next(pieces))
            for first in firsts
        ]

    def fill(self) -> None:
        """Makes the files, so that later writes need no new room on the disk."""
        nbytes, _ = self._move(write_extent, self._parts, limit_s=FILL_S)
        self._parts = self._parts[: nbytes // PART_BYTES]

    def write_rate(self) -> float:
        """Bytes per second; a disk's own cache may take them, as it does in a run."""
        nbytes, seconds = self._move(write_extent, self._parts)
        with self._described():
            is_direct = reads_direct(self._parts[0].path)
        if not is_direct:  # then memory has taken them
            seconds += self._settle_s()
        return nbytes / seconds

    def read_rate(self) -> float:
        """Bytes per second of reading all once.

        A second time, what is behind a virtual disk may have kept it.
        """
        self._settle_s()
        nbytes, seconds = self._move(read_extent, self._parts)
        return nbytes / seconds

    def reading_rate(self, limit_s: float) -> float:
        """Bytes per second of reading over and over for so long."""
        parts = itertools.cycle(self._parts)
        nbytes, seconds = self._move(read_extent, parts, limit_s=limit_s)
        return nbytes / seconds

    def _move(
        self,
        move: Callable[[Extent], None],
        parts: Iterable[Extent],
        *,
        limit_s: float = math.inf,
    ) -> tuple[int, float]:
        """How many bytes went in how many seconds."""
        under_way: deque[Future[None]] = deque()
        nbytes, begun_s = 0, time.perf_counter()
        for part in parts:
            if nbytes and time.perf_counter() - begun_s >= limit_s:
                break
            if len(under_way) == PARTS_AHEAD:
                under_way.popleft().result()
            done = self._queue.submit(
                move,
                [part],
                name="calibration",
                urgency=Urgency.AHEAD,
                describe=self._describe,
            )
            under_way.append(done)
            nbytes += part.memory.nbytes
        for done in under_way:
            done.result()
        return nbytes, time.perf_counter() - begun_s

    def _settle_s(self) -> float:
        """Seconds until all is on the disk, and nowhere in the page cache."""
        begun_s = time.perf_counter()
        with self._described():
            for part in self._parts:
                _leave_cache(part.path)
        return time.perf_counter() - begun_s

    @contextlib.contextmanager
    def _described(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._describe(error) from error

    def _describe(self, error: OSError) -> OSError:
        offload_dir, reason = self._path.parents[1], error.strerror or error
        return OSError(
            f"the disk of {offload_dir} cannot be measured: {reason}; "
            "free some space or choose an offload_dir on another disk"
        )


def _leave_cache(path: pathlib.Path) -> None:
    """Brings a file to the disk, and out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def scratch_file(offload_dir: pathlib.Path) -> Iterator[Scratch]:
    """Filled scratch files, which go with their folder whatever happens.

    Raises:
        OSError: the folder cannot be written, or its disk is full.
    """
    try:
        folder = SpillFolder(offload_dir)
    except ValueError as error:
        raise OSError(str(error)) from error
    with (
        contextlib.closing(folder),
        contextlib.closing(DiskQueue(Timeline())) as queue,
    ):
        ensure_space(offload_dir, 2 * PART_BYTES)
        scratch = Scratch(folder.path / "scratch", queue)
        scratch.fill()
        yield scratch


def store_read_rate(store: WeightStore) -> float:
    """Bytes per second of a weight store's own files, read for about `STORE_S`.

    These lie where they lie, perhaps on another disk than what is spilled; and what was
    just written, as scratch files are, may be read faster than what was not.

    Raises:
        OSError: a file cannot be read.
    """
    names = sorted(store.tensors, key=lambda name: store.tensors[name].nbytes)
    large = names[-len(names) // 2 :]
    if not store.direct_io:  # a store that was just made may be in memory
        for name in large:
            try:
                for path in store.chunk_paths(name):
                    _leave_cache(path)
            except OSError as error:
                raise store.failure(name, error) from error
    most = max(store.tensors[name].nbytes for name in large)
    ring = [page_aligned(most) for _ in range(STORE_TENSORS_AHEAD)]
    under_way: deque[Future[None]] = deque()
    nbytes, begun_s = 0, time.perf_counter()
    with contextlib.closing(DiskQueue(Timeline())) as queue:
        for turn, name in enumerate(large):
            if len(under_way) == len(ring):
                under_way.popleft().result()
                if time.perf_counter() - begun_s > STORE_S:
                    break
            entry = store.tensors[name]
            out = typed(
                ring[turn % len(ring)][: entry.nbytes], entry.shape, entry.dtype
            )
            under_way.append(
                queue.submit(
                    read_extent,
                    store.extents(name, 0, entry.shape[0], out),
                    name=name,
                    urgency=Urgency.AHEAD,
                    describe=functools.partial(store.failure, name),
                )
            )
            nbytes += entry.nbytes
        for done in under_way:
            done.result()
    return nbytes / (time.perf_counter() - begun_s)
