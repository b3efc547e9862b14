"""The laws of a quantized array, whatever is in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import quant
from flexjax.models.config import OPTConfig, named_config
from flexjax.policy import BITS, Policy
from flexjax.quant import (
    Quantization,
    cache_quantization,
    dequantize_into,
    fitting_group,
)

# As steps have them: one compilation for each shape, for one of every operation in it.
quantize, dequantize, passed_through = (
    jax.jit(function, static_argnums=1)
    for function in (quant.quantize, quant.dequantize, quant.passed_through)
)
DTYPES = ("bfloat16", "float16", "float32")
# The distance of a number of a type from the next, beside the number.
EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


def steps_of(array, how):
    """The scale of every element's group, as it is kept: float32 `[..., size]`."""
    size, group = array.shape[-1], how.group_size
    data = np.asarray(quantize(array, how))
    scales = how.code_bytes(size)
    count = size // group * how.itemsize
    kept = data[..., scales : scales + count].copy().view(jnp.dtype(how.dtype))
    return np.repeat(kept.astype(np.float32), group, axis=-1)


@st.composite
def arrays(draw):
    """An array of one of the types, of any magnitude, and how to quantize it."""
    how = Quantization(
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from([2, 16, 40, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)) * how.group_size)
    exponents = (-4, 4) if how.dtype == "float16" else (-30, 30)
    random = np.random.default_rng(draw(st.integers(0, 999)))
    spread, middle = (10.0 ** draw(st.integers(*exponents)) for _ in range(2))
    values = random.standard_normal(shape) * spread + middle
    return jnp.asarray(values.astype(np.float32).astype(jnp.dtype(how.dtype))), how


@given(drawn=arrays())
def test_no_element_is_farther_than_half_a_step(drawn):
    array, how = drawn
    found = np.asarray(dequantize(quantize(array, how), how), np.float64)
    exact = np.asarray(array, np.float64)
    rounding = EPSILON[how.dtype] * np.abs(exact).max()  # of the result to its type
    assert (np.abs(found - exact) <= steps_of(array, how) * 0.5001 + rounding).all()


@given(drawn=arrays())
def test_a_step_is_no_larger_than_it_must_be(drawn):
    array, how = drawn
    groups = np.asarray(array, np.float64).reshape(len(array), -1, how.group_size)
    needed = np.repeat(np.ptp(groups, axis=-1) / how.levels, how.group_size, axis=-1)
    slack = 1 + 4 * EPSILON[how.dtype]
    smallest = float(jnp.finfo(how.dtype).tiny)
    assert (steps_of(array, how) <= needed * slack + smallest).all()


@given(
    value=st.floats(width=16, allow_nan=False, allow_infinity=False),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
)
@example(value=65504.0, bits=4, dtype="float16")
@example(value=-1e-7, bits=4, dtype="float16")
def test_a_constant_group_is_exact(value, bits, dtype):
    how = Quantization(bits=bits, group_size=16, dtype=dtype)
    array = jnp.full((2, 32), value, dtype)
    assert (passed_through(array, how) == array).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_the_whole_range_of_a_type_stays_finite(bits, dtype):
    how = Quantization(bits=bits, group_size=2, dtype=dtype)
    most, least = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    array = jnp.asarray([[-most, most, 0.0, least, -least, least]], dtype)
    found = np.asarray(passed_through(array, how), np.float32)
    assert np.isfinite(found[0, 2:]).all()
    assert found[0, 0] == -most


@given(drawn=arrays(), data=st.data())
def test_rows_and_groups_are_quantized_each_for_itself(drawn, data):
    array, how = drawn
    row = data.draw(st.integers(0, len(array) - 1))
    alone = jnp.zeros_like(array).at[row].set(array[row])
    assert (quantize(array, how)[row] == quantize(alone, how)[row]).all()
    group = data.draw(st.integers(0, array.shape[-1] // how.group_size - 1))
    inside = slice(group * how.group_size, (group + 1) * how.group_size)
    changed = array.at[:, inside].set(0)
    before, after = (passed_through(a, how) for a in (array, changed))
    assert (before.at[:, inside].set(0) == after).all()


@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([2, 16, 40, 64]),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 9),
)
def test_width_and_size_are_inverse(bits, group, dtype, count):
    how = Quantization(bits=bits, group_size=group, dtype=dtype)
    size = group * count
    width = how.width(size)
    assert how.size(width) == size
    shape = jax.eval_shape(lambda a: quantize(a, how), jnp.zeros((3, size), dtype))
    assert (shape.shape, shape.dtype) == ((3, width), jnp.uint8)


def test_four_bits_in_groups_of_64_take_four_and_a_half():
    how = Quantization(bits=4, group_size=64, dtype="bfloat16")
    assert how.width(4096) * 8 / 4096 == 4.5
    assert dataclasses.replace(how, bits=8).width(4096) * 8 / 4096 == 8.5


def test_a_head_has_whole_groups_of_its_own():
    policy = Policy(kv_cache_bits=4)
    groups = {
        name: cache_quantization(policy, named_config(name), np.dtype("float32"))
        for name in ("opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-30b")
    }
    assert {name: how.group_size for name, how in groups.items()} == {
        "opt-1.3b": 64,
        "opt-2.7b": 40,  # heads of 80
        "opt-6.7b": 64,
        "opt-30b": 64,
    }
    for size in range(1, 200):
        assert fitting_group(size, 64, bits=8) is not None
        group = fitting_group(size, 64, bits=4)
        assert (group is None) == bool(size % 2)
        if group is not None:
            assert size % group == group % 2 == 0
            assert group <= 64
    plain = cache_quantization(Policy(), OPTConfig(), np.dtype("float32"))
    assert plain is None


@pytest.mark.parametrize(
    ("bits", "group", "size"),
    [(4, 64, 96), (8, 24, 64), (4, 5, 10), (4, 1, 14), (8, 50, 75)],
)
def test_groups_that_do_not_divide_are_refused_with_one_that_does(bits, group, size):
    how = Quantization(bits=bits, group_size=group, dtype="float32")
    refusal = f"group_size of {group} .* {size} elements"
    with pytest.raises(ValueError, match=refusal) as caught:
        quantize(jnp.zeros((2, size)), how)
    fitting = int(str(caught.value).rpartition(" ")[2])
    quantize(jnp.zeros((2, size)), dataclasses.replace(how, group_size=fitting))


def test_what_no_group_divides_is_refused_without_advice_that_does_not_help():
    how = Quantization(bits=4, group_size=64, dtype="float32")
    with pytest.raises(ValueError, match=r"75 elements .* do not quantize them"):
        quantize(jnp.zeros((2, 75)), how)
    policy = Policy(kv_cache_bits=4)
    config = OPTConfig(hidden_size=150, num_attention_heads=2)
    with pytest.raises(ValueError, match="heads of 75 elements .* leave kv_cache_bits"):
        cache_quantization(policy, config, np.dtype("float32"))


@given(drawn=arrays())
def test_memory_that_is_used_again_holds_the_same(drawn):
    array, how = drawn
    data = quantize(array, how)
    out = jnp.full(array.shape, jnp.nan, array.dtype)
    expected = dequantize(data, how)
    (found,) = dequantize_into([out], [data], quantizations=(how,))
    assert (found == expected).all()
    assert out.is_deleted()
