"""Quantized arrays made wide on the device, in memory that is used again."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, Loan
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

    def __init__(self, device: Device, ledger: Ledger, kind: Kind) -> None:
        def make(wide: _Wide) -> jax.Array:
            return jax.device_put(jnp.zeros(wide.shape, wide.dtype), device)

        self._pool = ReusePool[_Wide, jax.Array](
            ledger, Tier.DEVICE, kind, make=make, nbytes=lambda wide: wide.nbytes
        )

    def lend(self, loan: Loan, quantization: Quantization) -> Loan:
        """What the bytes of `loan` stand for; releasing it releases them too."""
        wide = _Wide(wide_shape(loan.array.shape, quantization), quantization.dtype)
        out = self._pool.lend(wide)
        try:
            # It is in the same memory, which is nobody else's from now on.
            array = dequantize_into(out, loan.array, quantization=quantization)
        except BaseException:
            self._pool.drop(wide)  # it may have been donated already
            raise

        def release() -> None:
            self._pool.take_back(wide, array)
            loan.release()

        return Loan(array, release)

    def clear(self) -> None:
        """Gives back what is not lent."""
        self._pool.clear()
