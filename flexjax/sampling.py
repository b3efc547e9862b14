"""From logits to token ids, one row at a time: no row sees another.

A row's random numbers depend on its key and on how many tokens it has generated, never
on its place in a batch, its neighbours, or the filters in use. The order is vLLM's:
penalties, temperature, then min-p, top-k and top-p, each on what the one before left.
Tokens that tie with the last one kept are kept too. Logits that are NaN, or a row of
nothing but -inf, give some token id inside the vocabulary: checking is the caller's.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from flexjax.sampling_params import GREEDY_BELOW, SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """What each row asks of sampling."""

    temperature: jax.Array  # float32 [batch], 0: greedy
    top_k: jax.Array  # int32 [batch], 0 or less: all
    top_p: jax.Array  # float32 [batch], 1: all
    min_p: jax.Array  # float32 [batch], 0: all
    repetition_penalty: jax.Array  # float32 [batch], 1: none
    key: jax.Array  # uint32 [batch, 2], threefry key data
    step: jax.Array  # int32 [batch], tokens that the row has generated


Sampler = Callable[[Float[Array, "batch vocab"], Controls], Int32[Array, "batch"]]


def make_controls(
    params: Sequence[SamplingParams],
    key: UInt32[np.ndarray, "batch 2"],
    step: Int[np.ndarray, "batch"],
) -> Controls:
    """Gathers the settings of a batch's rows."""

    def column(name: str, dtype: DTypeLike) -> jax.Array:
        return jnp.asarray([getattr(row, name) for row in params], dtype)

    return Controls(
        temperature=column("temperature", jnp.float32),
        top_k=column("top_k", jnp.int32),
        top_p=column("top_p", jnp.float32),
        min_p=column("min_p", jnp.float32),
        repetition_penalty=column("repetition_penalty", jnp.float32),
        key=jnp.asarray(key, jnp.uint32),
        step=jnp.asarray(step, jnp.int32),
    )


def row_keys(
    params: Sequence[SamplingParams], index: Sequence[int], *, seed: int
) -> UInt32[np.ndarray, "batch 2"]:
    """A key a row: its own seed's, else one of the engine's `seed` and its `index`."""
    data = jnp.asarray(_key_data(seed))
    engine = jax.random.wrap_key_data(data, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, (None, 0))(engine, np.asarray(index, np.uint32))
    shared = np.asarray(jax.random.key_data(keys))
    rows = zip(params, shared, strict=True)
    return np.stack([k if p.seed is None else _key_data(p.seed) for p, k in rows])


def _key_data(seed: int) -> UInt32[np.ndarray, "2"]:
    """What `jax.random.key(seed)` holds, but with 64-bit seeds in any setting."""
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def pick_sampler(params: Iterable[SamplingParams]) -> Sampler:
    """The cheapest of the three samplers that does what every row asks for."""
    drawn = [row for row in params if not row.is_greedy]
    if not drawn:
        return greedy
    return draw_filtered if any(row.has_filter for row in drawn) else draw


@jax.jit
def greedy(
    logits: Float[Array, "batch vocab"], controls: Controls
) -> Int32[Array, "batch"]:
    """The most likely token of each row; the first of those that tie."""
    del controls  # here so that all samplers are called alike
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@jax.jit
def draw(
    logits: Float[Array, "batch vocab"], controls: Controls
) -> Int32[Array, "batch"]:
    """Draws a token by its probability at the row's temperature."""
    scores = _tempered(logits, controls) + _gumbel(controls, logits.shape[-1])
    return _best(logits, scores, controls)


@jax.jit
def draw_filtered(
    logits: Float[Array, "batch vocab"], controls: Controls
) -> Int32[Array, "batch"]:
    """Draws a token from those that min-p, top-k and top-p leave."""
    tempered = _tempered(logits, controls)
    scores = tempered + _gumbel(controls, logits.shape[-1])
    scores = jnp.where(kept(logits, controls), scores, -jnp.inf)
    return _best(logits, scores, controls)


