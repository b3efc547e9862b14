"""Measures a machine by what a run does on it: its disk, its copies, its steps.

Bytes go the engine's own ways, and numbers through the engine's own functions. What is
read in a loop is larger than a processor's caches.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from flexjax.cache_folder import default_cache
from flexjax.kernels.products import PRODUCTS
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import Device, DeviceLink, host_device, is_shared
from flexjax.plan.hardware import (
    QUANTIZED_PRODUCTS,
    Hardware,
    read_hardware,
    validate_hardware,
    write_hardware,
)
from flexjax.plan.scratch import Scratch, scratch_file
from flexjax.plan.step_rates import (
    LAYERS,
    LIMIT_S,
    Layers,
    attention_figures,
    engine_call_s,
    median_s,
    quantized_product_rates,
    step_figures,
)
from flexjax.plan.this_machine import budgets, machine_id, machine_name
from flexjax.policy import BITS, Kind
from flexjax.safe_files import make_folder

LINK_BYTES, LINK_REPEATS = 256 << 20, 5
QUERY_SHAPE = (16, 32, 1, 128)  # rows, heads, tokens, elements; keys and values alike
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
        figures |= attention_figures(device)
        progress("measuring layers")
        layers = [Layers(config, device) for config in LAYERS]
        call_s = engine_call_s(offload_dir, device)
        figures |= step_figures(layers, figures, call_s)
        if device_is_host:
            progress("measuring the disk and layers beside each other")
            figures |= _contention(scratch, layers[-1])
        del layers
    if device_is_host and PRODUCTS.is_there():
        progress("measuring layers that are quantized")
        for activation_bits, name in QUANTIZED_PRODUCTS.items():
            figures[name] = {
                bits: quantized_product_rates(
                    Layers(LAYERS[-1], device, bits, activation_bits), figures, call_s
                )
                for bits in BITS
            }
    if not device_is_host:
        progress("measuring copies to the device and back")
        figures |= _copy_figures(device)
    return validate_hardware(
        Hardware(
            name=machine_name(device),
            device_is_host=device_is_host,
            **budgets(offload_dir, device),
            **figures,
        )
    )


def _contention(scratch: Scratch, layers: Layers) -> dict[str, float]:
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
    names = ("compute_beside_disk", "disk_beside_compute")
    kept = kept_together(compute / compute_alone, disk / disk_alone)
    return dict(zip(names, kept, strict=True))


def kept_together(first: float, second: float) -> tuple[float, float]:
    """What two that go on at once keep of their speeds: 1 in all at the least.

    They would keep as much if they took turns: less is something else's doing on a
    busy machine.
    """
    if first + second < 1:
        first /= first + second
        second = 1 - first
    return min(1.0, first), min(1.0, second)


def _copy_figures(device: Device) -> dict[str, float]:
    """Of what is lent to the device and read back, as a run does both."""
    link = DeviceLink(device, Ledger())
    try:
        return {**_copy_rates(link), "round_trip_s": _round_trip_s(link)}
    finally:
        link.close()


def _copy_rates(link: DeviceLink) -> dict[str, float]:
    sent, rows = link.host_memory(LINK_BYTES), slice(0, LINK_BYTES)
    sent[:] = 1
    there, back = [], []
    for _ in range(1 + LINK_REPEATS):
        begun_s = time.perf_counter()
        loan = link.lend(sent, Kind.WEIGHTS)
        jax.block_until_ready(loan.array)
        lent_s = time.perf_counter()
        link.download(loan.array, rows)
        back.append(LINK_BYTES / (time.perf_counter() - lent_s))
        there.append(LINK_BYTES / (lent_s - begun_s))
        loan.release()
    return {  # without the first, which warms up
        "to_device_bytes_per_s": statistics.median(there[1:]),
        "from_device_bytes_per_s": statistics.median(back[1:]),
    }


def _round_trip_s(link: DeviceLink) -> float:
    """Of what attention on the host is told, and tells, of a token of a few rows."""
    told = [
        jax.device_put(np.zeros(QUERY_SHAPE, np.float32), link.device)
        for _ in ("query", "key", "value", "start")
    ]
    host = host_device("a calibration")

    def step(state: Any) -> jax.Array:
        del state
        query, *_ = jax.device_put(link.download(told, slice(None)), host)
        loan = link.lend(np.asarray(query + query), Kind.ACTIVATIONS)
        loan.release()
        return loan.array

    return median_s(step, None)
