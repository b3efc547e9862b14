"""What the device can do: the steps of a run, timed with everything at hand.

The steps are the run's own, jitted, in the run's own shapes; so measuring them before a
run also compiles them for it. Two layers take turns, so that the last level of a CPU's
caches does not serve what a run has to bring from memory.
"""

import dataclasses
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.step_shapes import past_shapes
from flexjax.cached_attention import Past
from flexjax.checkpoint import WeightStore
from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.layout import WeightLayout
from flexjax.memory.link import Device
from flexjax.models.config import layer_tensors
from flexjax.models.opt import Params, unflatten
from flexjax.plan import step_rates
from flexjax.policy import Policy
from flexjax.quant import (
    QuantizedArray,
    cache_quantization,
    dequantize,
    dequantize_into,
)
from flexjax.sampling import make_controls, pick_sampler, row_keys
from flexjax.sampling_params import SamplingParams
from flexjax.sparse import SparsePast
from flexjax.steps import (
    decode_step,
    embed_step,
    final_step,
    head_step,
    prefill_step,
)
from flexjax.store_format import BYTES
from flexjax.workload import Workload, bucket

# Each step for twice as long as in a calibration: a run is judged by these.
median_s = functools.partial(step_rates.median_s, limit_s=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeLimit:
    """Seconds of the steps of one batch.

    Attributes:
        prefill_layer_s: of a decoder layer on whole prompts.
        prefill_ends_s: of the embedding and the final norm on whole prompts.
        decode_layer_s: of a decoder layer on one token, by the slots that it reads.
        decode_ends_s: of the embedding and the final norm on one token.
        head_s: of all logits, and of choosing a token.
        widen_s: of making all quantized weights wide, which serves all batches.
    """

    prefill_layer_s: float
    prefill_ends_s: float
    decode_layer_s: Mapping[int, float]
    decode_ends_s: float
    head_s: float
    widen_s: float

    def prefill_s(self, work: Workload) -> float:
        """Seconds of all steps of a prefill."""
        layers_s = work.num_decoder_layers * self.prefill_layer_s
        batch_s = layers_s + self.prefill_ends_s + self.head_s
        return work.num_batches * batch_s + self.widen_s

    def decode_s(self, work: Workload) -> float:
        """Seconds of all steps after the prefill."""
        batch_s = sum(
            work.num_decoder_layers * self.decode_layer_s[read_slots(work, step)]
            + self.decode_ends_s
            + self.head_s
            for step in range(1, work.gen_len)
        )
        return work.num_batches * batch_s + (work.gen_len - 1) * self.widen_s


def mean_limit(limits: Sequence[ComputeLimit]) -> ComputeLimit:
    """The mean of several measurements of the same steps."""

    def mean(seconds: Callable[[ComputeLimit], float]) -> float:
        return statistics.mean(map(seconds, limits))

    return ComputeLimit(
        prefill_layer_s=mean(lambda limit: limit.prefill_layer_s),
        prefill_ends_s=mean(lambda limit: limit.prefill_ends_s),
        decode_layer_s={
            slots: mean(lambda limit, slots=slots: limit.decode_layer_s[slots])
            for slots in limits[0].decode_layer_s
        },
        decode_ends_s=mean(lambda limit: limit.decode_ends_s),
        head_s=mean(lambda limit: limit.head_s),
        widen_s=mean(lambda limit: limit.widen_s),
    )


def read_slots(work: Workload, step: int) -> int:
    """Slots of the cache that `step` reads, rounded up so that few sizes occur."""
    return bucket(work.past_len(step))


def measure_compute(
    store: WeightStore,
    policy: Policy,
    work: Workload,
    *,
    layout: WeightLayout,
    device: Device,
) -> ComputeLimit:
    """Times the steps of a run of greedy rows without padding."""
    steps = _Steps(store, policy, work, layout=layout, device=device)
    by_slots: dict[int, list[int]] = defaultdict(list)
    for step in range(1, work.gen_len):
        by_slots[read_slots(work, step)].append(step)
    return ComputeLimit(
        prefill_layer_s=steps.prefill_layer_s(),
        prefill_ends_s=steps.ends_s(work.prompt_len),
        decode_layer_s={
            slots: steps.decode_layer_s(some[len(some) // 2])
            for slots, some in by_slots.items()
        },
        decode_ends_s=steps.ends_s(1),
        head_s=steps.head_s(),
        widen_s=steps.widen_s(),
    )


class _Steps:
    """The first and the last layer in memory, and what else the steps need."""

    def __init__(
        self,
        store: WeightStore,
        policy: Policy,
        work: Workload,
        *,
        layout: WeightLayout,
        device: Device,
    ) -> None:
        self._store, self._policy, self._work = store, policy, work
        self._layout, self._device = layout, device
        self._config = store.config
        self._cache_as = cache_quantization(policy, store.config, store.dtype)
        # With the embedding and the final norm, which come with these two.
        self._layers = {
            layer: self._read_layer(layer)
            for layer in sorted({0, work.num_decoder_layers - 1})
        }
        self._start = jnp.zeros(work.batch_size, jnp.int32)

    def prefill_layer_s(self) -> float:
        def layers(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            hidden, made = state
            for layer, params in self._layers.items():
                hidden, made = prefill_step(
                    params["layers"][str(layer)],
                    hidden,
                    self._start,
                    config=self._config,
                    cache_as=self._cache_as,
                )
            return hidden, made

        state = self._embed(self._rows(self._work.prompt_len)), None
        return median_s(layers, state) / len(self._layers)

    def decode_layer_s(self, step: int) -> float:
        length = np.int32(self._work.past_len(step))
        pasts = {layer: self._past(layer, step) for layer in self._layers}
        sparsity, config = self._policy.attention_sparsity, self._config
        heads = (config.num_attention_heads, 1, config.head_dim)
        sparse = None
        if sparsity < 1:
            sums = self._zeros((self._work.batch_size, *heads), np.dtype("f4"))
            sparse = SparsePast(sums, sparsity)

        def layers(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            hidden, made = state
            for layer, params in self._layers.items():
                hidden, made = decode_step(
                    params["layers"][str(layer)],
                    hidden,
                    pasts[layer],
                    self._start,
                    length,
                    sparse,
                    config=config,
                    cache_as=self._cache_as,
                )
            return hidden, made

        state = self._embed(self._rows(1)), None
        return median_s(layers, state) / len(self._layers)

    def ends_s(self, seq: int) -> float:
        rows = self._rows(seq)
        params = _outside(self._layers[max(self._layers)])

        def ends(state: Any) -> jax.Array:
            del state
            hidden = self._embed(rows)
            return final_step(params, hidden, config=self._config, last_only=True)

        return median_s(ends, None)

    def head_s(self) -> float:
        """Of all blocks of the table, all but the last being as large as the first."""
        blocks = self._layout.head.num_blocks
        seconds = self._block_s(blocks - 1) + self._choose_s()
        return seconds + (blocks - 1) * self._block_s(0) if blocks > 1 else seconds

    def widen_s(self) -> float:
        """Of one layer's matrices for every layer, and of the table of logits."""
        names = layer_tensors(self._config, 0)
        layer_s = sum(map(self._widened_s, names))
        table_s = self._widened_s(self._config.head_table)
        return self._work.num_decoder_layers * layer_s + table_s

    def _widened_s(self, name: str) -> float:
        entry = self._store.tensors[name]
        how = entry.quantization
        if how is None or not self._layout.is_widened(name):
            return 0.0
        data = self._zeros(entry.shape, BYTES)

        def step(outs: list[jax.Array]) -> list[jax.Array]:
            return dequantize_into(outs, [data], quantizations=(how,))

        return median_s(step, [self._zeros(entry.used_shape)])

    def _block_s(self, block: int) -> float:
        name, vocab_size = self._config.head_table, self._config.vocab_size
        rows = self._layout.head.span(block, vocab_size)
        table = self._read(name, rows)
        hidden = self._zeros((self._work.batch_size, 1, 1, self._config.embed_dim))
        return median_s(lambda state: head_step(table, hidden), None)

    def _choose_s(self) -> float:
        count = self._work.batch_size
        params = [SamplingParams(temperature=0.0)] * count
        keys = row_keys(params, range(count), seed=0)
        controls = make_controls(params, keys, np.zeros(count, np.int32))
        sample = pick_sampler(params)
        shape = (count, self._config.vocab_size)
        logits = jax.device_put(np.zeros(shape, np.float32), self._device)

        def choose(state: Any) -> Any:
            del state
            return sample(logits, controls), jnp.isfinite(jnp.max(logits, axis=-1))

        return median_s(choose, None)

    def _embed(self, rows: jax.Array) -> jax.Array:
        return embed_step(
            _outside(self._layers[0]),
            rows,
            self._start,
            np.int32(0),
            config=self._config,
        )

    def _rows(self, seq: int) -> jax.Array:
        return self._zeros((self._work.batch_size, seq, self._config.embed_dim))

    def _past(self, layer: int, step: int) -> tuple[Past, ...]:
        """A cache such as the run's."""
        shapes = past_shapes(
            self._policy, self._work, self._layout, layer=layer, step=step
        )
        return jax.tree.map(lambda s: self._zeros(s.shape, s.dtype), shapes)

    def _zeros(
        self, shape: tuple[int, ...], dtype: np.dtype | None = None
    ) -> jax.Array:
        zeros = np.zeros(shape, dtype or self._store.dtype)
        return jax.device_put(zeros, self._device)

    def _read_layer(self, layer: int) -> Params:
        entries = self._store.tensors
        return unflatten(
            {
                name: self._read(name, slice(0, entries[name].shape[0]))
                for name in layer_tensors(self._config, layer)
            }
        )

    def _read(self, name: str, rows: slice) -> jax.Array | QuantizedArray:
        """As layers use it."""
        entry, count = self._store.tensors[name], rows.stop - rows.start
        buffer = page_aligned(count * entry.row_bytes)
        array = typed(buffer, (count, *entry.shape[1:]), entry.dtype)
        self._store.read_rows(name, rows.start, rows.stop, array)
        read = jax.device_put(array, self._device)
        how = entry.quantization
        if how is not None and self._layout.is_widened(name):
            return dequantize(read, how)
        return self._layout.as_used(name, read)


def _outside(params: Params) -> Params:
    """What comes with a layer, without the layer."""
    return {name: tree for name, tree in params.items() if name != "layers"}
