"""Sparse attention against plain arithmetic in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.attention import decode_attention
from flexjax.sparse import (
    combine,
    gather,
    kept_counts,
    kept_slots,
    select,
    sparse_prefill_attention,
    sum_values,
)

BATCH, HEADS, SLOTS, HEAD_DIM = 3, 2, 20, 4


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attend(query, new, past, start, length, sparsity):
    query, new, past, start, length = jax.tree.map(
        jnp.asarray, (query, new, past, start, length)
    )
    keys, values = past
    chosen = select(query, new[0], keys, start, length, sparsity)
    total = sum_values(jnp.concatenate(values, axis=2)[:, :, :length], start)
    return combine(chosen, new[1], gather(values, chosen.slots), total), chosen


def plain(query, new, past, start, length, sparsity) -> np.ndarray:
    """One row and one head after the other, with a sort."""
    keys, values = (np.concatenate(pieces, axis=2) for pieces in past)
    out = np.zeros(query.shape)
    for row, head in np.ndindex(query.shape[:2]):
        seen = slice(start[row], length)
        key = np.array([*keys[row, head, seen], new[0][row, head, 0]], np.float64)
        value = np.array([*values[row, head, seen], new[1][row, head, 0]], np.float64)
        weights = np.exp(key @ query[row, head, 0] / math.sqrt(HEAD_DIM))
        count = math.ceil(round(sparsity * (len(key) - 1), 9))
        left = np.argsort(-weights[:-1])[count:]
        weights[left] = weights[left].mean() if len(left) else 0
        out[row, head, 0] = weights @ value / weights.sum()
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsity=st.floats(0.01, 1.0),
    cut=st.integers(1, SLOTS - 1),
    length=st.integers(0, SLOTS),
    start=st.tuples(*[st.integers(0, SLOTS)] * BATCH),
)
def test_a_token_attends_to_what_weighs_most_and_to_itself(
    seed, sparsity, cut, length, start
):
    new = draw(seed, 2, BATCH, HEADS, 1, HEAD_DIM)
    query = draw(seed + 1, BATCH, HEADS, 1, HEAD_DIM)
    whole = draw(seed + 2, 2, BATCH, HEADS, SLOTS, HEAD_DIM)
    past = tuple(tuple(np.split(x, [cut], axis=2)) for x in whole)
    begins = np.minimum(start, length).astype(np.int32)
    arguments = (query, tuple(new), past, begins, np.int32(length), sparsity)
    found, chosen = attend(*arguments)
    np.testing.assert_allclose(found, plain(*arguments), atol=2e-5, rtol=0)
    past_len = (length - begins)[:, None, None]
    total = np.sum(chosen.shares, axis=-1) + np.asarray(chosen.own)[..., 0]
    total += past_len * np.asarray(chosen.spread)[..., 0]
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert chosen.slots.shape[2] == kept_slots(sparsity, SLOTS)
    assert (np.asarray(chosen.slots) < SLOTS).all()


def test_with_everything_kept_it_is_plain_attention():
    new = tuple(draw(1, 2, BATCH, HEADS, 1, HEAD_DIM))
    query = draw(2, BATCH, HEADS, 1, HEAD_DIM)
    past = tuple((x,) for x in draw(3, 2, BATCH, HEADS, SLOTS, HEAD_DIM))
    arguments = query, new, past, np.array([0, 3, 17], np.int32), np.int32(17)
    found, _ = attend(*arguments, 1.0)
    expected = decode_attention(*jax.tree.map(jnp.asarray, arguments))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@given(st.floats(1e-15, 1.0), st.integers(0, 3000))
def test_the_fraction_that_is_kept_is_rounded_up(sparsity, slots):
    kept = kept_slots(sparsity, slots)
    assert sparsity * slots - 1e-6 <= kept < sparsity * slots + 1
    assert kept <= slots
    assert (kept > 0) == (slots > 0)


@pytest.mark.parametrize(("sparsity", "slots", "kept"), [(0.1, 30, 3), (0.7, 10, 7)])
def test_a_whole_number_is_not_rounded_up(sparsity, slots, kept):
    assert kept_slots(sparsity, slots) == kept
    assert kept_counts(sparsity, slots, jnp.array([slots, 0])).tolist() == [kept, 0]


def test_a_prompt_is_attended_to_whole_and_what_follows_it_sparsely():
    shape = 1, HEADS, SLOTS, HEAD_DIM
    query, key, value = (jnp.asarray(draw(seed, *shape)) for seed in (1, 2, 3))
    start, prompt_len = np.array([2], np.int32), 9
    out = sparse_prefill_attention(
        *(query, key, value, jnp.asarray(start)),
        sparsity=0.3,
        prompt_end=jnp.array([prompt_len]),
    )
    for slot in range(2, SLOTS):
        now = slice(slot, slot + 1)
        new = np.asarray(key)[:, :, now], np.asarray(value)[:, :, now]
        past = (np.asarray(key),), (np.asarray(value),)
        sparsity = 1.0 if slot < prompt_len else 0.3
        expected = plain(query[:, :, now], new, past, start, slot, sparsity)
        np.testing.assert_allclose(out[:, :, now], expected, atol=2e-5, rtol=0)
