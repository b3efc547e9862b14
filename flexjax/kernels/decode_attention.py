"""Attention of new tokens to a cache, on a CPU by a kernel.

On 2 cores of a Xeon with AVX-512 (no AMX) it reads 268 MB of bfloat16 at 25 GB/s, where
XLA reads 13 and memory gives 29; and the same elements in 4 bits in an eighth of the
time that XLA takes, which makes them wide first (`bench.kernels`, OPT-6.7B). Compiled
for AVX2 it reads 24 GB/s there, and 4 bits take a third of XLA's time.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from flexjax.attention import Partial, scaled
from flexjax.kernels.compiled import AVX2, AVX512, Kernel
from flexjax.quant import Quantization

_TARGET = "flexjax_decode_attention"
DECODE_ATTENTION = Kernel(
    pathlib.Path(__file__).with_suffix(".cc"),
    (_TARGET,),
    compiled_for=(AVX512, AVX2),
    without="new tokens attend to a cache by XLA alone, which is slower",
)
LANES = 16  # elements that the kernel reads at once
MOST_HEAD_DIM = 128
DTYPES = ("bfloat16", "float16", "float32")


def is_attended(dtype: np.dtype, head_dim: int, cache_as: Quantization | None) -> bool:
    """Whether the kernel takes queries of `dtype` to a cache that is kept so."""
    if head_dim not in range(LANES, MOST_HEAD_DIM + 1, LANES):
        return False
    if cache_as is None:
        return dtype.name in DTYPES
    halves = 8 // cache_as.bits  # of 4-bit codes
    return (
        dtype.name == cache_as.dtype == "bfloat16"
        and cache_as.group_size % LANES == head_dim % cache_as.group_size == 0
        and head_dim % (halves * LANES) == 0
    )


def attend_to_cache(
    query: Float[Array, "rows heads 1 head_dim"],
    new: tuple[Float[Array, "rows heads 1 head_dim"], ...],
    past: tuple[tuple[Shaped[Array, "rows heads _slots _width"], ...], ...],
    start: Int[Array, " rows"],
    length: Int[Array, ""],
    found: Partial | None,
    cache_as: Quantization | None,
) -> Float[Array, "rows heads 1 head_dim"]:
    """What `decode_attention` gives, but for rounding.

    Sums are in another order, and shares stay in float32 until values are added up,
    where `decode_attention` rounds them to the values' type.

    Args:
        query, new, start, length, found: see `decode_attention`.
        past: as the cache keeps it; nothing is read of slots that a row may not see.
        cache_as: how that is quantized, such that `is_attended`.
    """
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(query.shape, query.dtype))
    keys, values = past
    nothing = jnp.zeros((0,), jnp.float32)
    return call(
        scaled(query),
        *new,
        start.astype(jnp.int32),
        length.astype(jnp.int32),
        *([nothing] * 3 if found is None else found),
        *keys,
        *values,
        bits=np.int64(0 if cache_as is None else cache_as.bits),
        group_size=np.int64(1 if cache_as is None else cache_as.group_size),
    )
