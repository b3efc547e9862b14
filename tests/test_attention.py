"""Both attentions against a plain one in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import attention
from flexjax.attention import (
    Branches,
    SharedPrefix,
    attend_to_prefix,
    decode_attention,
    prefill_attention,
)

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# Where scores are in the thousands (a scale of 30), processors without AVX-512 need
# more than 1e-5 of the scale.
TOLERANCE = {FLOAT32: 2e-5, BFLOAT16: 3e-2}


def plain_attention(query, key, value, visible) -> np.ndarray:
    """Softmax attention; `visible` is `[batch, queries, slots]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1])
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ value


def draw_inputs(seed: int, shape, dtype: np.dtype, scale: float):
    random = np.random.default_rng(seed)
    return [
        jnp.asarray((random.standard_normal(shape) * scale).astype(dtype))
        for _ in range(3)
    ]


def check(found, expected, dtype: np.dtype, scale: float) -> None:
    found = np.asarray(found, np.float64)
    limit = TOLERANCE[dtype] * max(1.0, scale)
    np.testing.assert_allclose(found, expected, atol=limit, rtol=0)


def assert_finite(array) -> None:
    assert np.isfinite(np.asarray(array, np.float32)).all()


@pytest.fixture(params=[(256, 128), (8, 4)], ids=["as it is", "small chunks"])
def chunks(request, monkeypatch):
    whole_row, query_chunk = request.param
    monkeypatch.setattr(attention, "WHOLE_ROW", whole_row)
    monkeypatch.setattr(attention, "QUERY_CHUNK", query_chunk)
    return request.param


def check_prefill(shape, start: np.ndarray, dtype: np.dtype, scale: float) -> None:
    query, key, value = draw_inputs(0, shape, dtype, scale)
    # A function of its own, since JAX remembers what it compiled for another chunk.
    run = jax.jit(lambda *inputs: prefill_attention(*inputs))
    found = run(query, key, value, jnp.asarray(start))
    assert found.dtype == dtype
    assert_finite(found)
    slots = np.arange(shape[2])
    real = slots[None] >= start[:, None]
    visible = (slots[None, None] <= slots[:, None]) & real[:, None]
    # What a slot of padding gives is anybody's business, as long as it is finite.
    visible |= ~real[:, :, None]
    expected = plain_attention(query, key, value, visible)
    keep = real[:, None, :, None]
    check(np.where(keep, found, 0), np.where(keep, expected, 0), dtype, scale)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("seq", [1, 3, 8, 9, 10, 12, 32])
def test_prefill_is_causal_attention_over_the_real_tokens(chunks, seq, dtype):
    start = np.array([0, seq // 2, seq - 1], np.int32)
    check_prefill((3, 2, seq, 8), start, dtype, 1.0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("seq", [288, 384])
def test_a_long_prefill_works_in_chunks(seq, dtype):
    check_prefill((2, 2, seq, 16), np.array([seq - 1, 17], np.int32), dtype, 1.0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_large_scores_do_not_overflow(dtype):
    check_prefill((1, 1, 12, 8), np.zeros(1, np.int32), dtype, 30.0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@given(st.data())
def test_decode_is_the_last_row_of_prefill(dtype, data):
    batch, seq = data.draw(st.sampled_from([(1, 1), (3, 9)]))
    spare = data.draw(st.sampled_from([0, 7]))
    starts = st.lists(st.integers(0, seq - 1), min_size=batch, max_size=batch)
    start = jnp.asarray(np.array(data.draw(starts), np.int32))
    seed = data.draw(st.integers(0, 1000))
    query, key, value = draw_inputs(seed, (batch, 2, seq, 8), dtype, 1.0)
    whole = jax.jit(prefill_attention)(query, key, value, start)[:, :, -1:]
    # Slots that are not in use hold anything finite.
    garbage = ((0, 0), (0, 0), (0, 1 + spare), (0, 0))
    cut = data.draw(st.integers(1, seq + spare))  # into two pieces, or one
    past = tuple(
        tuple(piece for piece in (x[:, :, :cut], x[:, :, cut:]) if piece.shape[2])
        for x in (
            jnp.pad(x[:, :, :-1], garbage, constant_values=1e30) for x in (key, value)
        )
    )
    new = key[:, :, -1:], value[:, :, -1:]
    decode = jax.jit(decode_attention)
    found = decode(query[:, :, -1:], new, past, start, jnp.int32(seq - 1))
    assert found.dtype == dtype
    check(found, np.asarray(whole, np.float64), dtype, 1.0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_decode_equals_the_plain_attention(dtype):
    query, key, value = draw_inputs(3, (2, 3, 40, 16), dtype, 1.0)
    start = np.array([0, 31], np.int32)
    visible = np.arange(40)[None, None] >= start[:, None, None]
    found = decode_attention(
        query[:, :, -1:],
        (key[:, :, -1:], value[:, :, -1:]),
        ((key[:, :, :-1],), (value[:, :, :-1],)),
        jnp.asarray(start),
        jnp.int32(39),
    )
    check(found, plain_attention(query[:, :, -1:], key, value, visible), dtype, 1.0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_row_of_padding_alone_stays_finite(dtype):
    """It sees no cached slot, so it gives what its own token holds."""
    query, key, value = draw_inputs(4, (2, 2, 8, 4), dtype, 1.0)
    start = jnp.full(2, 100, jnp.int32)
    assert_finite(prefill_attention(query, key, value, start))
    new = key[:, :, -1:], value[:, :, -1:]
    found = decode_attention(
        query[:, :, -1:], new, ((key,), (value,)), start, jnp.int32(8)
    )
    check(found, np.asarray(new[1], np.float64), dtype, 1.0)


def draw_behind_prefix(seed: int, shape, prefix, dtype: np.dtype, scale: float):
    """Inputs, a prefix of `(slots, first)`, and keys and values with it in front."""
    (batch, heads, _, head_dim), (num_slots, first) = shape, prefix
    query, key, value = draw_inputs(seed, shape, dtype, scale)
    before = draw_inputs(seed + 1, (1, heads, num_slots, head_dim), dtype, scale)[1:]
    shared = SharedPrefix(*before, jnp.asarray([first], jnp.int32))
    whole = [
        np.concatenate([np.repeat(np.asarray(x), batch, axis=0), y], axis=2)
        for x, y in zip(before, (key, value), strict=True)
    ]
    return (query, key, value), shared, whole


behind_prefix = pytest.mark.parametrize(
    ("prefix", "scale"), [((1, 0), 1.0), ((8, 3), 1.0), ((300, 40), 1.0), ((8, 0), 30)]
)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("seq", [1, 9, 12])
@behind_prefix
def test_a_prefill_goes_on_behind_a_prefix(chunks, seq, prefix, scale, dtype):
    (query, key, value), shared, whole = draw_behind_prefix(
        0, (3, 2, seq, 8), prefix, dtype, scale
    )
    start = np.array([0, seq // 2, seq - 1], np.int32)
    run = jax.jit(lambda *inputs: prefill_attention(*inputs))
    found = run(query, key, value, jnp.asarray(start), shared)
    num_slots, first = prefix
    slots = np.arange(-num_slots, seq)
    real = slots >= start[:, None]
    of_prefix = (slots < 0) & (slots >= first - num_slots)
    visible = (slots <= np.arange(seq)[:, None]) & (real | of_prefix)[:, None]
    keep = real[:, None, num_slots:, None]
    expected = plain_attention(query, *whole, visible)
    check(np.where(keep, found, 0), np.where(keep, expected, 0), dtype, scale)
    assert_finite(found)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@behind_prefix
def test_a_new_token_goes_on_from_what_it_found_in_a_prefix(prefix, scale, dtype):
    (query, key, value), shared, whole = draw_behind_prefix(
        2, (3, 2, 20, 16), prefix, dtype, scale
    )
    start, newest = np.array([0, 7, 19], np.int32), query[:, :, -1:]
    found = decode_attention(
        newest,
        (key[:, :, -1:], value[:, :, -1:]),
        ((key[:, :, :12], key[:, :, 12:]), (value[:, :, :12], value[:, :, 12:])),
        jnp.asarray(start),
        jnp.int32(19),
        attend_to_prefix(newest, shared),
    )
    num_slots, first = prefix
    slots = np.arange(-num_slots, 20)
    of_prefix = (slots < 0) & (slots >= first - num_slots)
    visible = (slots >= start[:, None]) | of_prefix
    expected = plain_attention(newest, *whole, visible[:, None])
    check(found, expected, dtype, scale)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_branches_see_what_they_share_and_themselves(chunks, dtype):
    shape = (3, 2, 12, 8)
    query, key, value = draw_inputs(3, shape, dtype, 1.0)
    start = jnp.asarray([0, 2, 5], np.int32)
    # Branches of 3, 1 and 2 tokens behind 6; of 4 and 4 behind 2; and a lone sequence,
    # whose last token is its branch.
    sequence = np.array(
        [
            [0] * 6 + [1] * 3 + [2] + [3] * 2,
            [-1] * 2 + [0] * 2 + [1] * 4 + [2] * 4,
            [-1] * 5 + [0] * 7,
        ]
    )
    begin = [
        [6] * 6 + [6] * 3 + [9] + [10] * 2,
        [4] * 4 + [4] * 4 + [8] * 4,
        [11] * 12,
    ]
    branches = Branches(jnp.asarray([6, 4, 11]), jnp.asarray(begin))
    run = jax.jit(lambda *inputs: prefill_attention(*inputs))
    found = run(query, key, value, start, None, branches)
    slots = np.arange(12)
    of_query, of_slot = sequence[:, :, None], sequence[:, None]
    visible = (of_slot == 0) | (of_slot == of_query)
    visible &= (of_slot >= 0) & (slots <= slots[:, None])
    real = sequence >= 0
    visible |= ~real[:, :, None]
    expected = plain_attention(query, key, value, visible)
    keep = real[:, None, :, None]
    assert_finite(found)
    check(np.where(keep, found, 0), np.where(keep, expected, 0), dtype, 1.0)
