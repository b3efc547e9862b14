"""Products with weights that are made wide in the processor's caches.

On 2 cores of an AMD EPYC with AVX-512, 4-bit weights of 16384 x 4096 multiply
64 rows at 0.79 TFLOP/s and 2048 rows at 0.76; XLA does bfloat16 ones at 0.73 and 0.86,
once they are wide, which takes half as long as 64 rows do. Rows that are rounded to
8 bits are multiplied as integers: 64 at 1.2 TFLOP/s and 2048 at 1.1. With no more than
AVX2, on 2 cores of another EPYC, 256 rows are multiplied at 0.12 to 0.14 TFLOP/s, for
XLA's 0.06 to 0.11, and at 0.18 to 0.30 once they are rounded.
"""

import functools
import math
import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from flexjax.kernels.compiled import AVX2, AVX512, Kernel
from flexjax.quant import Quantization, QuantizedArray

_ROUND, _CONTRACT_BFLOAT16 = "flexjax_round_rows", "flexjax_contract_bfloat16"
_CONTRACT = {None: "flexjax_contract_quantized", 8: "flexjax_contract_rounded"}
PRODUCTS = Kernel(
    pathlib.Path(__file__).with_suffix(".cc"),
    (_ROUND, _CONTRACT_BFLOAT16, *_CONTRACT.values()),
    compiled_for=(AVX512, AVX2),
    without="products are XLA's alone, before which quantized weights are made wide; "
    "that is slower",
    better="amx_bf16",
)
# So many rows XLA multiplies with bfloat16 as fast, or faster, without AVX-512, too.
MOST_FOR_XLA = 32
GROUP_STEP = 32  # elements that the kernel unpacks at once
MOST_GROUP = 1 << 16  # of which 32-bit integers hold the products of two codes of 8


def is_faster(
    x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]
) -> bool:
    """Whether `contract_bfloat16` is there for these, and faster than XLA.

    On processors without AVX-512, from 64 rows on: 256 at 0.12 to 0.14 TFLOP/s, for
    0.09 to 0.11 (2 cores of an AMD EPYC).
    """
    return (
        x.dtype == weight.dtype == jnp.bfloat16
        and x.shape[0] > MOST_FOR_XLA
        and x.shape[1] % GROUP_STEP == 0
        and PRODUCTS.instructions() == AVX2
        and PRODUCTS.is_there()
    )


def is_multiplied(quantization: Quantization, inputs: int) -> bool:
    """Whether the kernel takes weights that are quantized so, `[outputs, inputs]`."""
    halves = 8 // quantization.bits  # of 4-bit codes: no group lies in both
    return (
        quantization.dtype == "bfloat16"
        and quantization.group_size % GROUP_STEP == 0
        and quantization.group_size <= MOST_GROUP
        and inputs % (halves * quantization.group_size) == 0
    )


def fitting_groups(matrices: Iterable[tuple[Quantization, int]]) -> list[int]:
    """The sizes of groups with which the kernel would take all of these, in order.

    Args:
        matrices: how each is quantized but for its groups, and its inputs.
    """
    whole = math.gcd(*(inputs // (8 // how.bits) for how, inputs in matrices))
    most = min(whole, MOST_GROUP)
    return [n for n in range(GROUP_STEP, most + 1, GROUP_STEP) if whole % n == 0]


@jax.custom_jvp
def contract_bfloat16(
    x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """`x @ weight.T`, both of bfloat16, accumulated in float32.

    Args:
        x: of inputs that are a multiple of `GROUP_STEP`.
        weight: of as many.
    """
    call = jax.ffi.ffi_call(
        _CONTRACT_BFLOAT16,
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32),
    )
    return call(x, weight)


@contract_bfloat16.defjvp
def _contract_bfloat16_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The same with its derivative, by XLA: models are trained by the same forward."""
    (x, weight), (x_dot, weight_dot) = primals, tangents
    contract = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    out_dot = contract(x_dot, weight) + contract(x, weight_dot)
    return contract_bfloat16(x, weight), out_dot


def contract_quantized(
    x: Float[Array, "rows inputs"], weight: QuantizedArray
) -> Float[Array, "rows outputs"]:
    """`x @ weight.T`, accumulated in float32.

    In bfloat16 the weights are what `dequantize` makes of them, and only the order of
    summation is the kernel's own. With `activation_bits` x is what `round_rows` makes
    of it, codes are multiplied with codes, and a weight is not rounded to bfloat16.

    Raises:
        ValueError: the kernel is not there, or is not for such weights; or they are for
            other inputs.
    """
    how = weight.quantization
    if not (PRODUCTS.is_there() and is_multiplied(how, x.shape[1])):
        raise ValueError(f"no kernel multiplies with weights of {how} on this machine")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"x is {x.shape}, but the weights are {weight.shape}")
    inputs = [x]
    if weight.activation_bits is not None:
        inputs = [*round_rows(x, how.group_size)]
    call = jax.ffi.ffi_call(
        _CONTRACT[weight.activation_bits],
        jax.ShapeDtypeStruct((x.shape[0], weight.data.shape[0]), jnp.float32),
    )
    return call(
        *inputs,
        weight.data,
        bits=np.int64(how.bits),
        group_size=np.int64(how.group_size),
    )


def round_rows(
    x: Float[Array, "rows inputs"], group_size: int
) -> tuple[Int8[Array, "rows inputs"], Float[Array, "groups 2 rows"]]:
    """Rows of bfloat16 rounded to 8 bits in groups, as `Policy.activation_bits` asks.

    A group is divided by a step of a 127th of its largest magnitude and rounded to the
    nearest code, ties to even: no element is farther than half a step from its code. A
    group whose step would be less than a float can divide by is zero; one with NaN is
    NaN.

    Args:
        x: of bfloat16.
        group_size: a multiple of 16 that divides a row.

    Returns:
        The codes; and by group each row's step, and the sum of what its codes stand
        for, which what weights have for a minimum is multiplied with.
    """
    rows, inputs = x.shape
    call = jax.ffi.ffi_call(
        _ROUND,
        (
            jax.ShapeDtypeStruct((rows, inputs), jnp.int8),
            jax.ShapeDtypeStruct((inputs // group_size, 2, rows), jnp.float32),
        ),
    )
    codes, factors = call(x, group_size=np.int64(group_size))
    return codes, factors
