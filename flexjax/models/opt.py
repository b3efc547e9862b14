"""OPT as Flax modules that own no weights: each is applied to parameters it is given.

A module's parameters are named as in Hugging Face's checkpoints, so that a checkpoint's
tensors, split at the dots of their names, are the parameter tree. Matrices keep the
checkpoint's layout `[out, in]` and are contracted on their last axis, which is also the
layout that XLA's CPU backend multiplies fastest.

The residual stream has the type of the weights; norms, sums and logits are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flexjax.attention import prefill_attention
from flexjax.kernels import products
from flexjax.models.config import LAYER_NORM_EPSILON, POSITION_OFFSET, OPTConfig
from flexjax.quant import (
    Quantization,
    QuantizedArray,
    dequantize,
    passed_through,
)

Params = Mapping[str, Any]
# (query, key, value), each [batch, heads, seq, head_dim] -> the same shape
Attend = Callable[[Array, Array, Array], Array]
Attention = Callable[[Array, Array, Array, Array], Array]  # with the rows' start

# For `_contract_on_cpu`, which has the measurements.
MIN_LEFT_ROWS = 16
FEW_ROWS = 64
LEFT_ROWS = 256
LONG_ROW = 16384  # elements

ACTIVATION: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def contract_last(
    x: Float[Array, "... inputs"],
    weight: Float[Array, "outputs inputs"] | QuantizedArray,
) -> Float[Array, "... outputs"]:
    """`x @ weight.T` accumulated in float32; true float32 where the inputs are."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, QuantizedArray):
        out = products.contract_quantized(rows, weight)
    elif x.dtype == jnp.float32:
        out = _contract(rows, weight)
    else:
        out = jax.lax.platform_dependent(
            rows, weight, cpu=_contract_on_cpu, default=_contract
        )
    return out.reshape(*x.shape[:-1], -1)


def _contract(
    left: Float[Array, "rows inputs"], right: Float[Array, "columns inputs"]
) -> Float[Array, "rows columns"]:
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _contract_on_cpu(
    x: Float[Array, "rows inputs"], weight: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """The product by a kernel, or in the order that XLA's CPU backend is fastest at.

    It packs the right side anew in every call, which for few rows is most of the work,
    and for very long rows into memory that the system has to clear first. So there the
    weights stand on the left, and the rows are padded to sizes that it is good at:

        TFLOP/s, inputs x outputs    16 rows     64 rows     256 rows    1024 rows
        4096 x 4096                  0.23  0.40  0.54  0.74  0.78  0.80  0.82  0.72
        16384 x 4096                 0.05  0.42  0.17  0.78  0.43  0.83  0.67  0.81
        4096 x 16384                 0.25  0.41  0.58  0.80  0.78  0.78  0.75  0.65

    Left: weights on the right; right: weights on the left, in blocks of `LEFT_ROWS`
    rows (jax 0.12, 2 cores with AVX-512, bfloat16; measured by `bench.kernels`).
    """
    count, inputs = x.shape
    if products.is_faster(x, weight):
        return products.contract_bfloat16(x, weight)
    if count > FEW_ROWS and inputs < LONG_ROW:
        return _contract(x, weight)
    block = min(LEFT_ROWS, max(MIN_LEFT_ROWS, 1 << (count - 1).bit_length()))
    blocks = jnp.pad(x, ((0, -count % block), (0, 0))).reshape(-1, block, inputs)

    def weights_first(rows: Array) -> Array:
        # Without the barrier XLA would take the transposition into the product.
        return jax.lax.optimization_barrier(_contract(weight, rows)).T

    return jax.lax.map(weights_first, blocks).reshape(-1, len(weight))[:count]


class Linear(nn.Module):
    """`x @ weight.T + bias`."""

    features: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        weight = self.get_variable("params", "weight")
        if not isinstance(weight, QuantizedArray):  # whose shape is another
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
        wide = x.astype(jnp.float32)
        # By itself it takes the difference of two squares, which cancel where the mean
        # is large.
        variance = jnp.var(wide, axis=-1, keepdims=True)
        out = jax.nn.standardize(wide, variance=variance, epsilon=LAYER_NORM_EPSILON)
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
    slots: Int[Array, " seq"], origin: Int[Array, "batch #seq"]
) -> Int[Array, "batch seq"]:
    """Row of the position table for each slot, given that of its position 0.

    The first real token has row `POSITION_OFFSET`; padding takes the row before it.
    """
    return jnp.maximum(slots - origin, -1) + POSITION_OFFSET


def unflatten(tensors: Mapping[str, Array | QuantizedArray]) -> dict[str, Any]:
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

    tokens = params["embed_tokens"]["weight"]
    if isinstance(tokens, QuantizedArray):
        rows = jnp.take(tokens.data, token_ids, axis=0)
        rows = dequantize(rows, tokens.quantization)
    else:
        rows = jnp.take(tokens, token_ids, axis=0)
    slots = jnp.arange(token_ids.shape[1], dtype=jnp.int32)
    positions = token_positions(slots, start[:, None])
    hidden = apply(Embedding(config), params, rows, positions)
    for layer in range(config.num_hidden_layers):
        layer_params = params["layers"][str(layer)]
        hidden, _ = apply(DecoderLayer(config), layer_params, hidden, attend)
    hidden = apply(Final(config), params, hidden)
    table, leaf = config.head_table.split(".")
    return contract_last(hidden, params[table][leaf])
