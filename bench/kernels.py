"""How fast the numbers alone are: matrix products, a prefill layer, decode attention.

    python -m bench.kernels opt-6.7b --json bench/results/kernels.json

Everything is in memory. Rates of products count the multiplications with weights alone,
two operations each; that of the instruction alone, on registers, is what no product
can pass. Rates of attention count the bytes of keys and values as they are kept, and
those of dequantization the bytes of what comes out.
"""

import argparse
import concurrent.futures
import ctypes
import datetime
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.compute_limit import median_s
from bench.machine import describe_machine
from flexjax.cached_attention import attend_step
from flexjax.cli import run_command
from flexjax.kernels import compiled
from flexjax.kernels.products import PRODUCTS, is_multiplied
from flexjax.memory.buffers import page_aligned, typed
from flexjax.models.config import OPTConfig, layer_tensors, named_config, tensor_shapes
from flexjax.models.opt import contract_last, unflatten
from flexjax.policy import ACTIVATION_BITS, BITS, Policy
from flexjax.quant import (
    Quantization,
    QuantizedArray,
    cache_quantization,
    dequantize_into,
    fitting_group,
    quantize,
)
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sizes import format_bytes
from flexjax.sparse import SparsePast
from flexjax.steps import prefill_step

ROWS = (1, 4, 16, 64, 256, 512, 2048)
PROMPT_LEN = 128
PAST_SLOTS = 512
SPARSITY = 0.1
MEMORY_BYTES = 1 << 30
PROCESSORS = os.cpu_count() or 1
DTYPES = (jnp.bfloat16, jnp.float32)
PEAK, PEAK_S = pathlib.Path(__file__).with_name("peak.cc"), 0.5


def measure_kernels(
    config: OPTConfig, *, batch_size: int = 32
) -> Iterator[dict[str, Any]]:
    """One row of results after the other, as JSON values.

    Args:
        config: gives the shapes.
        batch_size: of the prefill layer, with prompts of `PROMPT_LEN`, and of decode
            attention over `PAST_SLOTS` slots.
    """
    group = fitting_group(config.hidden_size, Policy().group_size, min(BITS))
    assert group is not None  # of a published model
    ways = [Quantization(bits=b, group_size=group, dtype="bfloat16") for b in BITS]
    # Here, so that it fails before anything is measured.
    instructions = PRODUCTS.instructions() if PRODUCTS.is_there() else None
    peak = compiled.library(PEAK, instructions) if instructions else None
    for rows in ROWS:
        yield _product(config, rows)
    for how, rounded in itertools.product(ways, (None, *ACTIVATION_BITS)):
        if PRODUCTS.is_there() and is_multiplied(how, config.hidden_size):
            for rows in ROWS:
                yield _product(config, rows, how, rounded)
    if peak is not None:
        yield from (_peak(peak, dtype) for dtype in ("bfloat16", "int8"))
    yield _prefill_layer(config, batch_size)
    yield _memory_read()
    for dtype in DTYPES:
        yield _decode_attention(config, batch_size, dtype)
    yield _decode_attention(config, batch_size, jnp.bfloat16, sparsity=SPARSITY)
    for bits in BITS:
        policy = Policy(kv_cache_bits=bits)
        how = cache_quantization(policy, config, jnp.dtype(jnp.bfloat16))
        yield _decode_attention(config, batch_size, jnp.bfloat16, how=how)
    for how in ways:
        yield _dequantization(config, how)


def _product(
    config: OPTConfig,
    rows: int,
    how: Quantization | None = None,
    activation_bits: int | None = None,
) -> dict[str, Any]:
    """The MLP's first matrix, quantized or not, times `rows` rows of bfloat16."""
    weight = wide = _random((config.ffn_dim, config.hidden_size), jnp.bfloat16)
    if how is not None:
        weight = QuantizedArray(_narrow(wide, how), how, activation_bits)
    kinds = "bfloat16" if how is None else f"{how.bits} bits"
    if activation_bits is not None:
        kinds += f", rows in {activation_bits}"
    x = _random((rows, config.hidden_size), jnp.bfloat16)
    step = jax.jit(contract_last)
    seconds = median_s(lambda _: step(x, weight), None)
    return {
        "kernel": f"product, {kinds}",
        "shape": f"{rows} rows, {config.ffn_dim} x {config.hidden_size}",
        "seconds": seconds,
        "flops_per_s": 2 * rows * wide.size / seconds,
        "bytes_per_s": sum(array.nbytes for array in jax.tree.leaves(weight)) / seconds,
    }


_narrow = jax.jit(quantize, static_argnums=1)


def _prefill_layer(config: OPTConfig, batch_size: int) -> dict[str, Any]:
    """A whole decoder layer on prompts, attention, norms and activations included."""
    shapes = tensor_shapes(config)
    layer = "layers.0."
    tensors = {
        name.removeprefix(layer): _random(shapes[name], jnp.bfloat16)
        for name in layer_tensors(config, 0)
        if name.startswith(layer)
    }
    params, start = unflatten(tensors), jnp.zeros(batch_size, jnp.int32)

    def step(hidden: jax.Array) -> jax.Array:
        return prefill_step(params, hidden, start, config=config)[0]

    shape = (batch_size, 1, PROMPT_LEN, config.hidden_size)
    seconds = median_s(step, _random(shape, jnp.bfloat16))
    weights = sum(tensor.size for tensor in tensors.values() if tensor.ndim == 2)
    return {
        "kernel": "prefill layer, bfloat16",
        "shape": f"{batch_size} rows of {PROMPT_LEN} tokens",
        "seconds": seconds,
        "flops_per_s": 2 * batch_size * PROMPT_LEN * weights / seconds,
    }


