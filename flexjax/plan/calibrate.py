"""Measures a machine by what a run does on it: its disk, its copies, its steps.

Bytes go the engine's own ways, and numbers through the engine's own functions. What is
read in a loop is larger than a processor's caches.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints_tools.resolve import default_cache
from flexjax.attention import prefill_attention
from flexjax.cached_attention import attend_step
from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.capacity import free_bytes
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, DeviceLink, host_device, is_shared
from flexjax.models.config import OPTConfig, decoder_layer_shapes, named_config
from flexjax.models.opt import contract_last, unflatten
from flexjax.plan.hardware import (
    Hardware,
    read_hardware,
    validate_hardware,
    write_hardware,
)
from flexjax.plan.scratch import Scratch, scratch_file
from flexjax.policy import BITS, Kind, Policy
from flexjax.quant import Quantization, dequantize_into, quantize
from flexjax.safe_files import make_folder
from flexjax.steps import decode_step

LIMIT_S, MOST_REPEATS = 0.5, 100  # a step is repeated until one of them is reached
LAYER = named_config("opt-6.7b")  # gives the matrices: 0.4 GB of them
ROWS = (1, 16, 32, 64, 128, 256, 1024)
PROMPTS = (8, 32, 128, 128)  # rows, heads, tokens, elements of a head
CACHE = (32, 32, 160, 64)  # rows, heads, slots, elements of a head
WIDENED = (4096, 4096)
COPIES = 3  # of a cache, or of what is widened, which take turns
SMALLEST = OPTConfig(hidden_size=64, num_attention_heads=2, ffn_dim=128)
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
    return dataclasses.replace(hardware, **_budgets(offload_dir, device))


def machine_id(offload_dir: pathlib.Path, device: Device) -> str:
    """A name for what figures depend on: processors, memory, disk, and JAX's version.

    A disk is known by the system's number for it.
    """
    folder = offload_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    facts = [
        _cpu_model(),
        _num_cores(),
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        _device_kind(device),
        existing.stat().st_dev,
        jax.__version__,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


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
    budgets, device_is_host = _budgets(offload_dir, device), is_shared(device)
    host = device if device_is_host else host_device("a calibration")
    progress(f"measuring the disk of {offload_dir}")
    with scratch_file(offload_dir) as scratch:
        figures: dict[str, Any] = {
            "disk_write_bytes_per_s": scratch.write_rate(),
            "disk_read_bytes_per_s": scratch.read_rate(),
        }
        progress("measuring products of matrices")
        weights = _layer_matrices(device)
        figures["product_flops_per_s"] = {
            rows: _product_rate(rows, weights, device) for rows in ROWS
        }
        if device_is_host:
            progress("measuring the disk and products beside each other")
            figures |= _contention(scratch, weights, device)
        del weights
    if not device_is_host:
        progress("measuring copies to the device and back")
        figures |= _copy_rates(device)
    progress("measuring attention and quantization")
    attention_rate = _attention_rate(device)
    return validate_hardware(
        Hardware(
            name=_name(device),
            device_is_host=device_is_host,
            prefill_attention_flops_per_s=_prefill_attention_rate(device),
            attention_bytes_per_s=attention_rate,
            host_attention_bytes_per_s=(
                attention_rate if device_is_host else _attention_rate(host)
            ),
            dequantized_bytes_per_s={
                bits: _dequantized_rate(bits, device) for bits in BITS
            },
            call_s=_call_s(device),
            **budgets,
            **figures,
        )
    )


def _budgets(offload_dir: pathlib.Path, device: Device) -> dict[str, Any]:
    """What is free now, as fields of `Hardware`."""
    free = free_bytes(device, offload_dir)
    fields = ("device_memory_bytes", "host_memory_bytes", "disk_bytes")
    return dict(zip(fields, free.values(), strict=True))


def _name(device: Device) -> str:
    host = f"{_cpu_model()}, {_num_cores()} cores"
    return host if is_shared(device) else f"{_device_kind(device)}, {host}"


def _device_kind(device: Device) -> str:
    return getattr(device, "device_kind", device.platform)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    named = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.machine()).strip()


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


def _layer_matrices(device: Device) -> list[jax.Array]:
    """Each takes what the one before it gives."""
    shapes = decoder_layer_shapes(LAYER).values()
    return [_random(shape, device) for shape in shapes if len(shape) == 2]


@jax.jit
def _multiply(
    x: Float[Array, "rows inputs"], weights: list[Float[Array, "_outputs _inputs"]]
) -> Float[Array, "rows outputs"]:
    for weight in weights:
        x = contract_last(x, weight).astype(x.dtype)
    return x


def _product_rate(rows: int, weights: list[jax.Array], device: Device) -> float:
    x = _random((rows, LAYER.hidden_size), device)
    seconds = _median_s(lambda _: _multiply(x, weights), None)
    return 2 * rows * sum(weight.size for weight in weights) / seconds


def _contention(
    scratch: Scratch, weights: list[jax.Array], device: Device
) -> dict[str, float]:
    """What disk and products keep of their speeds while both go on."""
    x = _random((BESIDE_ROWS, LAYER.hidden_size), device)

    def computing_rate(limit_s: float) -> float:
        count, begun_s, spent_s = 0, time.perf_counter(), 0.0
        while spent_s < limit_s:
            jax.block_until_ready(_multiply(x, weights))
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


def _call_s(device: Device) -> float:
    """Seconds of a layer step that has next to nothing to compute."""
    shapes = decoder_layer_shapes(SMALLEST)
    params = unflatten({name: _random(shapes[name], device) for name in shapes})
    slot = (1, SMALLEST.num_attention_heads, 1, SMALLEST.head_dim)
    past = ((_random(slot, device),), (_random(slot, device),))
    start, length = np.zeros(1, np.int32), np.int32(1)

    def step(hidden: jax.Array) -> jax.Array:
        return decode_step(params, hidden, (past,), start, length, config=SMALLEST)[0]

    return _median_s(step, _random((1, 1, 1, SMALLEST.hidden_size), device))
