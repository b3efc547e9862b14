"""Page-aligned host memory, and a pool that uses it again and again."""

import mmap
import threading
from collections import defaultdict

import ml_dtypes  # noqa: F401  (gives numpy the type bfloat16)
import numpy as np

from flexjax.memory.ledger import Ledger
from flexjax.policy import Kind, Tier

_HUGE_PAGE_BYTES = 2 << 20


def page_aligned(nbytes: int) -> np.ndarray:
    """Fresh host memory of `nbytes` bytes that begins at a page.

    Aligned memory is what direct I/O needs, and what a CPU backend takes over without a
    copy. Large pieces ask for huge pages, which saves most of the page faults.

    Raises:
        MemoryError: the machine has no more memory.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1))
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
    """Stage buffers that are allocated once and lent again.

    Buffers that nobody uses are given back to the system where that keeps the pool
    within the largest number of bytes that were ever lent at once; so a pool never
    holds more than its users needed at their worst moment.
    """

    def __init__(self, ledger: Ledger, tier: Tier, kind: Kind) -> None:
        self._ledger, self._tier, self._kind = ledger, tier, kind
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._lent_bytes = self._most_lent_bytes = self._free_bytes = 0

    def take(self, nbytes: int) -> np.ndarray:
        """A page-aligned buffer of `nbytes`; its content is arbitrary."""
        with self._lock:
            self._lent_bytes += nbytes
            self._most_lent_bytes = max(self._most_lent_bytes, self._lent_bytes)
            if self._free[nbytes]:
                self._free_bytes -= nbytes
                return self._free[nbytes].pop()
            self._shrink()
        try:
            buffer = page_aligned(nbytes)
        except MemoryError:
            with self._lock:
                self._lent_bytes -= nbytes
            raise
        self._ledger.hold(self._tier, self._kind, nbytes)
        return buffer

    def give(self, buffer: np.ndarray) -> None:
        """Takes a buffer back; nobody may look at it any more."""
        with self._lock:
            self._lent_bytes -= buffer.nbytes
            self._free[buffer.nbytes].append(buffer)
            self._free_bytes += buffer.nbytes

    def clear(self) -> None:
        """Gives all buffers that are not lent back to the system."""
        with self._lock:
            self._most_lent_bytes = self._lent_bytes
            self._shrink()

    def _shrink(self) -> None:
        for nbytes, buffers in self._free.items():
            while buffers and self._exceeds():
                buffers.pop()
                self._free_bytes -= nbytes
                self._ledger.hold(self._tier, self._kind, -nbytes)

    def _exceeds(self) -> bool:
        return self._lent_bytes + self._free_bytes > self._most_lent_bytes
