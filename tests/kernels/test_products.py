"""The kernel is XLA's product of what `dequantize` makes of the weights.

And where inputs are rounded, of what codes of both stand for.
"""

import dataclasses
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax.kernels import compiled, products
from flexjax.kernels.products import (
    PRODUCTS,
    contract_bfloat16,
    contract_quantized,
    is_multiplied,
    round_rows,
)
from flexjax.models.opt import contract_last
from flexjax.quant import Quantization, QuantizedArray, dequantize, quantize

pytestmark = pytest.mark.skipif(
    not PRODUCTS.is_there(), reason="no kernel for this processor, or no compiler"
)

SHAPES = {
    "seed": st.integers(0, 1000),
    "rows": st.integers(1, 100) | st.sampled_from([256, 300, 520]),  # blocks of 256
    "halves": st.integers(1, 8),
    "outputs": st.integers(1, 70) | st.sampled_from([512, 600]),
    "bits": st.sampled_from([4, 8]),
    "group_size": st.sampled_from([32, 64, 96, 320]),
}


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[one for one in PRODUCTS.compiled_for if not one.lacking()],
    ids=lambda one: one.names[0],
)
def _instructions(request):
    """The kernel compiled for all that this processor has, one after the other."""
    library = compiled.library(PRODUCTS.source, request.param)
    names = {name: f"{name}_{request.param.names[0]}" for name in PRODUCTS.targets}
    for name, other in names.items():
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(other, handler, platform="cpu")
    contract = {bits: names[name] for bits, name in products._CONTRACT.items()}
    jax.clear_caches()  # of steps that call the other
    with mock.patch.multiple(
        products,
        _ROUND=names[products._ROUND],
        _CONTRACT_BFLOAT16=names[products._CONTRACT_BFLOAT16],
        _CONTRACT=contract,
    ):
        yield
    jax.clear_caches()


narrow = jax.jit(quantize, static_argnums=1)
widen = jax.jit(dequantize, static_argnums=1)


def drawn(seed, rows, inputs, outputs, how):
    """Inputs and quantized weights, and what XLA makes of them in float32."""
    rng = np.random.default_rng(seed)
    x, weight = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((rows, inputs), (outputs, inputs))
    )
    quantized = QuantizedArray(narrow(weight, how), how)
    wide = widen(quantized.data, how)
    expected = jax.lax.dot_general(
        x.astype(jnp.float32),
        wide.astype(jnp.float32),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    return x, quantized, wide, np.asarray(expected)


@given(**SHAPES)
@example(seed=1, rows=17, halves=3, outputs=7, bits=8, group_size=96)
@example(seed=2, rows=300, halves=1, outputs=70, bits=4, group_size=320)
def test_a_product_is_that_of_the_wide_weights(
    seed, rows, halves, outputs, bits, group_size
):
    how = Quantization(bits=bits, group_size=group_size, dtype="bfloat16")
    inputs = 2 * halves * group_size
    assert is_multiplied(how, inputs)
    x, weight, wide, expected = drawn(seed, rows, inputs, outputs, how)
    found = jax.jit(contract_quantized)(x, weight)
    # Sums in another order: each of `inputs` products is rounded once.
    scale = np.abs(np.asarray(x, np.float32)) @ np.abs(np.asarray(wide, np.float32)).T
    error = np.abs(np.asarray(found) - expected)
    assert (error <= 1e-5 * scale).all()


@given(**{name: SHAPES[name] for name in ("seed", "rows", "halves", "outputs")})
@example(seed=1, rows=17, halves=3, outputs=7)
def test_a_product_of_bfloat16_is_xla_s(seed, rows, halves, outputs):
    how = Quantization(bits=8, group_size=32, dtype="bfloat16")
    x, _, wide, expected = drawn(seed, rows, 32 * halves, outputs, how)
    found = np.asarray(jax.jit(contract_bfloat16)(x, wide))
    scale = np.abs(np.asarray(x, np.float32)) @ np.abs(np.asarray(wide, np.float32)).T
    assert (np.abs(found - expected) <= 1e-5 * scale).all()


def test_a_product_of_bfloat16_has_xla_s_derivatives():
    how = Quantization(bits=8, group_size=32, dtype="bfloat16")
    x, _, weight, _ = drawn(1, 40, 64, 30, how)
    factors = jnp.asarray(np.random.default_rng(2).standard_normal((40, 30)))

    def gradients(contract):
        def total(x, weight):
            return (contract(x, weight) * factors).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1)))(x, weight)

    found = gradients(contract_bfloat16)
    expected = gradients(lambda x, w: jnp.matmul(x, w.T).astype(jnp.float32))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.2)


