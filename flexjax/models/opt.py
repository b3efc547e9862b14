"""OPT as Flax modules that own no weights: each is applied to parameters it is given.

A module's parameters are named as in Hugging Face's checkpoints, so that a checkpoint's
tensors, split at the dots of their names, are the parameter tree. Matrices keep the
checkpoint's layout `[out, in]` and are contracted on their last axis, which is also the
layout that XLA's CPU backend multiplies fastest.

The residual stream has the type of the weights; norms, sums and logits are float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.attention import MIN_ROWS, prefill_attention
from flexjax.models.config import LAYER_NORM_EPSILON, POSITION_OFFSET, OPTConfig
from flexjax.quant import Quantization, passed_through

Params = Mapping[str, Any]
# (query, key, value), each [batch, heads, seq, head_dim] -> the same shape
Attend = Callable[[Array, Array, Array], Array]
Attention = Callable[[Array, Array, Array, Array], Array]  # with the rows' start

ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def contract_last(
    x: Float[Array, "... inputs"], weight: Float[Array, "outputs inputs"]
) -> Float[Array, "... outputs"]:
    """`x @ weight.T` accumulated in float32; true float32 where the inputs are."""
    exact = x.dtype == jnp.float32
    rows = math.prod(x.shape[:-1])
    if not exact and rows < MIN_ROWS:
        padded = jnp.pad(x.reshape(rows, -1), ((0, MIN_ROWS - rows), (0, 0)))
        return contract_last(padded, weight)[:rows].reshape(*x.shape[:-1], -1)
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


class Linear(nn.Module):
    """`x @ weight.T + bias`."""

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        shape = (self.features, x.shape[-1])
        weight = self.param("weight", nn.initializers.normal(0.02), shape, x.dtype)
        out = contract_last(x, weight)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, (self.features,), x.dtype)
            out = out + bias.astype(jnp.float32)
        return out.astype(x.dtype)


class LayerNorm(nn.Module):
    """Normalises the last axis; scales and shifts it where `affine`."""

    affine: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        out = jax.nn.standardize(x.astype(jnp.float32), epsilon=LAYER_NORM_EPSILON)
        if self.affine:
            size = (x.shape[-1],)
            weight = self.param("weight", nn.initializers.ones, size, x.dtype)
            bias = self.param("bias", nn.initializers.zeros, size, x.dtype)
            out = out * weight.astype(jnp.float32) + bias.astype(jnp.float32)
        return out.astype(x.dtype)


class Embedding(nn.Module):
    """Token rows plus learned positions; the caller looks the token rows up."""

    config: OPTConfig

    @nn.compact
    def __call__(
        self,
        rows: Float[Array, "batch seq embed"],
        positions: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq hidden"]:
        config = self.config
        if config.is_projected:
            rows = Linear(config.hidden_size, use_bias=False, name="project_in")(rows)
        return rows + PositionTable(config, name="embed_positions")(
            positions, rows.dtype
        )


class PositionTable(nn.Module):
    """OPT's learned position embeddings."""

    config: OPTConfig

    @nn.compact
    def __call__(
        self, positions: Int[Array, "batch seq"], dtype: jnp.dtype
    ) -> Float[Array, "batch seq hidden"]:
        config = self.config
        size = (config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        weight = self.param("weight", nn.initializers.normal(0.02), size, dtype)
        return jnp.take(weight, positions, axis=0, mode="clip")


class SelfAttention(nn.Module):
    """Projections in front of an attention, and behind it."""

    config: OPTConfig

    def setup(self) -> None:
        config = self.config
        self.q_proj = Linear(config.hidden_size, config.enable_bias)
        self.k_proj = Linear(config.hidden_size, config.enable_bias)
        self.v_proj = Linear(config.hidden_size, config.enable_bias)
        self.out_proj = Linear(config.hidden_size, config.enable_bias)

    def project(
        self, hidden: Float[Array, "batch seq hidden"]
    ) -> tuple[Float[Array, "batch heads seq head_dim"], ...]:
        """Query, key and value."""
        config = self.config

        def heads(linear: Linear) -> Float[Array, "batch heads seq head_dim"]:
            x = linear(hidden)
            x = x.reshape(*x.shape[:2], config.num_attention_heads, config.head_dim)
            return jnp.swapaxes(x, 1, 2)

        return heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)

    def join(
        self, attended: Float[Array, "batch heads seq head_dim"]
    ) -> Float[Array, "batch seq hidden"]:
        """What the heads found, in the residual stream's own directions."""
        x = jnp.swapaxes(attended, 1, 2)
        return self.out_proj(x.reshape(*x.shape[:2], self.config.hidden_size))


