"""Log-probabilities of tokens, from whole rows of logits or from blocks of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreState:
    """What scoring remembers of the vocabulary blocks it has seen."""

    best: jax.Array  # float32 [*rows], the largest logit
    total: jax.Array  # float32 [*rows], sum of exp(logit - best)
    target: jax.Array  # float32 [*rows], the target's logit; -inf: not seen yet
    is_tied: jax.Array  # bool [*rows], whether a token before the target has its logit


def start_score(targets: Int[Array, "*rows"]) -> ScoreState:
    """The state before the first block."""
    nothing = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    return ScoreState(
        best=nothing,
        total=jnp.zeros_like(nothing),
        target=jnp.copy(nothing),
        is_tied=jnp.zeros(targets.shape, bool),
    )


@jax.jit
def fold_block(
    state: ScoreState,
    logits: Float[Array, "*rows block"],
    first_id: Int32[Array, ""] | int,
    targets: Int[Array, "*rows"],
) -> ScoreState:
    """Takes in the logits of tokens `first_id`, `first_id + 1`, ...

    Columns past the vocabulary's end must be -inf, or be left out.
    """
    logits = logits.astype(jnp.float32)
    best = jnp.maximum(state.best, logits.max(axis=-1))
    shift = jnp.where(jnp.isneginf(best), 0.0, best)  # -inf - -inf would be NaN
    fresh = jnp.exp(logits - shift[..., None]).sum(axis=-1)
    at = targets - first_id
    is_here = (at >= 0) & (at < logits.shape[-1])
    at = jnp.clip(at, 0, logits.shape[-1] - 1)[..., None]
    found = jnp.take_along_axis(logits, at, axis=-1)
    is_before = jnp.arange(logits.shape[-1]) < at
    is_tied = jnp.any(is_before & (logits == found), axis=-1)
    found = found[..., 0]
    return ScoreState(
        best=best,
        total=state.total * jnp.exp(state.best - shift) + fresh,
        target=jnp.where(is_here, found, state.target),
        is_tied=jnp.where(is_here, is_tied | (state.best == found), state.is_tied),
    )


@jax.jit
def finish_score(state: ScoreState) -> Float[Array, "*rows"]:
    """Log-probability of each target, once every block has been folded in."""
    return _logprob(state.target, state)


@jax.jit
def is_greedy(state: ScoreState) -> Bool[Array, "*rows"]:
    """Whether each target is what greedy decoding takes: of equal logits the first."""
    return (state.target == state.best) & ~state.is_tied


def _logprob(logits: Float[Array, "*rows"], state: ScoreState) -> Float[Array, "*rows"]:
    # Adding log(total) to best first would round away what large logits differ by.
    return (logits - state.best) - jnp.log(state.total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The chosen token of each row and the most likely ones, best first."""

    logprob: jax.Array  # float32 [batch]
    rank: jax.Array  # int32 [batch], 1: the most likely token
    top_ids: jax.Array  # int32 [batch, num_top]
    top_logprobs: jax.Array  # float32 [batch, num_top]


@functools.partial(jax.jit, static_argnames="num_top")
def token_logprobs(
    logits: Float[Array, "batch vocab"], ids: Int[Array, "batch"], *, num_top: int
) -> TokenLogprobs:
    """Log-probabilities of `ids` and of the `num_top` best, as the model gave them.

    Of tokens that tie, the lower id ranks first: `top_ids[rank - 1]` is the chosen
    token whenever its rank is at most `num_top`.
    """
    state = fold_block(start_score(ids), logits, 0, ids)
    chosen = state.target[:, None]
    is_before = jnp.arange(logits.shape[-1]) < ids[:, None]
    num_better = (logits > chosen) | ((logits == chosen) & is_before)
    top, top_ids = jax.lax.top_k(logits, num_top)
    return TokenLogprobs(
        logprob=_logprob(state.target, state),
        rank=num_better.sum(axis=-1, dtype=jnp.int32) + 1,
        top_ids=top_ids.astype(jnp.int32),
        top_logprobs=jax.vmap(_logprob, (1, None), 1)(top, state),
    )
