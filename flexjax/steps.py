"""The jitted steps of a run: one call of one layer on one batch.

Each is compiled once for every shape that occurs, whatever the number of layers, tokens
and prompts, and donates what it replaces. Hidden states are `[batch, 1, seq, hidden]`
here, the layout in which the tiers hold them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from flexjax.attention import decode_attention, prefill_attention
from flexjax.logprobs import ScoreState, fold_block
from flexjax.models.config import OPTConfig
from flexjax.models.opt import (
    DecoderLayer,
    Embedding,
    Final,
    Params,
    apply,
    contract_last,
    token_positions,
)
from flexjax.quant import Quantization, dequantize, passed_through, quantize
from flexjax.sparse import Selection, combine, gather, select
from flexjax.workload import prefill_rows, wide_rows

Hidden = Float[Array, "batch 1 seq hidden"]
# Segments of a cache differ in their rows, their pieces in their slots. A head's
# elements are bytes where the cache is quantized.
_KeyOrValue = Shaped[Array, "_rows heads _slots _width"]
KeyValue = tuple[_KeyOrValue, _KeyOrValue]
HeadVectors = Float[Array, "_rows heads 1 head_dim"]
Past = tuple[tuple[_KeyOrValue, ...], tuple[_KeyOrValue, ...]]
SCORE_CHUNK = 256  # tokens whose logits exist at the same time while scoring


@functools.partial(jax.jit, static_argnames="config")
def embed_step(
    params: Params,
    rows: Float[Array, "batch seq embed"],
    start: Int[Array, " batch"],
    first_slot: Int[Array, ""],
    *,
    config: OPTConfig,
) -> Hidden:
    """Token rows, which stand in slots from `first_slot` on, become hidden states."""
    slots = first_slot + jnp.arange(rows.shape[1], dtype=jnp.int32)
    positions = token_positions(slots, start)
    return apply(Embedding(config), params, rows, positions)[:, None]


@functools.partial(
    jax.jit, static_argnames=("config", "cache_as"), donate_argnames="hidden"
)
def prefill_step(
    params: Params,
    hidden: Hidden,
    start: Int[Array, " batch"],
    *,
    config: OPTConfig,
    cache_as: Quantization | None = None,
) -> tuple[Hidden, KeyValue]:
    """A decoder layer on whole prompts; also returns the keys and values to cache.

    Where the cache is quantized, a prompt attends to what a later token will find
    there: so a prefill computes what decoding the same tokens would.

    Works on some rows of the batch at a time, so that what lies between the layer's
    matrices, four times as wide as its hidden state, is never there for all of them.
    """
    batch, seq = hidden.shape[0], hidden.shape[2]

    def run(inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        hidden, start = inputs

        def attend(query: Array, key: Array, value: Array) -> Array:
            key, value = (passed_through(new, cache_as) for new in (key, value))
            return prefill_attention(query, key, value, start)

        out, cache = apply(DecoderLayer(config), params, hidden[:, 0], attend)
        return out[:, None], _kept(cache, cache_as)

    rows = prefill_rows(batch, seq)
    return _in_groups(run, (hidden, start), rows, batch=batch)


@functools.partial(
    jax.jit,
    static_argnames=("config", "cache_as", "sparsity"),
    donate_argnames="hidden",
)
def decode_step(
    params: Params,
    hidden: Hidden,
    past: tuple[Past, ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    *,
    config: OPTConfig,
    cache_as: Quantization | None = None,
    sparsity: float = 1.0,
) -> tuple[Hidden, KeyValue]:
    """A decoder layer on one new token a row.

    It is `project_step`, `attend_step` and `finish_step` in one.

    Args:
        params: of the layer.
        hidden: of the new tokens.
        past: cached keys and values; each segment holds some rows of the batch, in
            pieces along its slots; all segments together hold them all, in order.
        start: first slot of each row that holds a real token.
        length: slots of the cache that are in use.
        config: of the model.
        cache_as: how the cache is quantized.
        sparsity: fraction of the past that is attended to.
    """
    query, new, cache = _project(params, hidden, config, cache_as)
    outs, first = [], 0
    for segment in past:
        rows = slice(first, first + segment[0][0].shape[0])
        of_rows = query[rows], (new[0][rows], new[1][rows]), segment, start[rows]
        outs.append(_attend(*of_rows, length, cache_as, sparsity))
        first = rows.stop
    return _finish(params, hidden, jnp.concatenate(outs), config), cache


@functools.partial(jax.jit, static_argnames=("config", "cache_as"))
def project_step(
    params: Params,
    hidden: Hidden,
    *,
    config: OPTConfig,
    cache_as: Quantization | None = None,
) -> tuple[HeadVectors, KeyValue, KeyValue]:
    """The part of a decoder layer that comes before attention to the cache.

    Returns:
        The query, key and value of the new tokens, as attention uses them, and key and
        value as the cache keeps them.
    """
    return _project(params, hidden, config, cache_as)


@functools.partial(jax.jit, static_argnames=("cache_as", "sparsity"))
def attend_step(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    *,
    cache_as: Quantization | None = None,
    sparsity: float = 1.0,
) -> HeadVectors:
    """Attention of new tokens to a segment of the cache, on the device that has it."""
    return _attend(query, new, past, start, length, cache_as, sparsity)


@functools.partial(jax.jit, static_argnames=("cache_as", "sparsity"))
def select_step(
    query: HeadVectors,
    new_key: HeadVectors,
    keys: tuple[_KeyOrValue, ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    *,
    cache_as: Quantization | None = None,
    sparsity: float,
) -> Selection:
    """Which slots of one segment new tokens attend to, found by its keys alone."""

    def choose(inputs: Any) -> Selection:
        query, new_key, keys, start = inputs
        return select(query, new_key, _wide(keys, cache_as), start, length, sparsity)

    inputs = query, new_key, keys, start
    return _few_wide(choose, inputs, cache_as, len(query))


@functools.partial(jax.jit, static_argnames="cache_as")
def combine_step(
    selection: Selection,
    new_value: HeadVectors,
    values: _KeyOrValue,
    *,
    cache_as: Quantization | None = None,
) -> HeadVectors:
    """What attention to a segment gives, of the values that `select_step` chose."""
    return combine(selection, new_value, _wide(values, cache_as))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="hidden")
def finish_step(
    params: Params,
    hidden: Hidden,
    attended: tuple[HeadVectors, ...],
    *,
    config: OPTConfig,
) -> tuple[Hidden, Float[Array, "1"]]:
    """The part of a decoder layer that comes after attention to all segments.

    Returns:
        The new hidden state, and one element of it to wait for, since a later call may
        donate the state itself.
    """
    hidden = _finish(params, hidden, jnp.concatenate(attended), config)
    return hidden, hidden.reshape(-1)[:1]


def _project(
    params: Params, hidden: Hidden, config: OPTConfig, cache_as: Quantization | None
) -> tuple[HeadVectors, KeyValue, KeyValue]:
    query, key, value = apply(
        DecoderLayer(config), params, hidden[:, 0], method="project"
    )
    new = passed_through(key, cache_as), passed_through(value, cache_as)
    return query, new, _kept((key, value), cache_as)


def _finish(
    params: Params, hidden: Hidden, attended: HeadVectors, config: OPTConfig
) -> Hidden:
    layer = DecoderLayer(config)
    return apply(layer, params, hidden[:, 0], attended, method="finish")[:, None]


def _kept(cache: KeyValue, cache_as: Quantization | None) -> KeyValue:
    """What the cache keeps of new keys and values."""
    if cache_as is None:
        return cache
    key, value = cache
    return quantize(key, cache_as), quantize(value, cache_as)


def _wide(cache: Any, cache_as: Quantization | None) -> Any:
    """Keys, values, or a tree of them, as attention uses them."""
    if cache_as is None:
        return cache
    return jax.tree.map(lambda piece: dequantize(piece, cache_as), cache)


def _in_groups[Out](
    call: Callable[[Any], Out], inputs: Any, rows: int, *, batch: int
) -> Out:
    """`call` on `rows` rows at a time of trees of arrays that begin with the batch."""
    if rows == batch:
        return call(inputs)
    grouped = jax.tree.map(
        lambda array: array.reshape(batch // rows, rows, *array.shape[1:]), inputs
    )
    return jax.tree.map(
        lambda array: array.reshape(batch, *array.shape[2:]),
        jax.lax.map(call, grouped),
    )


def _few_wide[Out](
    call: Callable[[Any], Out], inputs: Any, cache_as: Quantization | None, batch: int
) -> Out:
    """`call`, with a few rows at a time where they are quantized.

    So what becomes of them stays in the processor's caches.
    """
    rows = batch if cache_as is None else wide_rows(batch)
    return _in_groups(call, inputs, rows, batch=batch)


def _attend(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    cache_as: Quantization | None,
    sparsity: float,
) -> HeadVectors:
    """Attention to a segment as the cache keeps it."""

    def attend(inputs: tuple[Array, KeyValue, Past, Array]) -> HeadVectors:
        query, new, past, start = inputs
        if sparsity == 1:
            return decode_attention(query, new, _wide(past, cache_as), start, length)
        keys, values = past
        keys = _wide(keys, cache_as)
        selection = select(query, new[0], keys, start, length, sparsity)
        chosen = _wide(gather(values, selection.slots), cache_as)
        return combine(selection, new[1], chosen)

    return _few_wide(attend, (query, new, past, start), cache_as, len(query))


@functools.partial(jax.jit, static_argnames=("config", "last_only"))
def final_step(
    params: Params, hidden: Hidden, *, config: OPTConfig, last_only: bool
) -> Float[Array, "batch 1 seq_or_1 embed"]:
    """What the head reads: the final norm and 350m's projection.

    With `last_only`, of the last slot alone: left padding puts every row's newest token
    there.
    """
    if last_only:
        hidden = hidden[:, :, -1:]
    return apply(Final(config), params, hidden)


@jax.jit
def head_step(
    table: Float[Array, "block embed"], hidden: Float[Array, "batch 1 1 embed"]
) -> Float[Array, "batch block"]:
    """Logits of one block of the vocabulary."""
    return contract_last(hidden[:, 0, 0], table)


@functools.partial(jax.jit, donate_argnames="state")
def score_step(
    state: ScoreState,
    table: Float[Array, "block embed"],
    hidden: Float[Array, "batch 1 seq embed"],
    first_id: Int[Array, ""],
    targets: Int[Array, "batch seq"],
) -> ScoreState:
    """Takes one block of the vocabulary into the scores of all tokens.

    Works on `SCORE_CHUNK` tokens at a time, so that no `[batch, seq, block]` exists.
    """
    count = targets.size
    chunk = math.gcd(count, SCORE_CHUNK)

    def fold(inputs: tuple[ScoreState, Array, Array]) -> ScoreState:
        state, hidden, targets = inputs
        return fold_block(state, contract_last(hidden, table), first_id, targets)

    def chunked(array: Array, *inner: int) -> Array:
        return array.reshape(count // chunk, chunk, *inner)

    inputs = (
        jax.tree.map(chunked, state),
        chunked(hidden, hidden.shape[-1]),
        chunked(targets),
    )
    return jax.tree.map(
        lambda array: array.reshape(targets.shape), jax.lax.map(fold, inputs)
    )
