"""Measures a machine by what a run does on it: its disk, its copies, its steps.

Bytes go the engine's own ways, and numbers through the engine's own functions. What is
read in a loop is larger than a processor's caches.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_tools.resolve import default_cache
from flexjax.attention import prefill_attention
from flexjax.cached_attention import attend_step
from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, DeviceLink, host_device, is_shared
from flexjax.models.config import OPTConfig, decoder_layer_shapes, named_config
from flexjax.models.opt import unflatten
from flexjax.plan.hardware import (
    Hardware,
    read_hardware,
    validate_hardware,
    write_hardware,
)
from flexjax.plan.scratch import Scratch, scratch_file
from flexjax.plan.this_machine import budgets, machine_id, machine_name
from flexjax.policy import BITS, Kind, Policy
from flexjax.quant import Quantization, dequantize_into, quantize
from flexjax.safe_files import make_folder
from flexjax.steps import decode_step, prefill_step

LIMIT_S, MOST_REPEATS = 0.5, 100  # a step is repeated until one of them is reached
LAYERS = (named_config("opt-1.3b"), named_config("opt-6.7b"))  # 0.1 and 0.4 GB each
ROWS = (1, 16, 32, 64, 128, 256, 1024)
PREFILL_ROWS, PROMPT_LEN = 1024, 128  # as many tokens as a prefill takes at a time
PAST_SLOTS = 32
PROMPTS = (8, 32, 128, 128)  # rows, heads, tokens, elements of a head
CACHE = (32, 32, 160, 64)  # rows, heads, slots, elements of a head
WIDENED = (4096, 4096)
COPIES = 3  # of a layer, of a cache, or of what is widened, which take turns
LINK_BYTES, LINK_REPEATS = 256 << 20, 5
BESIDE_ROWS, BESIDE_S = 64, 3.0

Progress = Callable[[str], object]


def ignore(text: str) -> None:
    """The progress that nobody wants to hear of."""
    del text


def calibrated(
    offload_dir: pathlib.Path,
    device: Device,
    progress: Progress = ignore,
    *,
    anew: bool = False,
) -> Hardware:
    """This machine, measured when it is first asked for; its budgets are those of now.

    With `anew` it is measured in any case.

    Raises:
        ValueError: see `calibrate`; or the cache folder cannot be written.
        OSError: see `calibrate`.
    """
    name = f"{machine_id(offload_dir, device)}.json"
    path = default_cache() / "calibration" / name
    hardware = None
    if not anew:
        # There is none yet, or it is damaged, or of another version.
        with contextlib.suppress(ValueError):
            hardware = read_hardware(str(path))
    if hardware is None:
        make_folder(path.parent)  # heard of before a minute is spent
        hardware = calibrate(offload_dir, device, progress)
        write_hardware(path, hardware)
    return dataclasses.replace(hardware, **budgets(offload_dir, device))


def calibrate(
    offload_dir: pathlib.Path, device: Device, progress: Progress = ignore
) -> Hardware:
    """Measures this machine, which takes about a minute.

    Args:
        offload_dir: on the disk that is measured, in a file that does not stay.
        device: that a run computes on.
        progress: is told what comes next, in a few words.

    Raises:
        OSError: the folder cannot be written, or its disk is full.
        ValueError: JAX was told not to use the host's processor.
    """
    device_is_host = is_shared(device)
    progress(f"measuring the disk of {offload_dir}")
    with scratch_file(offload_dir) as scratch:
        figures: dict[str, Any] = {
            "disk_write_bytes_per_s": scratch.write_rate(),
            "disk_read_bytes_per_s": scratch.read_rate(),
        }
        progress("measuring attention and quantization")
        figures |= _attention_figures(device)
        progress("measuring layers")
        layers = [_Layers(config, device) for config in LAYERS]
        figures |= _step_figures(layers, figures)
        if device_is_host:
            progress("measuring the disk and layers beside each other")
            figures |= _contention(scratch, layers[-1])
        del layers
    if not device_is_host:
        progress("measuring copies to the device and back")
        figures |= _copy_rates(device)
    return validate_hardware(
        Hardware(
            name=machine_name(device),
            device_is_host=device_is_host,
            **budgets(offload_dir, device),
            **figures,
        )
    )


def _median_s(step: Callable[[Any], Any], state: Any) -> float:
    """Median seconds of `step`, each time on what it returned before."""
    state = jax.block_until_ready(step(state))  # compiles
    spent: list[float] = []
    while sum(spent) < LIMIT_S and len(spent) < MOST_REPEATS:
        begun_s = time.perf_counter()
        state = jax.block_until_ready(step(state))
        spent.append(time.perf_counter() - begun_s)
    return statistics.median(spent)


def _random(shape: Sequence[int], device: Device) -> jax.Array:
    """Values of bfloat16 on the device, from memory such as the engine's."""
    values = 0.02 * np.random.default_rng(0).standard_normal(1 << 16, np.float32)
    dtype = jnp.dtype("bfloat16")
    buffer = page_aligned(math.prod(shape) * dtype.itemsize)
    array = typed(buffer, tuple(shape), dtype)
    array[...] = np.resize(values.astype(dtype), shape)
    return jax.device_put(array, device)