def _best(
    logits: Float[Array, "batch vocab"],
    scores: Float[Array, "batch vocab"],
    controls: Controls,
) -> Int32[Array, "batch"]:
    is_greedy = (controls.temperature < GREEDY_BELOW)[:, None]
    return jnp.argmax(jnp.where(is_greedy, logits, scores), axis=-1).astype(jnp.int32)


def _tempered(
    logits: Float[Array, "batch vocab"], controls: Controls
) -> Float[Array, "batch vocab"]:
    """Logits over temperature, shifted so that the best is 0: then none overflows."""
    temperature = controls.temperature
    divisor = jnp.where(temperature < GREEDY_BELOW, 1.0, temperature)
    return (logits - logits.max(axis=-1, keepdims=True)) / divisor[:, None]


def _gumbel(controls: Controls, vocab_size: int) -> Float[Array, "batch vocab"]:
    """Noise whose argmax, added to logits, draws from their softmax.

    All 32 random bits count: `jax.random.gumbel` uses 23, which is so coarse near its
    top that a large vocabulary ties, and ties favour low ids.
    """

    def of_row(data: UInt32[Array, "2"], step: Int32[Array, ""]) -> UInt32[Array, "v"]:
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, step), (vocab_size,), jnp.uint32)

    bits = jax.vmap(of_row)(controls.key, controls.step)
    below_one = 1.0 - 2.0**-24
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, below_one)
    noise = -jnp.log(-jnp.log1p(-uniform))
    # Fused into what follows, it would be computed by scalar code, and more than once.
    return jax.lax.optimization_barrier(noise)


_LAST_KEY = 0x7F800000  # the bits of infinity: the key of the least likely token


@jax.jit
def kept(
    logits: Float[Array, "batch vocab"], controls: Controls
) -> Bool[Array, "batch vocab"]:
    """Which tokens the row's filters leave to draw from."""
    tempered = _tempered(logits, controls)
    # No logit is above 0, so the bits of its distance from 0 order the tokens, and a
    # search over them finds each threshold exactly, without sorting.
    keys = jax.lax.bitcast_convert_type(jnp.abs(tempered), jnp.int32)
    is_kept = tempered >= jnp.log(controls.min_p)[:, None]

    needed = jnp.where(controls.top_k > 0, controls.top_k, tempered.shape[-1])
    is_on = needed < tempered.shape[-1]
    last = _last_needed(keys, jnp.ones_like(keys), needed=needed, is_on=is_on)
    is_kept &= keys <= last[:, None]

    mass = jnp.where(is_kept, jnp.exp(tempered), 0.0)
    needed = controls.top_p * mass.sum(axis=-1)
    last = _last_needed(keys, mass, needed=needed, is_on=controls.top_p < 1.0)
    return is_kept & (keys <= last[:, None])


def _last_needed(
    keys: Int32[Array, "batch vocab"],
    weights: Array,
    *,
    needed: Array,
    is_on: Bool[Array, "batch"],
) -> Int32[Array, "batch"]:
    """The least key up to which a row's weights sum to what it needs.

    Rows that are not `is_on` answer with the last key of all, and cost nothing if every
    row is so.
    """

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        found = jnp.where(keys <= middle[:, None], weights, 0).sum(axis=-1)
        is_enough = (found >= needed) | (low == high)
        return jnp.where(is_enough, low, middle + 1), jnp.where(is_enough, middle, high)

    last = jnp.full(is_on.shape, _LAST_KEY, jnp.int32)
    bounds = (jnp.where(is_on, 0, last), last)
    return jax.lax.while_loop(lambda b: jnp.any(b[0] < b[1]), narrow, bounds)[1]


@jax.jit
def penalize(
    logits: Float[Array, "batch vocab"],
    token_ids: Int[Array, "batch length"],
    penalty: Float[Array, "batch"],
) -> Float[Array, "batch vocab"]:
    """Makes tokens less likely that are among `token_ids` (rows padded with -1)."""
    batch, vocab_size = logits.shape
    # A negative index would count from the end; one past the end is dropped.
    targets = jnp.where(token_ids < 0, vocab_size, token_ids)
    seen = jnp.zeros(logits.shape, bool)
    seen = seen.at[jnp.arange(batch)[:, None], targets].set(True, mode="drop")
    by = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)
