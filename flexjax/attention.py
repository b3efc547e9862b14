"""Causal attention over left-padded rows, for prefill and for one decoded token.

Keys and values are laid out `[batch, heads, slots, head_dim]`: on CPU the other order,
`[batch, slots, heads, head_dim]`, is about ten times slower to attend over. A slot is a
position in the padded row; row `r` has real tokens from slot `start[r]` on.

Scores, softmax and sums are float32 whatever the type of the inputs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows to which a single query is padded where it has 16 bits: XLA's CPU backend
# multiplies one row by first converting the whole other side to float32, which takes 4
# times as long and twice the cache's memory. More rows cost more: 2, 4 and 16 read a
# bfloat16 cache of 160 slots of 64 elements at 20, 15 and 12 GB/s (jax 0.12, 2 cores
# with AVX-512).
MIN_ROWS = 2
# Finite, so that a row of padding, which may see no slot at all, stays finite too.
MASKED = -1e30
# So many queries of a row attend at a time; all of them where there are no more than
# `WHOLE_ROW`.
QUERY_CHUNK = 128
WHOLE_ROW = 256


class SharedPrefix(NamedTuple):
    """Keys and values of the tokens with which every row begins: those of one row.

    Attributes:
        key, value: `[1, heads, prefix_slots, head_dim]`.
        start: int32 `[1]`, the first slot that holds a real token.
    """

    key: Array
    value: Array
    start: Array


class Branches(NamedTuple):
    """Where a row holds several sequences that begin alike, one behind the other.

    What they share stands first, then the rest of each, its branch. A token sees what
    is shared, and of branches its own alone.

    Attributes:
        trunk_end: int32 `[batch]`, the slot behind what is shared. Of a row of one
            sequence that is any that it has, or the one behind the last.
        begin: int32 `[batch, seq]`, for each slot the first one of its branch;
            `trunk_end` for what is shared.
    """

    trunk_end: Array
    begin: Array


class Partial(NamedTuple):
    """What a token found in some of the slots that it sees, in float32.

    As of FlashAttention's online softmax (arXiv 2205.14135), from which one goes on
    with other slots.

    Attributes:
        peak: the largest score, `[batch, heads, 1, 1]`.
        total: the sum of the weights, where that score's weight is 1; same shape.
        values: the sum of the values, each times its weight, `[batch, heads, 1,
            head_dim]`.
    """

    peak: Array
    total: Array
    values: Array


def _dot(
    left: Array, right: Array, *, contract: tuple[int, int]
) -> Float[Array, "..."]:
    """Batched product over the leading axes, accumulated in float32."""
    batch = tuple(range(left.ndim - 2))
    exact = left.dtype == jnp.float32
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _padded(query: Array) -> Array:
    """`query` with rows of zeros where a single row would be slow."""
    if query.dtype == jnp.float32:
        return query
    rows = MIN_ROWS - query.shape[2]
    return jnp.pad(query, ((0, 0), (0, 0), (0, rows), (0, 0)))


def scaled(query: Array) -> Array:
    """A query such that its products with keys are scores."""
    return query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)


def prefill_attention_flops(batch: int, seq: int, hidden_size: int) -> int:
    """Of `prefill_attention` in one layer: the scores that it masks are computed too.

    Two products of all tokens with all, each a multiplication and an addition.
    """
    return 2 * 2 * batch * seq * seq * hidden_size


def prefix_attention_flops(num_tokens: int, prefix_slots: int, hidden_size: int) -> int:
    """Of the same two products with a shared prefix, for so many tokens of any rows."""
    return 2 * 2 * num_tokens * prefix_slots * hidden_size


def query_chunk(seq: int, prefix_slots: int) -> int:
    """Queries of a row that attend at a time, where it stands behind a prefix."""
    return seq if prefix_slots + seq <= WHOLE_ROW else math.gcd(seq, QUERY_CHUNK)


def prefill_attention(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch heads seq head_dim"],
    value: Float[Array, "batch heads seq head_dim"],
    start: Int[Array, " batch"],
    prefix: SharedPrefix | None = None,
    branches: Branches | None = None,
) -> Float[Array, "batch heads seq head_dim"]:
    """Every token attends to itself and to the real tokens before it.

    Those are the tokens of its own sequence, where rows hold several in `branches`.

    Works on one row and one chunk of queries at a time, so that the largest array of
    scores is `[heads, QUERY_CHUNK, prefix_slots + seq]`, or `[heads, WHOLE_ROW,
    WHOLE_ROW]`, and not `[batch, heads, seq, seq]`.
    """
    seq = query.shape[2]
    chunk = query_chunk(seq, 0 if prefix is None else prefix.key.shape[2])
    slots = jnp.arange(seq, dtype=jnp.int32)

    def attend_row(
        row: tuple[Array, Array, Array, Array, Branches | None],
    ) -> Array:
        query, key, value, first, branch = row

        def attend_chunk(begin: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(query, begin, chunk, axis=1)
            scores = _dot(scaled(part), key, contract=(2, 2))
            newest = begin + jnp.arange(chunk, dtype=jnp.int32)
            visible = (slots[None, :] <= newest[:, None]) & (slots >= first)[None, :]
            if branch is not None:
                own = jax.lax.dynamic_slice_in_dim(branch.begin, begin, chunk)
                visible &= (slots < branch.trunk_end) | (slots >= own[:, None])
            scores = jnp.where(visible[None], scores, MASKED)
            if prefix is not None:
                shared = _prefix_scores(scaled(part), prefix)
                scores = jnp.concatenate([shared, scores], axis=-1)
            weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
            out = _dot(weights[..., -seq:], value, contract=(2, 1))
            if prefix is not None:
                out += _dot(weights[..., :-seq], prefix.value[0], contract=(2, 1))
            return out.astype(query.dtype)

        out = jax.lax.map(attend_chunk, jnp.arange(0, seq, chunk, dtype=jnp.int32))
        return jnp.moveaxis(out, 0, 1).reshape(query.shape)

    return jax.lax.map(attend_row, (query, key, value, start, branches))


def _prefix_scores(
    query: Float[Array, "heads queries head_dim"], prefix: SharedPrefix
) -> Float[Array, "heads queries prefix_slots"]:
    """Of scaled queries of any rows, which all see the whole prefix."""
    slots = jnp.arange(prefix.key.shape[2], dtype=jnp.int32)
    scores = _dot(query, prefix.key[0], contract=(2, 2))
    return jnp.where(slots >= prefix.start, scores, MASKED)


def attend_to_prefix(
    query: Float[Array, "batch heads 1 head_dim"], prefix: SharedPrefix
) -> Partial:
    """What one new token of each row finds in the prefix.

    The queries of all rows are one side of two matrix products, so that the prefix is
    read once for all of them.
    """

    def by_row(found: Array) -> Array:  # from [heads, batch, ...]
        return jnp.swapaxes(found, 0, 1)[:, :, None]

    scores = _prefix_scores(jnp.swapaxes(scaled(query)[:, :, 0], 0, 1), prefix)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(prefix.value.dtype)
    values = _dot(weights, prefix.value[0], contract=(2, 1))
    return Partial(by_row(peak), by_row(total), by_row(values))


def _joined(one: Partial, other: Partial) -> Partial:
    """What two that saw different slots have found together."""
    peak = jnp.maximum(one.peak, other.peak)
    left, right = jnp.exp(one.peak - peak), jnp.exp(other.peak - peak)
    return Partial(
        peak,
        left * one.total + right * other.total,
        left * one.values + right * other.values,
    )


def decode_scores(
    query: Float[Array, "batch heads 1 head_dim"],
    new_key: Float[Array, "batch heads 1 head_dim"],
    keys: tuple[Float[Array, "batch heads _slots head_dim"], ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
) -> tuple[Float[Array, "batch heads 1 1"], list[Float[Array, "batch heads 1 _slots"]]]:
    """A new token's scores for itself, and for the slots of each piece of the cache.

    Slots that it may not see are `MASKED`. Arguments as of `decode_attention`.
    """
    query = scaled(query)
    padded, first = _padded(query), 0
    scores = []
    for key in keys:
        slots = first + jnp.arange(key.shape[2], dtype=jnp.int32)
        first += key.shape[2]
        visible = (slots[None, :] >= start[:, None]) & (slots < length)[None, :]
        piece = _dot(padded, key, contract=(3, 3))[:, :, :1]
        scores.append(jnp.where(visible[:, None, None, :], piece, MASKED))
    return _dot(query, new_key, contract=(3, 3)), scores


def weigh(
    shares: Float[Array, "batch heads 1 slots"],
    values: Float[Array, "batch heads slots head_dim"],
) -> Float[Array, "batch heads 1 head_dim"]:
    """The sum of `values`, each times its share; in float32."""
    padded = _padded(shares.astype(values.dtype))
    return _dot(padded, values, contract=(3, 2))[:, :, :1]


def decode_attention(
    query: Float[Array, "batch heads 1 head_dim"],
    new: tuple[Float[Array, "batch heads 1 head_dim"], ...],
    past: tuple[tuple[Float[Array, "batch heads _slots head_dim"], ...], ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    found: Partial | None = None,
) -> Float[Array, "batch heads 1 head_dim"]:
    """One new token attends to the cached ones and to itself.

    Args:
        query: of the new token.
        new: key and value of the new token, which are not in the cache yet.
        past: cached keys and values, each in pieces along its slots, in their order;
            slots from `length` on hold anything finite.
        start: first slot of each row that holds a real token.
        length: number of slots that are in use, the same for every row.
        found: what it has found elsewhere, which counts as much.
    """
    new_key, new_value = new
    own, scores = decode_scores(query, new_key, past[0], start, length)
    seen = Partial(own, jnp.ones_like(own), new_value.astype(jnp.float32))
    if found is not None:
        seen = _joined(seen, found)
    peak = seen.peak
    for piece in scores:
        peak = jnp.maximum(peak, jnp.max(piece, axis=-1, keepdims=True))
    shrunk = jnp.exp(seen.peak - peak)
    weights = [jnp.exp(piece - peak) for piece in scores]
    total = shrunk * seen.total
    for piece in weights:
        total = total + jnp.sum(piece, axis=-1, keepdims=True)
    out = (shrunk / total) * seen.values
    for piece, value in zip(weights, past[1], strict=True):
        out = out + weigh(piece / total, value)
    return out.astype(query.dtype)
