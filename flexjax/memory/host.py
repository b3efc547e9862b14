"""The host tier: arrays in page-aligned host memory."""

import functools
import threading
from collections.abc import Callable, Hashable

import jax
import numpy as np

from flexjax.memory.buffers import BufferPool, typed
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Lender, Loan
from flexjax.memory.tier import Pieces, grown_shape
from flexjax.policy import Kind, Tier


class HostStore:
    """Holds arrays in host memory, and uploads them to be used.

    On a CPU an upload is a look at the same memory. That is safe although later stores
    write into it: what they write comes out of the computation that was looking.
    """

    tier = Tier.HOST

    def __init__(
        self,
        ledger: Ledger,
        kind: Kind,
        link: DeviceLink,
        lender: Lender | None = None,
    ) -> None:
        self._kind, self._link, self._lender = kind, link, lender or link
        self._pool = BufferPool(ledger, self.tier, kind, self._lender.host_memory)
        self._arrays: dict[Hashable, np.ndarray] = {}
        self._lock = threading.Lock()

    def store(
        self, key: Hashable, value: jax.Array, rows: slice, *, at: int, slots: int
    ) -> None:
        part = self._link.download(value, rows)
        with self._lock:
            array = self._arrays.get(key)
        if at == 0 and array is not None and array.shape != grown_shape(part, slots):
            self.free(key)
            array = None
        if array is None:
            assert at == 0, f"{key} was never begun"
            array = self._allocate(grown_shape(part, slots), part.dtype)
            array[:, :, part.shape[2] :] = 0
        elif array.shape[2] < slots:
            array = self._grow(array, at, slots)
        array[:, :, at : at + part.shape[2]] = part
        with self._lock:
            self._arrays[key] = array

    def load(self, key: Hashable) -> Callable[[], Pieces]:
        with self._lock:
            array = self._arrays[key]
        return lambda: (self._lender.lend(array, self._kind),)

    def gather(self, key: Hashable, slots: np.ndarray) -> Loan:
        with self._lock:
            array = self._arrays[key]
        rows, groups, room, width = array.shape
        begins = np.arange(rows * groups, dtype=np.int64).reshape(rows, groups, 1)
        chosen = self._allocate((*slots.shape, width), array.dtype)
        # A slot lies in one piece: taking it is a copy of its bytes.
        np.take(
            array.reshape(rows * groups * room, width),
            begins * room + slots,
            axis=0,
            out=chosen,
            mode="clip",  # any other would copy `out` too
        )
        give = functools.partial(self._pool.give, _memory(chosen))
        return self._lender.lend(chosen, self._kind, give)

    def free(self, key: Hashable) -> None:
        with self._lock:
            array = self._arrays.pop(key, None)
        if array is not None:
            self._pool.give(_memory(array))

    def clear(self) -> None:
        self._pool.clear()

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return typed(self._pool.take(nbytes), shape, dtype)

    def _grow(self, old: np.ndarray, used: int, slots: int) -> np.ndarray:
        array = self._allocate(grown_shape(old, slots), old.dtype)
        array[:, :, :used] = old[:, :, :used]
        array[:, :, used:] = 0
        self._pool.give(_memory(old))
        return array


def _memory(array: np.ndarray) -> np.ndarray:
    """The bytes that `array` was made of by `typed`."""
    return array.reshape(-1).view(np.uint8)
