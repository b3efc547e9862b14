"""The shapes of a decoder layer's steps, and what XLA says of their memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.memory.footprint import cache_rows
from flexjax.memory.layout import WeightLayout
from flexjax.models.config import layer_tensors
from flexjax.models.opt import unflatten
from flexjax.policy import Policy, Tier
from flexjax.quant import QuantizedArray, cache_quantization
from flexjax.schedule.ops import Cache
from flexjax.steps import decode_step, prefill_step
from flexjax.store_format import BYTES
from flexjax.workload import Workload

LAYER = "layers.0."
Shape = jax.ShapeDtypeStruct


def past_shapes(
    policy: Policy, work: Workload, layout: WeightLayout, *, layer: int, step: int
) -> Any:
    """A cache that `step` reads, in as many segments, of as many pieces, as the run's.

    A tuple of `cached_attention.Past`, with shapes in place of arrays.
    """
    config, prompt = layout.config, work.prompt_len
    slots = work.cache_slots(step - 1)
    how = cache_quantization(policy, config, layout.dtype)
    width, dtype = config.head_dim, layout.dtype
    if how is not None:
        width, dtype = how.width(width), BYTES

    def pieces(tier: Tier, count: int) -> tuple[Shape, ...]:
        cut = tier is Tier.DISK and slots > prompt
        return tuple(
            Shape((count, config.num_attention_heads, size, width), dtype)
            for size in ((prompt, slots - prompt) if cut else (slots,))
        )

    rows = cache_rows(policy, work, Cache(layer, 0))
    return tuple(
        (pieces(tier, count), pieces(tier, count))
        for tier, count in zip(Tier, rows, strict=True)
        if count
    )


def workspace_bytes(policy: Policy, work: Workload, layout: WeightLayout) -> int:
    """Bytes that a decoder layer's prefill or last decode needs, whichever is more.

    Beside arguments and results, where all that is cached is attended to on the device,
    densely. Compiles both steps, in a run's shapes. 0 where the backend says nothing.
    """
    params, config = _layer_shapes(layout), layout.config
    start = Shape((work.batch_size,), np.int32)
    how = {
        "config": config,
        "cache_as": cache_quantization(policy, config, layout.dtype),
    }

    def hidden(seq: int) -> Shape:
        return Shape((work.batch_size, 1, seq, config.hidden_size), layout.dtype)

    steps = [prefill_step.lower(params, hidden(work.prompt_len), start, **how)]
    if (last := work.gen_len - 1) > 0:
        past = past_shapes(policy, work, layout, layer=0, step=last)
        length = Shape((), np.int32)
        steps += [decode_step.lower(params, hidden(1), past, start, length, **how)]
    found = [step.compile().memory_analysis() for step in steps]
    return max(0 if memory is None else memory.temp_size_in_bytes for memory in found)


def _layer_shapes(layout: WeightLayout) -> Any:
    """A decoder layer's parameters as a step gets them, with shapes for arrays."""

    def array(name: str) -> jax.Array | QuantizedArray:
        entry = layout.tensors[name]
        if layout.is_widened(name):
            return jnp.zeros(entry.used_shape, layout.dtype)
        dtype = layout.dtype if entry.quantization is None else BYTES
        return layout.as_used(name, jnp.zeros(entry.shape, dtype))

    names = [n for n in layer_tensors(layout.config, 0) if n.startswith(LAYER)]
    return jax.eval_shape(
        lambda: unflatten({name.removeprefix(LAYER): array(name) for name in names})
    )