def test_products_of_bfloat16_of_half_a_step_are_refused():
    x = jnp.zeros((3, 48), jnp.bfloat16)
    with pytest.raises(Exception, match="the weights are not for so many inputs"):
        contract_bfloat16(x, x).block_until_ready()


def test_many_rows_of_bfloat16_are_multiplied_by_the_kernel_without_avx512():
    x, few, odd = (
        jnp.ones(shape, jnp.bfloat16) for shape in ((64, 64), (32, 64), (64, 40))
    )
    has_no_more = products.PRODUCTS.instructions() == compiled.AVX2
    assert products.is_faster(x, x) == has_no_more
    assert not products.is_faster(few, x)
    assert not products.is_faster(odd, odd)
    assert not products.is_faster(x.astype(jnp.float32), x)
    steps = str(jax.jit(contract_last).lower(x, x).as_text())
    assert (products._CONTRACT_BFLOAT16 in steps) == has_no_more


def rounded(x, group_size):
    """What `round_rows` says that it does: codes, steps and what they stand for."""
    groups = np.asarray(x, np.float32).reshape(len(x), -1, group_size)
    steps = np.abs(groups).max(axis=-1) / np.float32(127)
    codes = np.round(groups / np.where(steps > 0, steps, 1)[..., None])
    wide = codes.astype(np.float64) * steps[..., None]
    return codes.reshape(x.shape), steps, wide.reshape(x.shape)


@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    group_size=st.sampled_from([32, 64, 96, 320]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)
def test_rows_are_rounded_to_the_nearest_code(seed, rows, groups, group_size, scale):
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal((rows, groups * group_size))
    x[:, ::7] *= 50  # some stand out
    x[0] = 0
    x = jnp.asarray(x, jnp.bfloat16)
    codes, factors = map(np.asarray, round_rows(x, group_size))
    expected, steps, wide = rounded(x, group_size)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(factors[:, 0].T, steps)
    sums = wide.reshape(rows, groups, group_size).sum(axis=-1)
    np.testing.assert_allclose(factors[:, 1].T, sums, rtol=1e-6)
    error = np.abs(np.asarray(x, np.float64) - wide).reshape(rows, groups, -1)
    assert (error <= 0.5001 * steps[..., None]).all()


def test_what_is_not_finite_stays_so_and_what_is_nearly_nothing_is_zero():
    x = np.ones((3, 128), np.float32)
    x[0, 5], x[1, 70], x[2] = np.nan, np.inf, 1e-39
    codes, factors = round_rows(jnp.asarray(x, jnp.bfloat16), 64)
    factors = np.asarray(factors)
    assert np.isnan(factors[0, :, 0]).all()
    assert not np.isfinite(factors[1, :, 1]).any()
    assert np.isfinite(factors[1, :, 0]).all()
    assert (factors[:, :, 2] == 0).all()
    assert (np.asarray(codes)[2] == 0).all()
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    _, weight, *_ = drawn(0, 1, 128, 5, how)
    weight = dataclasses.replace(weight, activation_bits=8)
    found = contract_last(jnp.asarray(x, jnp.bfloat16), weight)
    assert not np.isfinite(found[:2]).any()
    assert (np.asarray(found)[2] == 0).all()


