"""The jitted steps of a run: one call of one layer on one batch.

Each is compiled once for every shape that occurs, whatever the number of layers, tokens
and prompts, and donates what it replaces. Hidden states are `[batch, 1, seq, hidden]`
here, the layout in which the tiers hold them.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.attention import (
    Branches,
    SharedPrefix,
    attend_to_prefix,
    prefill_attention,
)
from flexjax.cached_attention import (
    HeadVectors,
    KeyValue,
    Past,
    attend,
    in_groups,
)
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
from flexjax.quant import (
    Quantization,
    QuantizedArray,
    passed_through,
    quantize,
)
from flexjax.sparse import SparsePast
from flexjax.workload import PREFIX_ROWS, prefill_rows

Hidden = Float[Array, "batch 1 seq hidden"]
SCORE_CHUNK = 256  # tokens whose logits exist at the same time while scoring


@functools.partial(jax.jit, static_argnames="config")
def embed_step(
    params: Params,
    rows: Float[Array, "batch seq embed"],
    origin: Int[Array, " batch"],
    first_slot: Int[Array, ""],
    branches: Branches | None = None,
    *,
    config: OPTConfig,
) -> Hidden:
    """Token rows, which stand in slots from `first_slot` on, become hidden states.

    Slot `origin[r]` of row `r` is that of its position 0. Positions of each of a row's
    branches go on from what it shares.
    """
    slots = first_slot + jnp.arange(rows.shape[1], dtype=jnp.int32)
    origins = origin[:, None]
    if branches is not None:
        origins += branches.begin - branches.trunk_end[:, None]
    positions = token_positions(slots, origins)
    return apply(Embedding(config), params, rows, positions)[:, None]


@functools.partial(
    jax.jit,
    static_argnames=("config", "cache_as", "is_prefix"),
    donate_argnames="hidden",
)
def prefill_step(
    params: Params,
    hidden: Hidden,
    start: Int[Array, " batch"],
    prefix: SharedPrefix | None = None,
    branches: Branches | None = None,
    *,
    config: OPTConfig,
    cache_as: Quantization | None = None,
    is_prefix: bool = False,
) -> tuple[Hidden, KeyValue]:
    """A decoder layer on whole prompts; also returns the keys and values to cache.

    A row may hold several, as `branches` say.

    Where there is a `prefix`, prompts stand behind it; what `is_prefix` is cached as it
    is attended to, being one row for all, and gives what it would in a cache.

    Where the cache is quantized, a prompt attends to what a later token will find
    there: so a prefill computes what decoding the same tokens would.

    Works on some rows of the batch at a time, so that what lies between the layer's
    matrices, four times as wide as its hidden state, is never there for all of them.
    """
    batch, seq = hidden.shape[0], hidden.shape[2]

    def run(
        inputs: tuple[Array, Array, Branches | None],
    ) -> tuple[Array, tuple[Array, Array]]:
        hidden, start, branches = inputs

        def attend(query: Array, key: Array, value: Array) -> Array:
            key, value = (passed_through(new, cache_as) for new in (key, value))
            return prefill_attention(query, key, value, start, prefix, branches)

        out, cache = apply(DecoderLayer(config), params, hidden[:, 0], attend)
        if is_prefix:
            key, value = cache
            return out[:, None], (
                passed_through(key, cache_as),
                passed_through(value, cache_as),
            )
        return out[:, None], _kept(cache, cache_as)

    rows = prefill_rows(batch, seq)
    return in_groups(run, (hidden, start, branches), rows, batch=batch)


@functools.partial(
    jax.jit,
    static_argnames=("config", "cache_as"),
    donate_argnames="hidden",
)
def decode_step(
    params: Params,
    hidden: Hidden,
    past: tuple[Past, ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    beside: SparsePast | SharedPrefix | None = None,
    *,
    config: OPTConfig,
    cache_as: Quantization | None = None,
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
        beside: what attention takes beside the cache: where it is sparse, the sum of
            all values; or a prefix that stands before all rows.
        config: of the model.
        cache_as: how the cache is quantized.
    """
    query, new, cache = _project(params, hidden, config, cache_as)
    sparse, found = None, None
    if isinstance(beside, SharedPrefix):
        groups = [
            attend_to_prefix(query[first : first + PREFIX_ROWS], beside)
            for first in range(0, len(query), PREFIX_ROWS)
        ]
        found = jax.tree.map(lambda *parts: jnp.concatenate(parts), *groups)
    else:
        sparse = beside
    outs, first = [], 0
    for segment in past:
        rows = slice(first, first + segment[0][0].shape[0])
        new_rows, sparse_rows, found_rows = jax.tree.map(
            operator.itemgetter(rows), (new, sparse, found)
        )
        of_rows = query[rows], new_rows, segment, start[rows]
        outs.append(attend(*of_rows, length, sparse_rows, cache_as, found_rows))
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
    table: Float[Array, "block embed"] | QuantizedArray,
    hidden: Float[Array, "batch 1 1 embed"],
) -> Float[Array, "batch block"]:
    """Logits of one block of the vocabulary."""
    return contract_last(hidden[:, 0, 0], table)


@functools.partial(jax.jit, donate_argnames="state")
def score_step(
    state: ScoreState,
    table: Float[Array, "block embed"] | QuantizedArray,
    hidden: Float[Array, "batch 1 seq embed"],
    first_id: Int[Array, ""],
    targets: Int[Array, "batch seq"],
) -> tuple[ScoreState, Array]:
    """Takes one block of the vocabulary into the scores of all tokens.

    Works on `SCORE_CHUNK` tokens at a time, so that no `[batch, seq, block]` exists.

    Returns:
        The new state, and one element of it to wait for, since the next block donates
        the state itself.
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
    state = jax.tree.map(
        lambda array: array.reshape(targets.shape), jax.lax.map(fold, inputs)
    )
    return state, jax.tree.leaves(state)[0].reshape(-1)[:1]
