"""What the engine's steps take on a device, apart from all that moves.

What is read in a loop is larger than a processor's caches.
"""

import contextlib
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools.resolve import resolve_model
from flexjax.attention import prefill_attention, prefill_attention_flops
from flexjax.blocks import Row
from flexjax.cached_attention import attend_step
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.engine import Engine
from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.link import Device, host_device, is_shared
from flexjax.models.config import OPTConfig, decoder_layer_shapes, named_config
from flexjax.models.opt import unflatten
from flexjax.plan.hardware import WHOLE_BITS
from flexjax.policy import BITS, Policy
from flexjax.quant import (
    Quantization,
    QuantizedArray,
    cache_slot_bytes,
    dequantize_into,
    quantize,
)
from flexjax.sampling import make_controls, pick_sampler, row_keys
from flexjax.sampling_params import SamplingParams
from flexjax.steps import decode_step, prefill_step
from flexjax.stopping import StopChecker

DTYPE = jnp.dtype("bfloat16")  # of what is computed
LIMIT_S, MOST_REPEATS = 0.5, 100  # a step is repeated until one of them is reached
LAYERS = (named_config("opt-1.3b"), named_config("opt-6.7b"))  # 0.1 and 0.4 GB each
ROWS = (1, 16, 32, 64, 128, 256, 1024)
QUANTIZED_ROWS = (1, 16, 32, 64, 256, 1024)  # of them
PREFILL_ROWS, PROMPT_LEN = 1024, 128  # as many tokens as a prefill takes at a time
PAST_SLOTS = 32
LOGITS = (64, 50272)  # rows, tokens of the vocabulary
ENGINE_ROWS, ENGINE_TOKENS, ENGINE_RUNS = 16, 64, 4
PROMPTS = (8, 32, 128, 128)  # rows, heads, tokens, elements of a head
CACHE = (32, 32, 160, 64)  # rows, heads, slots, elements of a head
WIDENED = (4096, 4096)
COPIES = 3  # of a layer, or of what is widened, which take turns
CACHES = 12  # likewise; half a gigabyte, since servers have caches of hundreds of MB


def median_s(
    step: Callable[[Any], Any], state: Any, limit_s: float | None = None
) -> float:
    """Median seconds of `step`, each time on what it returned before.

    It is repeated for `limit_s`, or else `LIMIT_S`, but not more than `MOST_REPEATS`.
    """
    limit_s = LIMIT_S if limit_s is None else limit_s
    state = jax.block_until_ready(step(state))  # compiles
    spent: list[float] = []
    while sum(spent) < limit_s and len(spent) < MOST_REPEATS:
        begun_s = time.perf_counter()
        state = jax.block_until_ready(step(state))
        spent.append(time.perf_counter() - begun_s)
    return statistics.median(spent)


def random_values(shape: Sequence[int], device: Device) -> jax.Array:
    """Values of `DTYPE` on the device, from memory such as the engine's."""
    values = 0.02 * np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    buffer = page_aligned(math.prod(shape) * DTYPE.itemsize)
    array = typed(buffer, tuple(shape), DTYPE)
    array[...] = np.resize(values.astype(DTYPE), shape)
    return jax.device_put(array, device)


