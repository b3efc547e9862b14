"""The kernel does what `decode_attention` does, to what a cache stands for."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.attention import Partial, SharedPrefix, attend_to_prefix
from flexjax.cached_attention import attend_step
from flexjax.kernels import compiled, decode_attention
from flexjax.kernels.decode_attention import (
    DECODE_ATTENTION,
    attend_to_cache,
    is_attended,
)
from flexjax.quant import Quantization, dequantize, quantize

pytestmark = pytest.mark.skipif(
    not DECODE_ATTENTION.is_there(),
    reason="no kernel for this processor, or no compiler",
)

for_each = pytest.mark.parametrize(
    "instructions",
    [one for one in DECODE_ATTENTION.compiled_for if not one.lacking()],
    ids=lambda one: one.names[0],
)

# Half a unit in the last place, of what is returned.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-24}


def quantization(bits, group_size, dtype="bfloat16"):
    return Quantization(bits=bits, group_size=group_size, dtype=dtype)


@st.composite
def kept(draw):
    """A type of queries, the size of a head, and how its cache is quantized."""
    bits = draw(st.sampled_from([None, 4, 8]))
    if bits is None:
        return draw(st.sampled_from(sorted(ROUNDING))), draw(heads), None
    head_dim = draw(heads if bits == 8 else heads.filter(lambda size: size % 32 == 0))
    groups = [n for n in range(16, head_dim + 1, 16) if head_dim % n == 0]
    group = draw(st.sampled_from(groups))
    return "bfloat16", head_dim, quantization(bits, group)


heads = st.sampled_from(range(16, 129, 16))


def drawn(seed, shape, pieces, dtype, how):
    """A query, a new key and value, and a cache of so many slots a piece."""
    rng = np.random.default_rng(seed)
    rows, heads, head_dim = shape

    def values(slots):
        found = rng.standard_normal((rows, heads, slots, head_dim))
        # So that some slots weigh much more than others.
        return jnp.asarray(2 * found, dtype)

    def cached():
        found = values(sum(pieces))
        if how is not None:
            found = jax.jit(quantize, static_argnums=1)(found, how)
        return tuple(np.split(np.asarray(found), np.cumsum(pieces)[:-1], axis=2))

    query, *new = (values(1) for _ in range(3))
    return query, tuple(new), jax.tree.map(jnp.asarray, (cached(), cached()))


@functools.cache
def target_for(instructions):
    """The kernel compiled for these, by a name of its own."""
    library = compiled.library(DECODE_ATTENTION.source, instructions)
    handler = jax.ffi.pycapsule(library.flexjax_decode_attention)
    name = f"flexjax_decode_attention_{instructions.names[0]}"
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return name


def compiled_attention(instructions, how):
    """`attend_to_cache` by the kernel compiled for these."""

    def attend(*inputs, found=None):
        with mock.patch.object(decode_attention, "_TARGET", target_for(instructions)):
            return attend_to_cache(*inputs, found=found, cache_as=how)

    return jax.jit(attend)


def expected(query, new, past, start, length, how, prefix=None):
    """Attention in float64, and sums of magnitudes that its errors are relative to."""

    def wide(pieces, own, before):
        found = np.concatenate(pieces, axis=2)
        if how is not None:
            found = jax.jit(dequantize, static_argnums=1)(jnp.asarray(found), how)
        found = np.concatenate([found, own], axis=2).astype(np.float64)
        before = np.repeat(np.asarray(before, np.float64), len(found), axis=0)
        return np.concatenate([before, found], axis=2)

    nothing = np.empty((1, *query.shape[1:2], 0, query.shape[3]))
    before = (nothing, nothing) if prefix is None else prefix[:2]
    keys, values = map(wide, past, new, before)
    slots = np.arange(keys.shape[2]) - before[0].shape[2]
    scale = np.asarray(query.shape[-1] ** -0.5, query.dtype)
    query = np.asarray(query * scale, np.float64)
    scores = np.einsum("bhqd,bhkd->bhqk", query, keys)
    seen = (slots < 0) | (slots >= start[:, None]) & (slots < length)
    seen[:, -1] = True  # the token itself
    scores = np.where(seen[:, None, None], scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return shares @ values, shares @ np.abs(values)


@for_each
@given(
    kept=kept(),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 5),
    heads=st.integers(1, 4),
    pieces=st.lists(st.sampled_from([1, 15, 16, 64, 65, 200]), min_size=1, max_size=3),
    data=st.data(),
)
@settings(max_examples=20)
def test_attention_is_a_softmax_over_what_may_be_seen(
    instructions, kept, seed, rows, heads, pieces, data
):
    dtype, head_dim, how = kept
    assert is_attended(np.dtype(dtype), head_dim, how)
    query, new, past = drawn(seed, (rows, heads, head_dim), pieces, dtype, how)
    slots = st.integers(0, sum(pieces))
    length = data.draw(slots)
    start = np.array([data.draw(slots) for _ in range(rows)], np.int32)
    attend = compiled_attention(instructions, how)
    found = attend(query, new, past, jnp.asarray(start), jnp.int32(length))
    assert found.dtype == query.dtype
    exact, size = expected(query, new, past, start, length, how)
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert (error <= ROUNDING[dtype] * np.abs(exact) + 2e-5 * size).all()


@for_each
@given(
    kept=kept(),
    seed=st.integers(0, 1000),
    heads=st.integers(1, 4),
    slots=st.sampled_from([1, 63, 200]),
    scale=st.sampled_from([0.1, 1]),
)
def test_attention_goes_on_from_what_was_found_elsewhere(
    instructions, kept, seed, heads, slots, scale
):
    dtype, head_dim, how = kept
    query, new, past = drawn(seed, (3, heads, head_dim), (65,), dtype, how)
    rng = np.random.default_rng(seed)
    # Exact in every type, so that what is wide of a quantized cache stays beside it.
    before = [
        rng.integers(-8, 9, (1, heads, slots, head_dim)) * scale / 4 for _ in range(2)
    ]
    prefix = SharedPrefix(
        *(jnp.asarray(x, dtype) for x in before), jnp.zeros(1, jnp.int32)
    )
    attend = compiled_attention(instructions, how)
    start, length = np.array([0, 30, 65], np.int32), 50
    found = attend(
        query,
        new,
        past,
        jnp.asarray(start),
        jnp.int32(length),
        found=attend_to_prefix(query, prefix),
    )
    exact, size = expected(query, new, past, start, length, how, prefix)
    error = np.abs(np.asarray(found, np.float64) - exact)
    # Shares of a prefix are rounded to its values' type.
    assert (error <= ROUNDING[dtype] * (np.abs(exact) + 2 * size) + 2e-5 * size).all()


@for_each
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_nothing_is_read_of_slots_that_a_row_may_not_see(instructions, bits):
    how = bits and quantization(bits, 64)
    query, new, past = drawn(0, (2, 3, 64), (40, 100), "bfloat16", how)
    start, length = jnp.asarray([0, 70], jnp.int32), jnp.int32(75)
    step = compiled_attention(instructions, how)

    def attend(past):
        return np.asarray(step(query, new, past, start, length))

    def unseen_spoilt(piece, first):
        slots = first + np.arange(piece.shape[2])
        unseen = (slots < start[:, None]) | (slots >= length)
        bad = 255 if how else np.nan  # a scale of bytes of 255 is NaN
        return jnp.where(unseen[:, None, :, None], jnp.asarray(bad, piece.dtype), piece)

    bad = tuple((unseen_spoilt(one, 0), unseen_spoilt(two, 40)) for one, two in past)
    np.testing.assert_array_equal(attend(past), attend(bad))


@for_each
@pytest.mark.parametrize("dtype", sorted(ROUNDING))
def test_what_is_not_finite_stays_so_in_its_own_head(instructions, dtype):
    query, new, ((keys,), (values,)) = drawn(0, (2, 3, 64), (70,), dtype, None)
    keys = keys.at[1, 2, 50, 3].set(np.nan)
    start = jnp.zeros(2, jnp.int32)
    attend = compiled_attention(instructions, None)
    found = attend(query, new, ((keys,), (values,)), start, jnp.int32(70))
    is_bad = np.isnan(np.asarray(found, np.float32))
    assert is_bad[1, 2].all()
    assert is_bad.sum() == 64


@for_each
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_a_group_without_a_scale_makes_its_own_head_nan(instructions, bits, which):
    how = quantization(bits, 16)
    query, new, past = drawn(0, (2, 3, 64), (70,), "bfloat16", how)
    (keys,), (values,) = past
    spoilt = {"keys": keys, "values": values}
    # All scales and minima of one slot are NaN then.
    spoilt[which] = spoilt[which].at[1, 2, 50, -16:].set(255)
    past = (spoilt["keys"],), (spoilt["values"],)
    attend = compiled_attention(instructions, how)
    found = attend(query, new, past, jnp.zeros(2, jnp.int32), jnp.int32(70))
    is_bad = np.isnan(np.asarray(found, np.float32))
    assert is_bad[1, 2].all()
    assert is_bad.sum() == 64


@pytest.mark.parametrize(
    ("dtype", "head_dim", "how"),
    [
        ("bfloat16", 8, None),
        ("bfloat16", 72, None),
        ("bfloat16", 256, None),
        ("float64", 64, None),
        ("float32", 64, quantization(4, 64, "float32")),
        ("bfloat16", 80, quantization(4, 40, "bfloat16")),
        ("bfloat16", 16, quantization(4, 16, "bfloat16")),
        ("bfloat16", 64, quantization(8, 8, "bfloat16")),
        ("bfloat16", 96, quantization(8, 64, "bfloat16")),
        ("bfloat16", 64, quantization(4, 128, "bfloat16")),
        ("bfloat16", 0, None),
    ],
)
def test_what_the_kernel_cannot_do_is_left_to_xla(dtype, head_dim, how):
    assert not is_attended(np.dtype(dtype), head_dim, how)


def test_the_kernel_attends_where_a_step_is_for_a_cpu(monkeypatch):
    def targets(platform, heads=3):
        query, new, past = drawn(0, (2, heads, 64), (40,), "bfloat16", None)
        start, length = jnp.zeros(2, jnp.int32), jnp.int32(40)
        step = jax.jit(lambda *inputs: attend_step(*inputs))  # a new one, of no past
        lowered = step.trace(query, new, past, start, length).lower(
            lowering_platforms=(platform,)
        )
        return re.findall("custom_call @([a-z_]*)", lowered.as_text())

    kernel = "flexjax_decode_attention"
    assert kernel in targets("cpu")
    assert kernel not in targets("cuda")
    monkeypatch.setattr(type(DECODE_ATTENTION), "is_there", lambda kernel: False)
    # Of a shape of its own, since JAX keeps what it lowered.
    assert kernel not in targets("cpu", heads=7)


def test_without_jit_xla_attends():
    query, new, past = drawn(0, (2, 3, 64), (40,), "float32", None)
    arguments = query, new, past, jnp.zeros(2, jnp.int32), jnp.int32(40)
    with jax.disable_jit():
        found = attend_step(*arguments)
    np.testing.assert_allclose(found, attend_step(*arguments), rtol=1e-5, atol=1e-5)


def spoilt(index, value):
    """Arguments of the kernel, one of which is `value` of it."""
    query, (key, new_value), ((keys,), (values,)) = drawn(
        0, (2, 3, 64), (40,), "bfloat16", None
    )
    start = jnp.zeros(2, jnp.int32)
    found = Partial(*(jnp.zeros((2, 3, 1, width)) for width in (1, 1, 64)))
    operands = [query, key, new_value, start, jnp.int32(40), *found, keys, values]
    operands[index] = value(operands[index])
    return operands


def as_float32(array):
    return array.astype(jnp.float32)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, as_float32),
        (1, as_float32),
        (2, as_float32),
        (5, lambda peak: peak[:1]),
        (6, lambda total: total[:1]),
        (7, lambda values: values[:, :1]),
        (8, as_float32),
        (9, as_float32),
        (8, lambda keys: keys.astype(jnp.float16)),  # as many bytes
        (2, lambda value: value[:1]),
        (3, lambda start: start[:1]),
        (8, lambda keys: keys[:1]),
        (9, lambda values: values[:, :, :1]),
    ],
)
def test_what_does_not_go_together_is_refused(index, value):
    operands = spoilt(index, value)
    query, *_ = operands

    @jax.jit
    def attend(*operands):
        call = jax.ffi.ffi_call("flexjax_decode_attention", query)
        return call(*operands, bits=np.int64(0), group_size=np.int64(1))

    with pytest.raises(jax.errors.JaxRuntimeError, match="the cache is not for atten"):
        attend(*operands).block_until_ready()
