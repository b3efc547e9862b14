"""Compares the ways in which bytes get to an accelerator and back.

    python -m bench.copy_routes --json bench/results/copy-routes.json

To the device it is `jax.device_put` from memory that was made in different ways; from
the device, different ways to read an array. What a route delivers is compared with what
was sent. A route that this machine refuses is reported with its error.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from bench.machine import describe_machine
from flexjax.cli import run_command
from flexjax.memory.buffers import page_aligned
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sizes import format_bytes, parse_bytes

Device = Any  # a jax.Device, which type checkers take for a variable
Array = jax.Array | np.ndarray
Source = Callable[[np.ndarray, Device], contextlib.AbstractContextManager[Array]]
Read = Callable[[jax.Array], Array]

SIZES = ("4MiB", "16MiB", "64MiB", "256MiB", "512MiB")
_BYTES_A_ROUTE = 4 << 30  # copied for each size, between these numbers of repetitions
_MIN_REPETITIONS, _MAX_REPETITIONS = 5, 40


@contextlib.contextmanager
def pageable(source: np.ndarray, device: Device) -> Iterator[Array]:
    """Plain memory that begins at a page."""
    yield source


@contextlib.contextmanager
def kept_pinned_host(source: np.ndarray, device: Device) -> Iterator[Array]:
    """A `pinned_host` array that is made once and kept."""
    yield jax.block_until_ready(jax.device_put(source, _on(device, "pinned_host")))


@contextlib.contextmanager
def dma_mapped(source: np.ndarray, device: Device) -> Iterator[Array]:
    """Plain memory that the runtime is told to pin where it is."""
    device.client.dma_map(source.ctypes.data, source.nbytes)
    try:
        yield source
    finally:
        device.client.dma_unmap(source.ctypes.data)


@contextlib.contextmanager
def dlpack_pinned(source: np.ndarray, device: Device) -> Iterator[Array]:
    """Memory that another library, here torch, has pinned."""
    import torch  # type: ignore[import-not-found]

    pinned = torch.from_numpy(source).pin_memory()
    yield jax.dlpack.from_dlpack(pinned)


def read_numpy(array: jax.Array) -> Array:
    """What a program does that knows of nothing else."""
    return np.asarray(array)


def read_pinned(array: jax.Array) -> Array:
    """Copies to `pinned_host` memory, and looks at that in place."""
    return np.asarray(_to_pinned(array))


def read_pinned_dlpack(array: jax.Array) -> Array:
    """The same, looked at through dlpack."""
    pinned: Any = _to_pinned(array)
    return np.from_dlpack(pinned)


def _to_pinned(array: jax.Array) -> jax.Array:
    (device,) = array.devices()
    return jax.block_until_ready(jax.device_put(array, _on(device, "pinned_host")))


# What needs no other library, which would add to what a process holds.
JAX_SOURCES: Mapping[str, Source] = {
    "pageable": pageable,
    "pinned_host, kept": kept_pinned_host,
    "dma_map": dma_mapped,
}
SOURCES = {**JAX_SOURCES, "dlpack, pinned by torch": dlpack_pinned}
READS: Mapping[str, Read] = {
    "numpy": read_numpy,
    "pinned_host": read_pinned,
    "pinned_host, dlpack": read_pinned_dlpack,
}


def _on(device: Device, memory_kind: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=memory_kind)


def compare_routes(
    device: Device,
    sizes_bytes: Sequence[int],
    sources: Mapping[str, Source] = JAX_SOURCES,
) -> list[dict[str, Any]]:
    """A row for each route and size: its rate, or the error that it ended with."""
    return [
        row for nbytes in sizes_bytes for row in _compare_at(device, nbytes, sources)
    ]


def _compare_at(
    device: Device, nbytes: int, sources: Mapping[str, Source]
) -> Iterator[dict[str, Any]]:
    sent = page_aligned(nbytes)
    sent[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    into = _put_to(device, "pinned_host")
    for name, source in sources.items():
        measure = functools.partial(_time_put, source, sent, device)
        yield _row("host to device", name, nbytes, measure)
    # What it costs to make pinned arrays anew instead of keeping them.
    measure = functools.partial(_time_copies, lambda: sent, into, sent)
    yield _row("host to host", "new pinned_host", nbytes, measure)
    for name, read in READS.items():
        measure = functools.partial(_time_read, read, sent, device)
        yield _row("device to host", name, nbytes, measure)


def _row(
    direction: str, route: str, nbytes: int, measure: Callable[[], list[float]]
) -> dict[str, Any]:
    """The rate of one route; what it raises is a finding, not the end."""
    row: dict[str, Any] = {"direction": direction, "route": route, "nbytes": nbytes}
    try:
        rates = measure()
    except Exception as error:  # noqa: BLE001  (each backend refuses in its own way)
        message = " ".join(str(error).split())
        return row | {"error": f"{type(error).__name__}: {message}"}
    return row | {
        "bytes_per_s": statistics.median(rates),
        "best_bytes_per_s": max(rates),
        "repetitions": len(rates),
    }


def _time_put(source: Source, sent: np.ndarray, device: Device) -> list[float]:
    with source(sent, device) as prepared:
        return _time_copies(lambda: prepared, _put_to(device, "device"), sent)


def _time_read(read: Read, sent: np.ndarray, device: Device) -> list[float]:
    there = jax.device_put(sent, _on(device, "device"))

    def fresh() -> jax.Array:  # an array remembers what numpy was once given of it
        return jax.block_until_ready(there.copy())

    return _time_copies(fresh, read, sent)


def _put_to(device: Device, memory_kind: str) -> Callable[[Any], jax.Array]:
    return lambda array: jax.device_put(array, _on(device, memory_kind))


def _time_copies(
    prepare: Callable[[], Any], copy: Callable[[Any], Array], sent: np.ndarray
) -> list[float]:
    """Bytes per second of `copy(prepare())`, of which only `copy` is timed.

    Raises:
        ValueError: something else arrived than was sent.
    """
    if not np.array_equal(np.asarray(copy(prepare())), sent):  # the warm-up, too
        raise ValueError("other bytes arrived than were sent")
    wanted = _BYTES_A_ROUTE // sent.nbytes
    rates = []
    for _ in range(min(max(wanted, _MIN_REPETITIONS), _MAX_REPETITIONS)):
        prepared = prepare()
        begun_s = time.perf_counter()
        copied = jax.block_until_ready(copy(prepared))
        rates.append(sent.nbytes / (time.perf_counter() - begun_s))
        del copied
    return rates


def _main(args: argparse.Namespace) -> None:
    device: Device = jax.devices()[0]
    if device.platform == "cpu":
        raise ValueError(
            "there is nothing to compare: JAX sees no accelerator here, and a CPU "
            "computes from the host's own memory"
        )
    if args.json is not None:
        ensure_writable("--json", args.json)
    rows = compare_routes(device, [parse_bytes(size) for size in args.sizes], SOURCES)
    print(f"{device.device_kind}, jax {jax.__version__}: median GB/s of single copies")
    for row in rows:
        size, where = format_bytes(row["nbytes"]), f"{row['direction']:15}"
        rate = f"{row['bytes_per_s'] / 1e9:6.1f}" if "error" not in row else "     -"
        print(f"{where} {row['route']:24} {size:>10} {rate}  {row.get('error', '')}")
    if args.json is not None:
        report = {
            "benchmark": "copy_routes",
            "machine": describe_machine(),
            "device": device.device_kind,
            "jax_version": jax.__version__,
            "routes": rows,
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.copy_routes",
        description="Compares the ways to copy between host memory and an accelerator.",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=SIZES,
        metavar="SIZE",
        help=f"of one copy (default: {' '.join(SIZES)})",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the rates here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_main, build_parser()))