class Layers:
    """Decoder layers of one size that take turns, so that none stays in a cache.

    Args of the constructor:
        config: of a model that has such layers.
        device: that computes them.
        bits: of their matrices, if these are multiplied with as they are quantized.
        activation_bits: see `Policy`.
    """

    def __init__(
        self,
        config: OPTConfig,
        device: Device,
        bits: int | None = None,
        activation_bits: int | None = None,
    ) -> None:
        shapes = decoder_layer_shapes(config)

        def make(shape: Sequence[int]) -> jax.Array | QuantizedArray:
            wide = random_values(shape, device)
            if bits is None or len(shape) == 1:
                return wide
            how = _quantization(bits)
            return QuantizedArray(_narrow(wide, how), how, activation_bits)

        self._params = [
            unflatten({name: make(shape) for name, shape in shapes.items()})
            for _ in range(COPIES)
        ]
        self._turns = itertools.cycle(self._params)
        self._config, self._device = config, device
        self.num_weights = sum(
            math.prod(shape) for shape in shapes.values() if len(shape) == 2
        )

    def decode(self, rows: int) -> Callable[[jax.Array], jax.Array]:
        """A step of new tokens that attend to `PAST_SLOTS` slots."""
        config = self._config
        slots = (rows, config.num_attention_heads, PAST_SLOTS, config.head_dim)
        past = (
            (random_values(slots, self._device),),
            (random_values(slots, self._device),),
        )
        start, length = np.zeros(rows, np.int32), np.int32(PAST_SLOTS)

        def step(hidden: jax.Array) -> jax.Array:
            params = next(self._turns)
            return decode_step(params, hidden, (past,), start, length, config=config)[0]

        return step

    def decode_s(self, rows: int, attention_bytes_per_s: float) -> float:
        """Seconds of a step without its attention."""
        slot_bytes = cache_slot_bytes(self._config, DTYPE, None)
        nbytes = rows * PAST_SLOTS * slot_bytes
        seconds = median_s(self.decode(rows), self.hidden(rows, 1))
        return _without(seconds, nbytes / attention_bytes_per_s)

    def prefill_s(self, rows: int, attention_flops_per_s: float) -> float:
        """The same of a prefill of `rows` tokens, in prompts of `PROMPT_LEN`."""
        prompts = rows // PROMPT_LEN
        start = np.zeros(prompts, np.int32)

        def step(hidden: jax.Array) -> jax.Array:
            params = next(self._turns)
            return prefill_step(params, hidden, start, config=self._config)[0]

        flops = prefill_attention_flops(prompts, PROMPT_LEN, self._config.hidden_size)
        seconds = median_s(step, self.hidden(prompts, PROMPT_LEN))
        return _without(seconds, flops / attention_flops_per_s)

    def hidden(self, rows: int, tokens: int) -> jax.Array:
        return random_values((rows, 1, tokens, self._config.hidden_size), self._device)


def _without(seconds: float, part_s: float) -> float:
    """What is left without a part, which was measured apart and may be too much."""
    return max(seconds - part_s, 0.1 * seconds)


def attention_figures(device: Device) -> dict[str, Any]:
    """Of attention, on the device and on the host, and of what is widened."""
    rates = on_host = _attention_rates(device)
    if not is_shared(device):
        on_host = _attention_rates(host_device("a calibration"))
    return {
        "prefill_attention_flops_per_s": _prefill_attention_rate(device),
        "sampled_logits_per_s": _sampling_rate(device),
        "attention_bytes_per_s": rates,
        "host_attention_bytes_per_s": on_host,
        "dequantized_bytes_per_s": _dequantized_rates(device),
    }


def step_figures(
    layers: Sequence[Layers], attention: Mapping[str, Any], engine_call_s: float
) -> dict[str, Any]:
    """What products take, and what a call takes besides, by the number of rows.

    Two sizes of layers tell the one from the other: what grows with the weights is
    products, what stays is norms and activations. The engine adds its own.
    """
    rates, calls = {}, {}
    attended = attention["attention_bytes_per_s"][WHOLE_BITS]
    for rows in ROWS:
        seconds = [
            layer.decode_s(rows, attended)
            if rows < PREFILL_ROWS
            else layer.prefill_s(rows, attention["prefill_attention_flops_per_s"])
            for layer in layers
        ]
        sizes = [layer.num_weights for layer in layers]
        slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
        # On a busy machine the smaller may come out as slow as the larger.
        slope = max(slope, 0.5 * seconds[1] / sizes[1])
        rates[rows] = 2 * rows / slope
        calls[rows] = max(0.0, seconds[0] - slope * sizes[0]) + engine_call_s
    return {"product_flops_per_s": rates, "call_s": calls}


def quantized_product_rates(
    layers: Layers, figures: Mapping[str, Any], engine_call_s: float
) -> dict[int, float]:
    """Of products with layers that are quantized, by rows, where all else is known.

    `engine_call_s` is part of a call's time in `figures`, but not of a step's.
    """
    rates = {}
    attended = figures["attention_bytes_per_s"][WHOLE_BITS]
    for rows in QUANTIZED_ROWS:
        if rows < PREFILL_ROWS:
            seconds = layers.decode_s(rows, attended)
        else:
            seconds = layers.prefill_s(rows, figures["prefill_attention_flops_per_s"])
        seconds = _without(seconds, figures["call_s"][rows] - engine_call_s)
        rates[rows] = 2 * rows * layers.num_weights / seconds
    return rates


