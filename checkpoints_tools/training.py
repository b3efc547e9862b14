"""Trains a small OPT on one stream of tokens: batches, loss, optimiser, evaluation.

The modules are those that inference uses; only attention differs, because a whole batch
of short windows fits in memory at once and is then cheaper to differentiate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from flexjax.models.config import OPTConfig, tensor_shapes
from flexjax.models.opt import forward, unflatten

# Called with the number of steps done, the mean loss since the last call, the weights.
Report = Callable[[int, float, Any], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the outcome of a training run besides text and model."""

    steps: int = 2400
    tokens_per_step: int = 2048
    window: int = 256  # tokens of a row
    long_window: int = 512  # of a row in the last steps, so that late positions learn
    long_steps: int = 300
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    dtype: str = "bfloat16"  # of activations and gradients; weights are float32
    seed: int = 0
    report_every: int = 100


@dataclasses.dataclass(frozen=True)
class Stream:
    """A text as one row of tokens; documents are separated by the end token."""

    tokens: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " paragraphs"]  # where a paragraph begins, ascending


def draw_rows(
    rng: np.random.Generator, stream: Stream, window: int, *, rows: int, bos: int
) -> Int[np.ndarray, "rows window+1"]:
    """Random windows, each behind the token that every prompt begins with.

    A window begins with a paragraph, as a prompt would, unless that would move it by
    more than half its length.
    """
    drawn = rng.integers(0, len(stream.tokens) - window, rows)
    paragraph = stream.starts[np.searchsorted(stream.starts, drawn, side="right") - 1]
    first = np.where(drawn - paragraph <= window // 2, paragraph, drawn)
    body = stream.tokens[first[:, None] + np.arange(window)]
    return np.concatenate([np.full((rows, 1), bos, body.dtype), body], axis=1)


def initial_weights(config: OPTConfig, seed: int) -> dict[str, Any]:
    """Float32 parameters; what is added to the residual stream starts smaller."""
    rng = np.random.default_rng(seed)
    residual_scale = (2 * config.num_hidden_layers) ** -0.5

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            norm = "layer_norm.weight" in name
            return np.full(shape, float(norm), np.float32)
        small = name.endswith(("out_proj.weight", "fc2.weight"))
        std = 0.02 * (residual_scale if small else 1.0)
        return rng.normal(0.0, std, shape).astype(np.float32)

    shapes = tensor_shapes(config)
    return unflatten({n: jnp.asarray(draw(n, shape)) for n, shape in shapes.items()})


def causal_attention(
    query: Float[Array, "batch heads seq head_dim"],
    key: Float[Array, "batch heads seq head_dim"],
    value: Float[Array, "batch heads seq head_dim"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch heads seq head_dim"]:
    """Attention over rows without padding (`start` is 0), all scores at once."""
    del start
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    seq, head_dim = query.shape[2:]
    scores = product("bhqd,bhkd->bhqk", query, key) * head_dim**-0.5
    visible = jnp.tril(jnp.ones((seq, seq), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = product("bhqk,bhkd->bhqd", weights.astype(value.dtype), value)
    return out.astype(query.dtype)


def token_losses(
    params: Any, rows: Int[Array, "batch seq+1"], config: OPTConfig, dtype: str
) -> Float[Array, "batch seq"]:
    """Minus the log-probability of every token of `rows` after the first of each."""
    params = jax.tree.map(lambda weight: weight.astype(dtype), params)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    start = jnp.zeros(inputs.shape[0], jnp.int32)
    logits = forward(params, inputs, start, config, attention=causal_attention)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW behind a gradient clip; warm-up, then a cosine to a tenth of a percent."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.peak_learning_rate,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.steps,
        end_value=recipe.peak_learning_rate / 1000,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            rate,
            b2=0.98,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda weight: weight.ndim > 1, params),
        ),
    )


def train(
    config: OPTConfig, recipe: Recipe, stream: Stream, report: Report
) -> tuple[Any, list[float]]:
    """Trains from `recipe.seed` and returns the float32 weights and every step's loss.

    The last `long_steps` steps see fewer but longer rows.
    """
    optimizer = make_optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: Array) -> tuple[Any, Any, Array]:
        def mean_loss(params: Any) -> Array:
            return token_losses(params, rows, config, recipe.dtype).mean()

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = initial_weights(config, recipe.seed)
    state = optimizer.init(params)
    rng = np.random.default_rng(recipe.seed)
    losses: list[float] = []
    for done in range(1, recipe.steps + 1):
        is_long = done > recipe.steps - recipe.long_steps
        window = recipe.long_window if is_long else recipe.window
        rows = draw_rows(
            rng,
            stream,
            window,
            rows=max(1, recipe.tokens_per_step // window),
            bos=config.bos_token_id,
        )
        params, state, loss = step(params, state, rows)
        losses.append(float(loss))
        if done % recipe.report_every == 0 or done == recipe.steps:
            recent = losses[-recipe.report_every :]
            report(done, sum(recent) / len(recent), params)
    return params, losses


def held_out_nats(
    params: Any,
    documents: Sequence[Sequence[int]],
    config: OPTConfig,
    dtype: str,
) -> tuple[float, int]:
    """Total -log p of `documents` in nats, and the number of tokens it is the sum over.

    Documents are cut into windows as long as the model allows; each begins with the
    bos token, and no token is counted twice.
    """
    window, bos = config.max_position_embeddings, config.bos_token_id
    score = jax.jit(functools.partial(token_losses, config=config, dtype=dtype))
    nats, count, rows_a_call = 0.0, 0, 4
    pieces = [
        document[begin : begin + window]
        for document in documents
        for begin in range(0, len(document), window)
    ]
    for first in range(0, len(pieces), rows_a_call):
        rows = np.full((rows_a_call, window + 1), bos, np.int32)
        real = np.zeros((rows_a_call, window), bool)
        for row, piece in enumerate(pieces[first : first + rows_a_call]):
            rows[row, 1 : len(piece) + 1] = piece
            real[row, : len(piece)] = True
        nats += float(np.asarray(score(params, rows))[real].sum(dtype=np.float64))
        count += int(real.sum())
    return nats, count


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Surprise in a measure that models with different vocabularies share."""
    return nats / math.log(2) / text_bytes
