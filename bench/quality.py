"""What fewer bytes cost: perplexity on held-out text, and how often the answer stays.

    python -m bench.quality --json bench/results/quality.json
    python -m bench.quality --outliers 32

Takes the embedded model, which comes with text that it was not trained on, and looks at
each token with everything before it in its window, weights and cache being quantized as
a run would quantize them. Where attention is sparse, the first quarter of a window is
the prompt, which a run attends to whole, and only tokens behind it count. The tests
hold runs to the same arithmetic.

Large models have a few features that stand out by far, which cost a group that they are
in its precision (arXiv 2208.07339); the embedded one has none. `--outliers` gives it
some: features of what matrices multiply become so many times as large, and their
weights as much smaller. In 16 bits, and with a power of two, that is the same model.
"""

import argparse
import datetime
import functools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.machine import describe_machine
from checkpoints_tools.resolve import resolve_model
from flexjax.attention import prefill_attention
from flexjax.checkpoint import WeightStore, open_store
from flexjax.cli import run_command
from flexjax.kernels.products import PRODUCTS
from flexjax.llm import EMBEDDED_MODEL
from flexjax.models.opt import forward, unflatten
from flexjax.policy import Policy
from flexjax.quant import (
    Quantization,
    QuantizedArray,
    cache_quantization,
    dequantize,
    quantize,
)
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sparse import sparse_prefill_attention
from flexjax.tokenizer import load_tokenizer

# Bits of weights, of the KV cache and of activations, and how much of the past is
# attended to; the first is what the others are compared with.
SETTINGS = (
    (None, None, None, 1.0),
    (8, None, None, 1.0),
    (None, 8, None, 1.0),
    (8, 8, None, 1.0),
    (8, 8, 8, 1.0),
    (4, None, None, 1.0),
    (4, None, 8, 1.0),
    (None, 4, None, 1.0),
    (4, 4, None, 1.0),
    (4, 4, 8, 1.0),
    (None, None, None, 0.1),
    (4, 4, None, 0.1),
    (4, 4, 8, 0.1),
)
HELD_OUT = pathlib.Path(EMBEDDED_MODEL) / "heldout.txt"
_ROWS_A_CALL = 8
_NUM_OUTLIERS = 6  # features of all of a layer's norms
_NORMS = ("self_attn_layer_norm.weight", "self_attn_layer_norm.bias")
_NORMS += ("final_layer_norm.weight", "final_layer_norm.bias")
_READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight")


class _Said(NamedTuple):
    """What a model says of every token: how surprised it is, and what it would say."""

    nats: np.ndarray  # float64 [windows, tokens]
    best: np.ndarray  # int [windows, tokens]


def measure_quality(
    most_windows: int | None = None, outliers: float = 1.0
) -> Iterator[dict[str, Any]]:
    """One row of results a setting, as JSON values.

    Args:
        most_windows: windows of text to look at; all, if None.
        outliers: times that some features become as large.
    """
    plain: _Said | None = None
    as_stored = open_store(resolve_model(EMBEDDED_MODEL))
    for weight_bits, kv_cache_bits, activation_bits, sparsity in SETTINGS:
        if activation_bits is not None and not PRODUCTS.is_there():
            continue
        policy = Policy(
            weight_bits=weight_bits,
            kv_cache_bits=kv_cache_bits,
            activation_bits=activation_bits,
            attention_sparsity=sparsity,
        )
        store = open_store(resolve_model(EMBEDDED_MODEL, weight_bits=weight_bits))
        tensors = {
            name: _read(store, name)
            if outliers == 1
            else _with_outliers(as_stored, name, outliers, entry.quantization)
            for name, entry in store.tensors.items()
        }
        said = _listen(store, tensors, policy, most_windows)
        plain = plain or said
        first = _prompt_len(store) if sparsity < 1 else 0
        row = _compared(said, plain, first)
        yield {
            "weight_bits": weight_bits,
            "kv_cache_bits": kv_cache_bits,
            "activation_bits": activation_bits,
            "attention_sparsity": sparsity,
            **row,
            "bits_per_matrix_element": _matrix_bits(store),
        }


def _compared(said: _Said, plain: _Said, first: int) -> dict[str, float]:
    """Figures over every window's tokens from `first` on."""
    nats, plain_nats = said.nats[:, first:], plain.nats[:, first:]
    agrees = said.best[:, first:] == plain.best[:, first:]
    return {
        "perplexity": math.exp(nats.mean()),
        "increase": math.exp(nats.mean() - plain_nats.mean()) - 1,
        "top_1_agreement": float(agrees.mean()),
        "tokens": nats.size,
    }


def _prompt_len(store: WeightStore) -> int:
    """Slots of a window that stand for a prompt, where it matters."""
    return store.config.max_position_embeddings // 4


