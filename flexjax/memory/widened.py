"""Quantized arrays made wide on the device, in memory that is used again."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Loan
from flexjax.memory.pool import ReusePool
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization, dequantize_into, wide_shape


class _Wide(NamedTuple):
    """What an array is like that layers use."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class WidenedArrays:
    """Makes the arrays that layers use of quantized ones.

    What is given back is written over by the next array of its shape.
    """

    def __init__(self, link: DeviceLink, ledger: Ledger, kind: Kind) -> None:
        def make(wide: _Wide) -> jax.Array:
            return jax.device_put(jnp.zeros(wide.shape, wide.dtype), link.device)

        self._pool = ReusePool[_Wide, jax.Array](
            ledger, Tier.DEVICE, kind, make=make, nbytes=lambda wide: wide.nbytes
        )
        self._waits = link.is_shared

    def lend_all(self, narrow: Sequence[tuple[Loan, Quantization]]) -> list[Loan]:
        """What the bytes of some loans stand for; releasing it releases them too.

        All in one call: each takes Python as long as the link takes for megabytes.
        Waits for it where the processor that waits is the one that works: so its time
        is the lane's. Elsewhere the device does it when its turn comes.
        """
        wide: list[_Wide] = []
        outs: list[jax.Array] = []
        try:
            for loan, how in narrow:
                one = _Wide(wide_shape(loan.array.shape, how), how.dtype)
                outs.append(self._pool.lend(one))
                wide.append(one)
            # They are in the same memory, which is nobody else's from now on.
            arrays = dequantize_into(
                outs,
                [loan.array for loan, _ in narrow],
                quantizations=tuple(how for _, how in narrow),
            )
            if self._waits:
                jax.block_until_ready(arrays)
        except BaseException:
            for one in wide:
                self._pool.drop(one)  # it may have been donated already
            raise

        def release(one: _Wide, array: jax.Array, loan: Loan) -> None:
            self._pool.take_back(one, array)
            loan.release()

        return [
            Loan(array, functools.partial(release, one, array, loan))
            for one, array, (loan, _) in zip(wide, arrays, narrow, strict=True)
        ]

    def clear(self) -> None:
        """Gives back what is not lent."""
        self._pool.clear()