@given(**SHAPES)
@example(seed=1, rows=17, halves=3, outputs=7, bits=8, group_size=96)
@example(seed=2, rows=300, halves=1, outputs=70, bits=4, group_size=320)
def test_a_product_of_rounded_rows_is_that_of_what_codes_stand_for(
    seed, rows, halves, outputs, bits, group_size
):
    how = Quantization(bits=bits, group_size=group_size, dtype="bfloat16")
    x, weight, *_ = drawn(seed, rows, 2 * halves * group_size, outputs, how)
    weight = dataclasses.replace(weight, activation_bits=8)
    found = np.asarray(jax.jit(contract_quantized)(x, weight))
    # As exact as float32 has them, where `dequantize` rounds to bfloat16.
    exact = dataclasses.replace(how, dtype="float32")
    wide = np.asarray(widen(in_float32(weight.data, how), exact), np.float64)
    _, _, x = rounded(x, group_size)
    error = np.abs(found - x @ wide.T)
    assert (error <= 1e-5 * (np.abs(x) @ np.abs(wide).T)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_hold_the_largest_sums_of_a_large_group(bits, sign):
    size = 8192
    how = Quantization(bits=bits, group_size=size, dtype="bfloat16")
    row = jnp.ones((1, 2 * size), jnp.bfloat16).at[0, ::size].set(0)  # 0, then 1s
    weight = QuantizedArray(quantize(row, how), how, 8)
    found = contract_last(sign * row, weight)
    assert float(found[0, 0]) == pytest.approx(sign * 2 * (size - 1), rel=0.01)


@pytest.mark.parametrize("group_size", [8, 40, 96])
def test_rows_that_are_no_whole_groups_are_refused(group_size):
    with pytest.raises(Exception, match="rows are not whole groups"):
        round_rows(jnp.zeros((2, 128), jnp.bfloat16), group_size)


def in_float32(data, how):
    """The same codes, with scales and minima of float32."""
    codes = how.code_bytes(how.size(data.shape[-1]))
    numbers = np.ascontiguousarray(data[:, codes:]).view(jnp.bfloat16)
    numbers = numbers.astype(np.float32).view(np.uint8)
    return jnp.concatenate([data[:, :codes], numbers], axis=-1)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_what_dequantize_makes_of_it(bits):
    """By rows that are each one 1 and zeros, which no sum can blur."""
    how = Quantization(bits=bits, group_size=32, dtype="bfloat16")
    _, weight, wide, _ = drawn(1, 1, 512, 40, how)
    found = contract_last(jnp.eye(512, dtype=jnp.bfloat16), weight)
    np.testing.assert_array_equal(found, np.asarray(wide, np.float32).T)


def test_products_may_run_beside_each_other():
    """Threads that wait for one another's shares would hang."""
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    step = jax.jit(contract_quantized)
    cases = [drawn(seed, 65, 1024, 700, how) for seed in range(4)]
    for bits, atol in ((None, 1e-2), (8, 1.5)):
        calls = [
            step(x, dataclasses.replace(weight, activation_bits=bits))
            for x, weight, _, _ in cases * 8
        ]
        for found, (*_, expected) in zip(calls, itertools.cycle(cases), strict=False):
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("bits", "group_size", "inputs", "dtype"),
    [
        (4, 16, 512, "bfloat16"),  # groups are less than is made wide at once
        (4, 64, 64, "bfloat16"),  # a group lies in both halves
        (8, 40, 80, "bfloat16"),
        (4, 64, 512, "float32"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(bits, group_size, inputs, dtype):
    how = Quantization(bits=bits, group_size=group_size, dtype=dtype)
    assert not is_multiplied(how, inputs)
    weight = QuantizedArray(jnp.zeros((3, how.width(inputs)), jnp.uint8), how)
    with pytest.raises(ValueError, match="no kernel multiplies with weights of"):
        contract_last(jnp.zeros((2, inputs), jnp.bfloat16), weight)


def test_weights_for_other_inputs_are_refused():
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    weight = QuantizedArray(jnp.zeros((3, how.width(256)), jnp.uint8), how)
    with pytest.raises(ValueError, match="x is .2, 512., but the weights are .3, 256."):
        contract_last(jnp.zeros((2, 512), jnp.bfloat16), weight)
