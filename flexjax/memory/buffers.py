"""Page-aligned host memory, and a pool that uses it again and again."""

import mmap
from collections.abc import Callable

import ml_dtypes  # noqa: F401  (gives numpy the type bfloat16)
import numpy as np

from flexjax.memory.ledger import Ledger
from flexjax.memory.pool import ReusePool
from flexjax.policy import Kind, Tier

_HUGE_PAGE_BYTES = 2 << 20


def page_aligned(nbytes: int) -> np.ndarray:
    """Fresh host memory of `nbytes` bytes that begins at a page.

    Aligned memory is what direct I/O needs, and what a CPU backend takes over without a
    copy. Large pieces ask for huge pages, which saves most of the page faults, and lets
    a disk take a request whole: from single pages, which lie anywhere, Linux cuts one
    of 4 MiB into four to seven, and a virtual disk read 1.2 GB/s instead of 2.5.

    Raises:
        MemoryError: the machine has no more memory.
    """
    try:
        # Private: shared memory, which is Python's default, gets no huge pages.
        memory = mmap.mmap(
            -1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise MemoryError(
            f"the host has no {nbytes} bytes of memory left: {error.strerror}"
        ) from error
    if nbytes >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


def typed(buffer: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The bytes of `buffer` as an array."""
    return buffer.view(dtype).reshape(shape)


class BufferPool:
    """Stage buffers that are allocated once and lent again, see `ReusePool`.

    Args of the constructor:
        ledger, tier, kind: where the bytes are counted.
        make: gives a new buffer of so many bytes; `page_aligned`, if None.
    """

    def __init__(
        self,
        ledger: Ledger,
        tier: Tier,
        kind: Kind,
        make: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self._pool = ReusePool[int, np.ndarray](
            ledger,
            tier,
            kind,
            make=make or (lambda nbytes: page_aligned(nbytes)),
            nbytes=lambda nbytes: nbytes,
        )
        self._whole: dict[int, np.ndarray] = {}  # what is lent, by its address

    def take(self, nbytes: int, *, most_bytes: int = 0) -> np.ndarray:
        """A page-aligned buffer of `nbytes`; its content is arbitrary.

        It is part of a free one of up to `most_bytes`, where that saves making one: the
        system has to find and to clear the pages of a new one.

        Raises:
            MemoryError: the machine has no more memory.
        """
        whole = self._pool.lend(nbytes, lambda free: nbytes <= free <= most_bytes)
        self._whole[_address(whole)] = whole
        return whole[:nbytes]

    def give(self, buffer: np.ndarray) -> None:
        """Takes a buffer back; nobody may look at it any more."""
        whole = self._whole.pop(_address(buffer))
        self._pool.take_back(whole.nbytes, whole)

    def clear(self) -> None:
        """Gives all buffers that are not lent back to the system."""
        self._pool.clear()


def _address(buffer: np.ndarray) -> int:
    return buffer.__array_interface__["data"][0]