class DecoderLayer(nn.Module):
    """Attention and MLP with their residuals; norms come before or after them.

    A layer is `project`, an attention that the caller chooses, and `finish`; these are
    apart where attention happens elsewhere.
    """

    config: OPTConfig

    def setup(self) -> None:
        config = self.config
        affine = config.layer_norm_elementwise_affine
        self.self_attn_layer_norm = LayerNorm(affine)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = LayerNorm(affine)
        self.fc1 = Linear(config.ffn_dim, config.enable_bias)
        self.fc2 = Linear(config.hidden_size, config.enable_bias)

    def __call__(
        self, hidden: Float[Array, "batch seq hidden"], attend: Attend
    ) -> tuple[Float[Array, "batch seq hidden"], tuple[Array, Array]]:
        query, key, value = self.project(hidden)
        return self.finish(hidden, attend(query, key, value)), (key, value)

    def project(
        self, hidden: Float[Array, "batch seq hidden"]
    ) -> tuple[Float[Array, "batch heads seq head_dim"], ...]:
        """Query, key and value of a hidden state."""
        if self.config.do_layer_norm_before:
            hidden = self.self_attn_layer_norm(hidden)
        return self.self_attn.project(hidden)

    def finish(
        self,
        hidden: Float[Array, "batch seq hidden"],
        attended: Float[Array, "batch heads seq head_dim"],
    ) -> Float[Array, "batch seq hidden"]:
        """The layer's output, of what it was given and what attention made of it."""
        before = self.config.do_layer_norm_before
        hidden = hidden + self.self_attn.join(attended)
        hidden = hidden if before else self.self_attn_layer_norm(hidden)
        x = self.final_layer_norm(hidden) if before else hidden
        x = ACTIVATION[self.config.activation_function](self.fc1(x))
        hidden = hidden + self.fc2(x)
        return hidden if before else self.final_layer_norm(hidden)


class Final(nn.Module):
    """What stands between the last decoder layer and the table of logits."""

    config: OPTConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch seq hidden"]
    ) -> Float[Array, "*batch seq embed"]:
        config = self.config
        if config.has_final_layer_norm:
            affine = config.layer_norm_elementwise_affine
            hidden = LayerNorm(affine, name="final_layer_norm")(hidden)
        if config.is_projected:
            hidden = Linear(config.embed_dim, use_bias=False, name="project_out")(
                hidden
            )
        return hidden


def token_positions(
    slots: Int[Array, " seq"], start: Int[Array, " batch"]
) -> Int[Array, "batch seq"]:
    """Row of the position table for each slot; padding takes the row before the first.

    The first real token has row `POSITION_OFFSET`.
    """
    return jnp.maximum(slots[None, :] - start[:, None], -1) + POSITION_OFFSET


def unflatten(tensors: Mapping[str, Array]) -> dict[str, Any]:
    """The parameter tree of tensors with dotted names."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = tensor
    return tree


def apply(
    module: nn.Module, params: Params, *args: Any, method: str = "__call__"
) -> Any:
    """What `module`, or one of its methods, computes with `params`."""
    return module.apply({"params": params}, *args, method=method)


def forward(
    params: Params,
    token_ids: Int[Array, "batch seq"],
    start: Int[Array, " batch"],
    config: OPTConfig,
    cache_as: Quantization | None = None,
    attention: Attention = prefill_attention,
) -> Float[Array, "batch seq vocab"]:
    """Logits of the whole model at once, every weight at hand.

    The plain reference that streamed runs are tested against, and what training uses.

    Args:
        params: `unflatten` of a checkpoint's tensors.
        token_ids: left-padded rows.
        start: first slot of each row that holds a real token.
        config: of the model.
        cache_as: how a run keeps keys and values, which are attended to as it finds
            them again.
        attention: of all tokens at once, such as `sparse_prefill_attention`.
    """

    def attend(query: Array, key: Array, value: Array) -> Array:
        key, value = (passed_through(new, cache_as) for new in (key, value))
        return attention(query, key, value, start)

    rows = jnp.take(params["embed_tokens"]["weight"], token_ids, axis=0)
    slots = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    positions = token_positions(slots, start)
    hidden = apply(Embedding(config), params, rows, positions)
    for layer in range(config.num_hidden_layers):
        layer_params = params["layers"][str(layer)]
        hidden, _ = apply(DecoderLayer(config), layer_params, hidden, attend)
    hidden = apply(Final(config), params, hidden)
    table, leaf = config.head_table.split(".")
    return contract_last(hidden, params[table][leaf])
