"""The jitted steps against each other and against plain arithmetic."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax import workload
from flexjax.logprobs import finish_score, start_score
from flexjax.models.config import OPTConfig, decoder_layer_shapes
from flexjax.models.opt import unflatten
from flexjax.steps import (
    decode_step,
    embed_step,
    final_step,
    head_step,
    prefill_step,
    score_step,
)
from flexjax.workload import prefill_rows

PRE_NORM = OPTConfig(
    hidden_size=16, num_attention_heads=2, ffn_dim=48, max_position_embeddings=40
)
POST_NORM = dataclasses.replace(
    PRE_NORM, do_layer_norm_before=False, activation_function="gelu", enable_bias=False
)
CONFIGS = {"pre-norm": PRE_NORM, "post-norm": POST_NORM}


def random_array(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def layer_params(config: OPTConfig) -> dict:
    shapes = decoder_layer_shapes(config)
    return unflatten(
        {
            name: random_array(i, *shape) / np.float32(shape[-1] ** 0.5)
            for i, (name, shape) in enumerate(shapes.items())
        }
    )


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("segments", [(4,), (1, 3), (2, 1, 1)])
def test_decoding_a_token_is_prefilling_a_longer_prompt(name, segments):
    config = CONFIGS[name]
    params, hidden = layer_params(config), random_array(99, 4, 1, 9, 16)
    start = jnp.asarray(np.array([0, 3, 7, 8], np.int32))
    whole, (keys, values) = prefill_step(params, hidden.copy(), start, config=config)
    _, before = prefill_step(params, hidden[:, :, :8], start, config=config)

    # The rows of the cache lie on several tiers, each with room for more slots and in
    # two pieces.
    def pad(slots):
        return ((0, 0), (0, 0), (0, slots), (0, 0))

    firsts = np.cumsum([0, *segments])
    past = tuple(
        tuple(
            (x[first:last, :, :5], jnp.pad(x[first:last, :, 5:], pad(5 + i)))
            for x in before
        )
        for i, (first, last) in enumerate(itertools.pairwise(firsts.tolist()))
    )
    out, (key, value) = decode_step(
        params, hidden[:, :, 8:], past, start, jnp.int32(8), config=config
    )
    close(out, whole[:, :, 8:])
    close(key, keys[:, :, 8:])
    close(value, values[:, :, 8:])


@pytest.mark.parametrize("tokens", [1, 18, 27, 54, 1000])
def test_a_prefill_in_groups_of_rows_is_the_whole_one(tokens, monkeypatch):
    params, hidden = layer_params(PRE_NORM), random_array(7, 6, 1, 9, 16)
    start = jnp.asarray(np.array([0, 8, 2, 3, 5, 1], np.int32))
    whole = prefill_step(params, hidden.copy(), start, config=PRE_NORM)
    monkeypatch.setattr(workload, "PREFILL_TOKENS", tokens)
    uncached = prefill_step.__wrapped__
    grouped = uncached(params, hidden, start, config=PRE_NORM)
    jax.tree.map(close, grouped, whole)


@given(st.integers(1, 200), st.integers(1, 5000))
def test_prefill_rows_are_the_most_that_divide_the_batch(batch_size, seq_len):
    rows = prefill_rows(batch_size, seq_len)
    assert batch_size % rows == 0
    assert rows == 1 or rows * seq_len <= workload.PREFILL_TOKENS
    for more in range(rows + 1, batch_size + 1):
        assert batch_size % more or more * seq_len > workload.PREFILL_TOKENS


@settings(max_examples=6)
@given(
    cuts=st.sets(st.integers(1, 50), max_size=5),
    shape=st.sampled_from([(1, 2), (2, 288)]),
)
def test_scores_over_any_blocks_are_the_log_softmax(cuts, shape):
    batch, seq = shape
    table, hidden = random_array(1, 51, 8), random_array(2, batch, 1, seq, 8)
    targets = np.random.default_rng(3).integers(0, 51, (batch, seq)).astype(np.int32)
    state = start_score(jnp.asarray(targets))
    edges, ended = [0, *sorted(cuts), 51], []
    for first, last in itertools.pairwise(edges):
        state, done = score_step(
            state, table[first:last], hidden, jnp.int32(first), jnp.asarray(targets)
        )
        ended.append(done)
    jax.block_until_ready(ended)  # no later block has taken what was to be waited for
    logits = np.asarray(hidden[:, 0], np.float64) @ np.asarray(table, np.float64).T
    total = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    close(finish_score(state), chosen - total)


def test_the_head_over_blocks_is_the_head():
    table, hidden = random_array(1, 51, 8), random_array(2, 3, 1, 1, 8)
    blocks = [head_step(table[first : first + 20], hidden) for first in (0, 20, 40)]
    whole = head_step(table, hidden)
    close(jnp.concatenate(blocks, axis=1), whole)
    close(whole, np.asarray(hidden)[:, 0, 0] @ np.asarray(table).T)


def test_the_last_slot_alone_is_the_last_of_all_slots():
    config = dataclasses.replace(PRE_NORM, word_embed_proj_dim=8)
    params = unflatten(
        {
            "final_layer_norm.weight": random_array(1, 16),
            "final_layer_norm.bias": random_array(2, 16),
            "project_out.weight": random_array(3, 8, 16),
        }
    )
    hidden = random_array(4, 3, 1, 5, 16)
    whole = final_step(params, hidden, config=config, last_only=False)
    last = final_step(params, hidden, config=config, last_only=True)
    assert whole.shape == (3, 1, 5, 8)
    close(last, whole[:, :, -1:])


def test_positions_count_real_tokens_wherever_the_step_begins():
    params = unflatten({"embed_positions.weight": random_array(1, 42, 16)})
    rows, start = random_array(2, 2, 6, 16), jnp.asarray(np.array([0, 4], np.int32))
    table = np.asarray(params["embed_positions"]["weight"])
    whole = embed_step(params, rows, start, jnp.int32(0), config=PRE_NORM)
    close(whole[0, 0], np.asarray(rows[0]) + table[2:8])
    close(whole[1, 0, 4:], np.asarray(rows[1, 4:]) + table[2:4])
    assert np.isfinite(np.asarray(whole)).all()
    token = embed_step(params, rows[:, 5:], start, jnp.int32(5), config=PRE_NORM)
    close(token, whole[:, :, 5:])