def _listen(
    store: WeightStore,
    tensors: Mapping[str, jax.Array],
    policy: Policy,
    most_windows: int | None,
) -> _Said:
    config, attention = store.config, prefill_attention
    how = cache_quantization(policy, config, store.dtype)
    bits = policy.activation_bits
    params = unflatten(
        {
            name: _used(array, store.tensors[name].quantization, bits)
            for name, array in tensors.items()
        }
    )
    if policy.attention_sparsity < 1:
        attention = functools.partial(
            sparse_prefill_attention,
            sparsity=policy.attention_sparsity,
            prompt_end=jnp.array([_prompt_len(store)]),
        )

    @jax.jit
    def say(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.zeros(len(ids), jnp.int32)
        logits = forward(params, ids[:, :-1], start, config, how, attention)
        logprobs = jax.nn.log_softmax(logits)
        found = jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=-1)[..., 0]
        return -found, jnp.argmax(logits, axis=-1)

    nats, best = [], []
    windows = _windows(store)[:most_windows]
    for first in range(0, len(windows), _ROWS_A_CALL):
        rows = np.stack(windows[first : first + _ROWS_A_CALL])
        surprise, choice = say(rows)
        nats.append(np.asarray(surprise, np.float64))
        best.append(np.asarray(choice))
    return _Said(np.concatenate(nats), np.concatenate(best))


def _windows(store: WeightStore) -> list[np.ndarray]:
    """Windows of the held-out text, as long as the model sees, each after a bos."""
    ids = load_tokenizer(pathlib.Path(EMBEDDED_MODEL)).encode(HELD_OUT.read_text())
    length, bos = store.config.max_position_embeddings - 1, store.config.bos_token_id
    return [
        np.array([bos, *ids[first : first + length]], np.int32)
        for first in range(0, len(ids) - length + 1, length)
    ]


def _used(
    array: jax.Array, how: Quantization | None, activation_bits: int | None
) -> jax.Array | QuantizedArray:
    """A tensor made wide, unless what it is multiplied with is rounded."""
    if how is None:
        return array
    if activation_bits is not None:
        return QuantizedArray(array, how, activation_bits)
    return dequantize(array, how)


def _read(store: WeightStore, name: str) -> jax.Array:
    entry = store.tensors[name]
    array = np.empty(entry.shape, entry.dtype)
    store.read(name, array)
    return jnp.asarray(array)


def _with_outliers(
    store: WeightStore, name: str, outliers: float, how: Quantization | None
) -> jax.Array:
    """A tensor of a store in 16 bits with some features larger, then quantized."""
    array = _read(store, name)
    features = np.random.default_rng(0).choice(
        store.config.hidden_size, _NUM_OUTLIERS, replace=False
    )
    if name.startswith("layers.") and name.endswith(_NORMS):
        array = array.at[features].multiply(jnp.asarray(outliers, array.dtype))
    if name.startswith("layers.") and name.endswith(_READERS):
        smaller = jnp.asarray(1 / outliers, array.dtype)
        array = array.at[:, features].multiply(smaller)
    return array if how is None else quantize(array, how)


def _matrix_bits(store: WeightStore) -> float:
    """Bits on disk of an element of the decoder layers' matrices."""
    matrices = [
        entry
        for name, entry in store.tensors.items()
        if name.startswith("layers.") and len(entry.shape) == 2
    ]
    elements = sum(math.prod(entry.used_shape) for entry in matrices)
    return 8 * sum(entry.stored_bytes for entry in matrices) / elements


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a person."""
    heads = f"{'weights':>8} {'cache':>6} {'inputs':>7} {'past':>6} {'perplexity':>11}"
    lines = [f"{heads} {'change':>8}  same top 1"]
    for row in rows:
        kinds = "weight", "kv_cache", "activation"
        weights, cache, inputs = (row[f"{kind}_bits"] or 16 for kind in kinds)
        lines.append(
            f"{weights:8} {cache:6} {inputs:7} {row['attention_sparsity']:6.0%} "
            f"{row['perplexity']:11.3f} {row['increase']:+8.2%} "
            f"{row['top_1_agreement']:11.1%}"
        )
    return "\n".join(lines)


def _main(args: argparse.Namespace) -> None:
    if args.json is not None:
        ensure_writable("--json", args.json)
    if not math.isfinite(args.outliers) or args.outliers <= 0:
        raise ValueError(f"--outliers is {args.outliers:g}, expected more than 0")
    rows = [*measure_quality(outliers=args.outliers)]
    print(table(rows))
    if args.json is not None:
        report = {
            "quality": rows,
            "model": "embedded",
            "machine": describe_machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "python -m bench.quality"
            + (f" --outliers {args.outliers:g}" if args.outliers != 1 else ""),
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description="Perplexity of the embedded model on held-out text, with weights "
        "and KV cache at several precisions.",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the figures here"
    )
    parser.add_argument(
        "--outliers",
        type=float,
        default=1.0,
        metavar="F",
        help="make some features F times as large, and their weights as much smaller",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_main, build_parser()))
