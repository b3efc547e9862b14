"""One array of the disk tier: its file, the stripes in it, and the tail."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flexjax.extents import BLOCK_BYTES
from flexjax.memory.buffers import typed


class Stripe(NamedTuple):
    """Slots `first` to `first + slots - 1`, at `offset` of the file."""

    first: int
    slots: int
    offset: int


class Passage(NamedTuple):
    """Some rows of a stripe, and the buffer through which they pass."""

    stripe: Stripe
    rows: slice
    buffer: np.ndarray


@dataclasses.dataclass(kw_only=True)
class SpilledArray:
    """One array: its file, and the slots that are not in it yet."""

    path: pathlib.Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype
    stripes: list[Stripe] = dataclasses.field(default_factory=list)
    used: int = 0  # slots in all
    tail: np.ndarray | None = None  # [rows, groups, tail slots, width]

    @property
    def slot_bytes(self) -> int:
        rows, groups, _, width = self.shape
        return rows * groups * width * self.dtype.itemsize

    @property
    def flushed(self) -> int:
        """Slots on disk."""
        return sum(stripe.slots for stripe in self.stripes)

    def next_stripe(self, slots: int) -> Stripe:
        """A stripe behind the last one; it begins at a block, for direct I/O."""
        last = self.stripes[-1] if self.stripes else Stripe(0, 0, 0)
        end = last.offset + last.slots * self.slot_bytes
        offset = -(-end // BLOCK_BYTES) * BLOCK_BYTES
        return Stripe(last.first + last.slots, slots, offset)

    def row_bytes(self, slots: int) -> int:
        """Bytes of one row of a stripe."""
        return self.slot_bytes // self.shape[0] * slots

    def cut(self, stripe: Stripe, most_bytes: int) -> Iterator[tuple[slice, int]]:
        """Rows of `most_bytes` or, where one is larger, of one row; and their bytes."""
        row_bytes = self.row_bytes(stripe.slots)
        step = max(1, most_bytes // row_bytes)
        for first in range(0, self.shape[0], step):
            rows = slice(first, min(first + step, self.shape[0]))
            yield rows, (rows.stop - rows.start) * row_bytes

    def view(self, passage: Passage) -> np.ndarray:
        """The buffer of a passage as `[rows, groups, slots, width]`."""
        rows, groups, width = passage.rows, self.shape[1], self.shape[3]
        shape = (rows.stop - rows.start, groups, passage.stripe.slots, width)
        return typed(passage.buffer, shape, self.dtype)