class _Layers:
    """Decoder layers of one size that take turns, so that none stays in a cache."""

    def __init__(self, config: OPTConfig, device: Device) -> None:
        shapes = decoder_layer_shapes(config)
        self._params = [
            unflatten({name: _random(shape, device) for name, shape in shapes.items()})
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
        past = ((_random(slots, self._device),), (_random(slots, self._device),))
        start, length = np.zeros(rows, np.int32), np.int32(PAST_SLOTS)

        def step(hidden: jax.Array) -> jax.Array:
            params = next(self._turns)
            return decode_step(params, hidden, (past,), start, length, config=config)[0]

        return step

    def decode_s(self, rows: int, attention_bytes_per_s: float) -> float:
        """Seconds of a step without its attention."""
        nbytes = rows * PAST_SLOTS * 2 * self._config.hidden_size * 2
        seconds = _median_s(self.decode(rows), self.hidden(rows, 1))
        return _without(seconds, nbytes / attention_bytes_per_s)

    def prefill_s(self, rows: int, attention_flops_per_s: float) -> float:
        """The same of a prefill of `rows` tokens, in prompts of `PROMPT_LEN`."""
        prompts = rows // PROMPT_LEN
        start = np.zeros(prompts, np.int32)

        def step(hidden: jax.Array) -> jax.Array:
            params = next(self._turns)
            return prefill_step(params, hidden, start, config=self._config)[0]

        flops = 4 * rows * PROMPT_LEN * self._config.hidden_size
        seconds = _median_s(step, self.hidden(prompts, PROMPT_LEN))
        return _without(seconds, flops / attention_flops_per_s)

    def hidden(self, rows: int, tokens: int) -> jax.Array:
        return _random((rows, 1, tokens, self._config.hidden_size), self._device)


def _without(seconds: float, part_s: float) -> float:
    """What is left without a part, which was measured apart and may be too much."""
    return max(seconds - part_s, 0.1 * seconds)


def _attention_figures(device: Device) -> dict[str, Any]:
    """Of attention, on the device and on the host, and of what is widened."""
    rate = _attention_rate(device)
    on_host = rate
    if not is_shared(device):
        on_host = _attention_rate(host_device("a calibration"))
    return {
        "prefill_attention_flops_per_s": _prefill_attention_rate(device),
        "attention_bytes_per_s": rate,
        "host_attention_bytes_per_s": on_host,
        "dequantized_bytes_per_s": {
            bits: _dequantized_rate(bits, device) for bits in BITS
        },
    }


def _step_figures(
    layers: Sequence[_Layers], attention: Mapping[str, Any]
) -> dict[str, Any]:
    """What products take, and what a call takes besides, by the number of rows.

    Two sizes of layers tell the one from the other: what grows with the weights is
    products, what stays is norms, activations and the call itself.
    """
    rates, calls = {}, {}
    for rows in ROWS:
        seconds = [
            layer.decode_s(rows, attention["attention_bytes_per_s"])
            if rows < PREFILL_ROWS
            else layer.prefill_s(rows, attention["prefill_attention_flops_per_s"])
            for layer in layers
        ]
        sizes = [layer.num_weights for layer in layers]
        slope = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
        # On a busy machine the smaller may come out as slow as the larger.
        slope = max(slope, 0.5 * seconds[1] / sizes[1])
        rates[rows] = 2 * rows / slope
        calls[rows] = max(0.0, seconds[0] - slope * sizes[0])
    return {"product_flops_per_s": rates, "call_s": calls}


def _contention(scratch: Scratch, layers: _Layers) -> dict[str, float]:
    """What disk and layer steps keep of their speeds while both go on."""
    step, hidden = layers.decode(BESIDE_ROWS), layers.hidden(BESIDE_ROWS, 1)

    def computing_rate(limit_s: float) -> float:
        nonlocal hidden
        count, begun_s, spent_s = 0, time.perf_counter(), 0.0
        while spent_s < limit_s:
            hidden = jax.block_until_ready(step(hidden))
            count, spent_s = count + 1, time.perf_counter() - begun_s
        return count / spent_s

    computing_rate(LIMIT_S)  # compiles
    disk_alone = scratch.reading_rate(BESIDE_S)
    compute_alone = computing_rate(BESIDE_S)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(scratch.reading_rate, BESIDE_S)
        compute = computing_rate(BESIDE_S)
        disk = reading.result()
    kept = [min(1.0, compute / compute_alone), min(1.0, disk / disk_alone)]
    # Turns would keep as much: less is something else's doing on a busy machine.
    scale = max(1.0, 1.0 / sum(kept))
    return {
        "compute_beside_disk": min(1.0, scale * kept[0]),
        "disk_beside_compute": min(1.0, scale * kept[1]),
    }


def _copy_rates(device: Device) -> dict[str, float]:
    """Of what is lent to the device and read back, as a run does both."""
    link = DeviceLink(device, Ledger())
    sent, rows = page_aligned(LINK_BYTES), slice(0, LINK_BYTES)
    sent[:] = 1
    there, back = [], []
    for _ in range(1 + LINK_REPEATS):
        begun_s = time.perf_counter()
        loan = link.lend(sent, Kind.WEIGHTS)
        lent_s = time.perf_counter()
        link.download(loan.array, rows)
        back.append(LINK_BYTES / (time.perf_counter() - lent_s))
        there.append(LINK_BYTES / (lent_s - begun_s))
        loan.release()
    return {  # without the first, which warms up
        "to_device_bytes_per_s": statistics.median(there[1:]),
        "from_device_bytes_per_s": statistics.median(back[1:]),
    }


def _prefill_attention_rate(device: Device) -> float:
    batch, heads, seq, head_dim = PROMPTS
    arrays = [_random(PROMPTS, device) for _ in ("query", "key", "value")]
    start = np.zeros(batch, np.int32)
    attend = jax.jit(prefill_attention)
    seconds = _median_s(lambda _: attend(*arrays, start), None)
    return 4 * batch * heads * seq * seq * head_dim / seconds


def _attention_rate(device: Device) -> float:
    """Bytes of keys and values per second; the caches take turns."""
    batch, heads, slots, head_dim = CACHE
    pasts = [
        ((_random(CACHE, device),), (_random(CACHE, device),)) for _ in range(COPIES)
    ]
    new = _random((batch, heads, 1, head_dim), device)
    start, length = np.zeros(batch, np.int32), np.int32(slots)

    def step(query: jax.Array) -> jax.Array:
        for past in pasts:
            query = attend_step(query, (new, new), past, start, length)
        return query

    nbytes = sum(array.nbytes for array in jax.tree.leaves(pasts))
    return nbytes / _median_s(step, new)


def _dequantized_rate(bits: int, device: Device) -> float:
    """Bytes of bfloat16 per second, into memory that is used again."""
    how = Quantization(bits=bits, group_size=Policy().group_size, dtype="bfloat16")
    wide = _random(WIDENED, device)
    narrow = jax.jit(quantize, static_argnums=1)
    data = [narrow(wide, how) for _ in range(COPIES)]

    def step(outs: list[jax.Array]) -> list[jax.Array]:
        return [
            dequantize_into(out, codes, quantization=how)
            for out, codes in zip(outs, data, strict=True)
        ]

    outs = [jnp.zeros_like(wide, device=device) for _ in range(COPIES)]
    return COPIES * wide.nbytes / _median_s(step, outs)