def _quantization(bits: int) -> Quantization:
    """What a policy that asks for `bits` gets."""
    return Quantization(bits=bits, group_size=Policy().group_size, dtype="bfloat16")


_narrow = jax.jit(quantize, static_argnums=1)


def _prefill_attention_rate(device: Device) -> float:
    batch, heads, seq, head_dim = PROMPTS
    arrays = [random_values(PROMPTS, device) for _ in ("query", "key", "value")]
    start = np.zeros(batch, np.int32)
    attend = jax.jit(prefill_attention)
    seconds = median_s(lambda _: attend(*arrays, start), None)
    return prefill_attention_flops(batch, seq, heads * head_dim) / seconds


def _attention_rates(device: Device) -> dict[int, float]:
    ways = {WHOLE_BITS: None} | {bits: _quantization(bits) for bits in BITS}
    return {bits: _attention_rate(how, device) for bits, how in ways.items()}


def _attention_rate(how: Quantization | None, device: Device) -> float:
    """Bytes of keys and values per second, in bfloat16; the caches take turns."""
    batch, heads, slots, head_dim = CACHE

    def kept() -> tuple[jax.Array]:
        wide = random_values(CACHE, device)
        return (wide if how is None else _narrow(wide, how),)

    pasts = [(kept(), kept()) for _ in range(CACHES)]
    new = random_values((batch, heads, 1, head_dim), device)
    start, length = np.zeros(batch, np.int32), np.int32(slots)

    def step(query: jax.Array) -> jax.Array:
        for past in pasts:
            query = attend_step(query, (new, new), past, start, length, cache_as=how)
        return query

    nbytes = 2 * CACHES * math.prod(CACHE) * new.dtype.itemsize
    return nbytes / median_s(step, new)


def _dequantized_rates(device: Device) -> dict[int, float]:
    return {bits: _dequantized_rate(bits, device) for bits in BITS}


def _dequantized_rate(bits: int, device: Device) -> float:
    """Bytes of bfloat16 per second, into memory that is used again."""
    how = _quantization(bits)
    wide = random_values(WIDENED, device)
    data = [_narrow(wide, how) for _ in range(COPIES)]

    def step(outs: list[jax.Array]) -> list[jax.Array]:
        return dequantize_into(outs, data, quantizations=(how,) * COPIES)

    outs = [jnp.zeros_like(wide, device=device) for _ in range(COPIES)]
    return COPIES * wide.nbytes / median_s(step, outs)


def _sampling_rate(device: Device) -> float:
    """Logits per second of which the likeliest is taken."""
    rows, size = LOGITS
    params = [SamplingParams(temperature=0.0)] * rows
    controls = make_controls(
        params, row_keys(params, range(rows), seed=0), np.zeros(rows, np.int32)
    )
    sample = pick_sampler(params)
    logits = jax.device_put(np.zeros(LOGITS, np.float32), device)

    def step(state: Any) -> Any:
        del state
        return sample(logits, controls), jnp.isfinite(jnp.max(logits, axis=-1))

    return rows * size / median_s(step, None)


def engine_call_s(offload_dir: pathlib.Path, device: Device) -> float:
    """What the engine takes for a call beside the step, by a model of next to nothing.

    The quickest of some runs: the first ones compile.
    """
    store = open_store(resolve_model(EMBEDDED_MODEL, platform=device.platform))
    params = SamplingParams(temperature=0.0, max_tokens=ENGINE_TOKENS, ignore_eos=True)
    policy = Policy(batch_size=ENGINE_ROWS)
    engine = Engine(store, policy, offload_dir=offload_dir, device=device)
    with contextlib.closing(engine):
        spent: list[float] = []
        for _ in range(ENGINE_RUNS):
            rows = [
                Row(index, [5, 6 + index], params, StopChecker(params, eos_token_id=2))
                for index in range(ENGINE_ROWS)
            ]
            engine.generate(rows)
            spent.append(engine.times.decode.seconds)
        calls = (ENGINE_TOKENS - 1) * (store.config.num_hidden_layers + 1)
        return min(spent) / calls
