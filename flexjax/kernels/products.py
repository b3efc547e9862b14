"""Products with quantized weights, which are made wide in the processor's caches.

On 2 cores of an AMD EPYC with AVX-512, 4-bit weights of 16384 x 4096 multiply
64 rows at 0.82 TFLOP/s and 2048 rows at 0.74; XLA does bfloat16 ones at 0.71 and 0.82,
once they are wide, which takes half as long as 64 rows do.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexjax.kernels import compiled
from flexjax.quant import Quantization, QuantizedArray

SOURCE = pathlib.Path(__file__).with_suffix(".cc")
_NAME = "flexjax_contract_quantized"
_STEP = 32  # elements that the kernel makes wide at once


@functools.cache
def can_multiply_quantized() -> bool:
    """Whether the kernel is there; compiles it the first time."""
    if not compiled.is_wanted():
        return False
    library = compiled.library(SOURCE)
    if library is None:
        return False
    handler = jax.ffi.pycapsule(getattr(library, _NAME))
    jax.ffi.register_ffi_target(_NAME, handler, platform="cpu")
    return True


def is_multiplied(quantization: Quantization, inputs: int) -> bool:
    """Whether the kernel takes weights that are quantized so, `[outputs, inputs]`."""
    halves = 8 // quantization.bits  # of 4-bit codes: no group lies in both
    return (
        quantization.dtype == "bfloat16"
        and quantization.group_size % _STEP == 0
        and inputs % (halves * quantization.group_size) == 0
    )


def contract_quantized(
    x: Float[Array, "rows inputs"], weight: QuantizedArray
) -> Float[Array, "rows outputs"]:
    """`x @ weight.T` in bfloat16, accumulated in float32.

    The weights are what `dequantize` makes of them; only the order of summation is the
    kernel's own.

    Raises:
        ValueError: the kernel is not there, or is not for such weights; or they are for
            other inputs.
    """
    how = weight.quantization
    if not (can_multiply_quantized() and is_multiplied(how, x.shape[1])):
        raise ValueError(f"no kernel multiplies with weights of {how} on this machine")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"x is {x.shape}, but the weights are {weight.shape}")
    call = jax.ffi.ffi_call(
        _NAME, jax.ShapeDtypeStruct((x.shape[0], weight.data.shape[0]), jnp.float32)
    )
    return call(
        x,
        weight.data,
        bits=np.int64(how.bits),
        group_size=np.int64(how.group_size),
    )
