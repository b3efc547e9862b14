"""Group-wise quantization: 4 or 8 bits an element, a scale and a minimum a group.

Groups lie along the last axis, so that every other axis may be cut anywhere. What was
quantized is an array of bytes that has the same axes but for the last one, which holds
the codes, then the scales of the groups, then their minima. Of 4-bit codes a byte holds
two, one of the first half of the axis and one of the second: so long runs of neighbours
come out of long runs of bytes.

This is FlexGen's scheme (arXiv 2303.06865, section 5: asymmetric, groups of 64), with
scales and minima in the type of what was quantized. So a minimum is exact, and with it
every group of equal elements; and a scale is rounded up, so that no element is farther
than half a step from its code.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (gives numpy the type bfloat16)
import numpy as np
from jaxtyping import Array, Float, UInt8

from flexjax.models.config import OPTConfig
from flexjax.policy import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How an array is quantized.

    Attributes:
        bits: of an element, 4 or 8.
        group_size: elements that share a scale and a minimum.
        dtype: name of the type of what was quantized, and of scales and minima.
    """

    bits: int
    group_size: int
    dtype: str

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def itemsize(self) -> int:
        """Bytes of a scale, of a minimum, and of an element before and after."""
        return np.dtype(self.dtype).itemsize

    def code_bytes(self, size: int) -> int:
        """Bytes of the codes of `size` elements."""
        return size * self.bits // 8

    def width(self, size: int) -> int:
        """Bytes that `size` elements of the last axis become.

        Raises:
            ValueError: they are not so many groups, each of whole bytes.
        """
        if size % self.group_size or self.group_size * self.bits % 8:
            fitting = fitting_group(size, self.group_size, self.bits)
            fitting = fitting or fitting_group(size, size, self.bits)
            advice = "which no group does: do not quantize them"
            if fitting is not None:
                advice = f"give one that does, such as {fitting}"
            raise ValueError(
                f"a group_size of {self.group_size} does not divide {size} elements "
                f"into groups of whole bytes; {advice}"
            )
        return self.code_bytes(size) + 2 * size // self.group_size * self.itemsize

    def size(self, width: int) -> int:
        """Elements that `width` bytes of the last axis were: the inverse of `width`."""
        group_bytes = self.code_bytes(self.group_size) + 2 * self.itemsize
        return width // group_bytes * self.group_size


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data",),
    meta_fields=("quantization", "activation_bits"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A quantized array that says how it is quantized.

    Attributes:
        data: what `quantize` made.
        quantization: how.
        activation_bits: see `Policy`.
    """

    data: UInt8[Array, "... width"]
    quantization: Quantization
    activation_bits: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        return wide_shape(self.data.shape, self.quantization)


def fitting_group(size: int, group_size: int, bits: int) -> int | None:
    """The largest group, up to `group_size`, that divides `size` and has whole bytes.

    Heads of 80 elements have groups of 40 where 64 are wanted: a group never holds
    padding, and never parts of two heads. None where there is no such group.
    """
    groups = range(min(size, group_size), 0, -1)
    return next((n for n in groups if size % n == 0 and n * bits % 8 == 0), None)


def cache_quantization(
    policy: Policy, config: OPTConfig, dtype: np.dtype
) -> Quantization | None:
    """How keys and values of `dtype` are kept: a head's elements in whole groups.

    Raises:
        ValueError: these are none of whole bytes.
    """
    bits = policy.kv_cache_bits
    if bits is None:
        return None
    group = fitting_group(config.head_dim, policy.group_size, bits)
    if group is None:
        raise ValueError(
            f"kv_cache_bits={bits} cannot be had: heads of {config.head_dim} elements "
            f"have no groups of whole bytes, of up to group_size={policy.group_size}; "
            "give another group_size, or leave kv_cache_bits out"
        )
    return Quantization(bits=bits, group_size=group, dtype=dtype.name)


def cache_slot_bytes(
    config: OPTConfig, dtype: np.dtype, cache_as: Quantization | None
) -> int:
    """Key and value of one token of one row in one layer, as they are kept."""
    head_bytes = config.head_dim * dtype.itemsize
    if cache_as is not None:
        head_bytes = cache_as.width(config.head_dim)
    return 2 * config.num_attention_heads * head_bytes


def quantize(
    array: Float[Array, "... size"], quantization: Quantization
) -> UInt8[Array, "... width"]:
    """The bytes of `array`, whose elements are finite and of `quantization`'s type.

    Where those of a group are farther apart than the largest float, what is found of
    the larger ones is infinite.

    An element is at most half a scale from what `dequantize` makes of it, before that
    is rounded to its type.

    Raises:
        ValueError: see `Quantization.width`.
    """
    size, group = array.shape[-1], quantization.group_size
    quantization.width(size)
    groups = array.astype(jnp.float32).reshape(*array.shape[:-1], size // group, group)
    low, high = jnp.min(groups, axis=-1), jnp.max(groups, axis=-1)
    span, levels = high - low, quantization.levels
    # A span may be more than a float can hold, but no step is.
    step = jnp.where(jnp.isfinite(span), span / levels, high / levels - low / levels)
    scale = _rounded_up(step, jnp.dtype(quantization.dtype))
    minimum = low.astype(quantization.dtype)
    divisor = scale.astype(jnp.float32)[..., None]
    codes = (groups - low[..., None]) / jnp.where(divisor > 0, divisor, 1.0)
    codes = jnp.clip(jnp.round(codes), 0, quantization.levels).astype(jnp.uint8)
    codes = codes.reshape(*array.shape[:-1], size)
    if quantization.bits == 4:
        first, second = codes[..., : size // 2], codes[..., size // 2 :]
        codes = first | (second << 4)
    return jnp.concatenate([codes, _bytes(scale), _bytes(minimum)], axis=-1)


def dequantize(
    data: UInt8[Array, "... width"], quantization: Quantization
) -> Float[Array, "... size"]:
    """What `quantize` made the bytes of, to within half a scale."""
    *lead, width = data.shape
    size, group = quantization.size(width), quantization.group_size
    scales = quantization.code_bytes(size)  # where they begin
    minima = scales + size // group * quantization.itemsize
    codes, halves = data[..., :scales], 8 // quantization.bits
    # What shares a scale within a half: a group of a narrow array lies in both.
    run = math.gcd(group, size // halves)

    def by_half(values: Float[Array, "... groups"]) -> Float[Array, "..."]:
        by_run = jnp.repeat(values, group // run, axis=-1)
        return by_run.reshape(*lead, halves, -1, 1)

    scale = by_half(_floats(data[..., scales:minima], quantization))
    minimum = by_half(_floats(data[..., minima:], quantization))

    def wide(half: int) -> Float[Array, "... runs run"]:
        found = codes if halves == 1 else codes & 15 if half == 0 else codes >> 4
        found = found.reshape(*lead, -1, run).astype(jnp.float32)
        found = found * scale[..., half, :, :] + minimum[..., half, :, :]
        return found.astype(quantization.dtype)

    # XLA's CPU backend stacks at 14 GB/s of bfloat16 what it shifts by an array at 2.
    found = jnp.stack([wide(half) for half in range(halves)], axis=-3)
    return found.reshape(*lead, size)


def passed_through(
    array: Float[Array, "..."], quantization: Quantization | None
) -> Float[Array, "..."]:
    """What is found again of an array that was kept so."""
    if quantization is None:
        return array
    return dequantize(quantize(array, quantization), quantization)


@functools.partial(
    jax.jit, static_argnames="quantizations", donate_argnames="outs", keep_unused=True
)
def dequantize_into(
    outs: list[Array], data: list[Array], *, quantizations: tuple[Quantization, ...]
) -> list[Array]:
    """`dequantize` of several arrays, each in the memory of one of `outs`.

    On 2 cores of a CPU the page faults of a new result cost more than the work: 3 GB/s
    of bfloat16, for 14 to 22 where memory is used again.
    """
    del outs
    return [dequantize(*one) for one in zip(data, quantizations, strict=True)]


def _rounded_up(values: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Numbers of at least 0 in `dtype`, none of them smaller than it was."""
    rounded = values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(rounded, _UINT[dtype.itemsize])
    # Floats above 0 are in the order of their bits.
    next_up = jax.lax.bitcast_convert_type(bits + 1, dtype)
    return jnp.where(rounded.astype(jnp.float32) < values, next_up, rounded)


_UINT = {2: jnp.uint16, 4: jnp.uint32}


def _bytes(values: Float[Array, "... groups"]) -> UInt8[Array, "... width"]:
    found = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return found.reshape(*values.shape[:-1], -1)


def _floats(
    data: UInt8[Array, "... width"], quantization: Quantization
) -> Float[Array, "... groups"]:
    itemsize, uint = quantization.itemsize, _UINT[quantization.itemsize]
    parts = data.reshape(*data.shape[:-1], data.shape[-1] // itemsize, itemsize)
    # Little-endian. Put together by shifts, which a CPU does twice as fast as XLA's
    # own change from four or two bytes to one number.
    bits = parts[..., 0].astype(uint)
    for byte in range(1, itemsize):
        bits |= parts[..., byte].astype(uint) << 8 * byte
    values = jax.lax.bitcast_convert_type(bits, jnp.dtype(quantization.dtype))
    return values.astype(jnp.float32)


def wide_shape(shape: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    """The shape of what bytes of `shape` stand for."""
    return (*shape[:-1], quantization.size(shape[-1]))