def _peak(library: ctypes.CDLL, dtype: str) -> dict[str, Any]:
    """What all processors together multiply at most, of what is in registers."""
    measure = getattr(library, f"flexjax_peak_{dtype}")
    measure.argtypes, measure.restype = [ctypes.c_double], ctypes.c_double
    with concurrent.futures.ThreadPoolExecutor(PROCESSORS) as threads:
        rates = list(threads.map(measure, [PEAK_S] * PROCESSORS))
    return {
        "kernel": f"the instruction alone, {dtype}",
        "shape": f"on registers, {PROCESSORS} threads",
        "seconds": PEAK_S,
        "flops_per_s": sum(rates),
    }


def _memory_read() -> dict[str, Any]:
    """What all processors together read of the host's memory, at most."""
    array = typed(page_aligned(MEMORY_BYTES), (MEMORY_BYTES // 8,), np.dtype("i8"))
    array[:] = 1
    chunks = np.array_split(array, 8 * PROCESSORS)
    with concurrent.futures.ThreadPoolExecutor(PROCESSORS) as threads:
        # Not a sum of floats: adding takes longer than reading, 17 GB/s for 29.
        seconds = median_s(lambda _: list(threads.map(np.max, chunks)), None)
    return {
        "kernel": "memory read",
        "shape": f"the largest of {format_bytes(MEMORY_BYTES)} of int64",
        "seconds": seconds,
        "bytes_per_s": MEMORY_BYTES / seconds,
    }


def _decode_attention(
    config: OPTConfig,
    batch_size: int,
    dtype: Any,
    *,
    how: Quantization | None = None,
    sparsity: float = 1.0,
) -> dict[str, Any]:
    """One new token a row over a cache; bytes are all of the cache's, as it is kept."""
    rows = (batch_size, config.num_attention_heads)
    key, value = (
        _random((*rows, PAST_SLOTS, config.head_dim), dtype) for _ in range(2)
    )
    if how is not None:
        key, value = _narrow(key, how), _narrow(value, how)
    past = ((key,), (value,))
    query = _random((*rows, 1, config.head_dim), dtype)
    start, length = jnp.zeros(batch_size, jnp.int32), np.int32(PAST_SLOTS)
    arguments = query, (query, query), past, start, length
    if sparsity < 1:
        arguments += (SparsePast(query.astype(jnp.float32), sparsity),)
    seconds = median_s(lambda _: attend_step(*arguments, cache_as=how), None)
    kept = f" in {how.bits} bits" if how is not None else ""
    kept += f", {sparsity:.0%} kept" if sparsity < 1 else ""
    return {
        "kernel": f"decode attention, {jnp.dtype(dtype).name}{kept}",
        "shape": f"{batch_size} rows, {PAST_SLOTS} slots",
        "seconds": seconds,
        "bytes_per_s": (key.nbytes + value.nbytes) / seconds,
    }


def _dequantization(config: OPTConfig, how: Quantization) -> dict[str, Any]:
    """The MLP's first matrix made wide, in memory that is used again."""
    weight = _random((config.ffn_dim, config.hidden_size), jnp.bfloat16)
    data = _narrow(weight, how)
    nbytes = weight.nbytes

    def step(outs: list[jax.Array]) -> list[jax.Array]:
        return dequantize_into(outs, [data], quantizations=(how,))

    seconds = median_s(step, [weight])
    return {
        "kernel": f"dequantization, {how.bits} bits",
        "shape": f"{config.ffn_dim} x {config.hidden_size}, groups of {how.group_size}",
        "seconds": seconds,
        "bytes_per_s": nbytes / seconds,  # of the result
    }


def _random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return jnp.asarray(0.02 * values).astype(dtype)


def _main(args: argparse.Namespace) -> None:
    config = named_config(args.model)
    if args.json is not None:
        ensure_writable("--json", args.json)
    rows = []
    for row in measure_kernels(config):
        rows.append(row)
        rates = [
            f"{row[key] / scale:8.2f} {unit}"
            for key, scale, unit in (
                ("flops_per_s", 1e12, "TFLOP/s"),
                ("bytes_per_s", 1e9, "GB/s"),
            )
            if key in row
        ]
        print(f"{row['kernel']:34} {row['shape']:32} {' '.join(rates)}", flush=True)
    if args.json is not None:
        report = {
            "kernels": rows,
            "model": args.model,
            "machine": describe_machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": f"python -m bench.kernels {args.model}",
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description="Measures matrix products, a prefill layer and decode attention.",
    )
    parser.add_argument("model", help="a published model that gives the shapes")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the rates here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_main, build_parser()))
