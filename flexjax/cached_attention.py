"""Attention to a cache as it is kept: in segments and pieces, quantized or not.

The jitted steps run on whatever device has their arrays, which need not be the one that
the layers run on.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float, Int, Shaped

from flexjax.attention import Partial, decode_attention
from flexjax.kernels.decode_attention import (
    DECODE_ATTENTION,
    attend_to_cache,
    is_attended,
)
from flexjax.quant import Quantization, dequantize
from flexjax.sparse import (
    Selection,
    SparsePast,
    combine,
    gather,
    select,
    sum_values,
)
from flexjax.workload import wide_rows

# Segments of a cache differ in their rows, their pieces in their slots. A head's
# elements are bytes where the cache is quantized.
KeyOrValue = Shaped[Array, "_rows heads _slots _width"]
KeyValue = tuple[KeyOrValue, KeyOrValue]
HeadVectors = Float[Array, "_rows heads 1 head_dim"]
Past = tuple[tuple[KeyOrValue, ...], tuple[KeyOrValue, ...]]


def attend(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    sparse: SparsePast | None,
    cache_as: Quantization | None,
    found: Partial | None = None,
) -> HeadVectors:
    """Attention to a segment as the cache keeps it.

    Where it is not sparse, it may go on with what was found elsewhere.
    """
    if sparse is None:
        return _attend_to_all(query, new, past, start, length, found, cache_as)

    def attend_rows(inputs: Any) -> HeadVectors:
        query, new, past, start, sparse = inputs
        keys, values = past
        keys = _wide(keys, cache_as)
        selection = select(query, new[0], keys, start, length, sparse.sparsity)
        chosen = _wide(gather(values, selection.slots), cache_as)
        return combine(selection, new[1], chosen, sparse.value_sum)

    inputs = query, new, past, start, sparse
    return _few_wide(attend_rows, inputs, cache_as, len(query))


@functools.partial(jax.jit, static_argnames="cache_as")
def attend_step(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    sparse: SparsePast | None = None,
    *,
    cache_as: Quantization | None = None,
) -> HeadVectors:
    """Attention of new tokens to a segment of the cache, on the device that has it."""
    return attend(query, new, past, start, length, sparse, cache_as)


@functools.partial(jax.jit, static_argnames=("cache_as", "sparsity"))
def select_step(
    query: HeadVectors,
    new_key: HeadVectors,
    keys: tuple[KeyOrValue, ...],
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    *,
    cache_as: Quantization | None = None,
    sparsity: float,
) -> Selection:
    """Which slots of one segment new tokens attend to, found by its keys alone."""

    def choose(inputs: Any) -> Selection:
        query, new_key, keys, start = inputs
        return select(query, new_key, _wide(keys, cache_as), start, length, sparsity)

    inputs = query, new_key, keys, start
    return _few_wide(choose, inputs, cache_as, len(query))


@functools.partial(jax.jit, static_argnames="cache_as")
def combine_step(
    selection: Selection,
    new_value: HeadVectors,
    values: KeyOrValue,
    sparse: SparsePast,
    *,
    cache_as: Quantization | None = None,
) -> HeadVectors:
    """What attention to a segment gives, of the values that `select_step` chose."""

    def weigh(inputs: Any) -> HeadVectors:
        selection, new_value, values, sparse = inputs
        wide = _wide(values, cache_as)
        return combine(selection, new_value, wide, sparse.value_sum)

    inputs = selection, new_value, values, sparse
    return _few_wide(weigh, inputs, cache_as, len(new_value))


@functools.partial(jax.jit, static_argnames="cache_as")
def sum_step(
    values: KeyOrValue,
    start: Int[Array, " batch"],
    *,
    cache_as: Quantization | None = None,
) -> HeadVectors:
    """The sum of each row's values as the cache keeps them, see `sum_values`."""

    def add(inputs: tuple[Array, Array]) -> HeadVectors:
        values, start = inputs
        return sum_values(_wide(values, cache_as), start)

    return _few_wide(add, (values, start), cache_as, len(start))


def _attend_to_all(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    found: Partial | None,
    cache_as: Quantization | None,
) -> HeadVectors:
    """`decode_attention`; by a kernel where this is for a CPU that has it."""
    if not is_attended(query.dtype, query.shape[-1], cache_as):
        return _by_xla(query, new, past, start, length, found, cache_as)
    operands, tree = jax.tree.flatten((query, new, past, start, length, found))
    return _decode_attention.bind(*operands, tree=tree, cache_as=cache_as)


def _by_xla(
    query: HeadVectors,
    new: KeyValue,
    past: Past,
    start: Int[Array, " batch"],
    length: Int[Array, ""],
    found: Partial | None,
    cache_as: Quantization | None,
) -> HeadVectors:
    def attend_rows(inputs: Any) -> HeadVectors:
        query, new, past, start, found = inputs
        past = _wide(past, cache_as)
        return decode_attention(query, new, past, start, length, found)

    inputs = query, new, past, start, found
    return _few_wide(attend_rows, inputs, cache_as, len(query))


# A step is traced before anyone knows what it is for: what it is lowered for says who
# attends. So no kernel is compiled for a GPU, and attention on the host has it.
_decode_attention = Primitive("decode_attention")


@_decode_attention.def_abstract_eval
def _abstract(query: Any, *_: Any, **__: Any) -> Any:
    return query.update(weak_type=False)


@_decode_attention.def_impl
def _eager(*operands: Array, tree: Any, cache_as: Quantization | None) -> Array:
    query, new, past, start, length, found = jax.tree.unflatten(tree, operands)
    return _by_xla(query, new, past, start, length, found, cache_as)


def _lower(
    by: Callable[..., Array], context: Any, *operands: Any, **params: Any
) -> Any:
    def call(*operands: Array, tree: Any, cache_as: Quantization | None) -> Array:
        return by(*jax.tree.unflatten(tree, operands), cache_as)

    return mlir.lower_fun(call, multiple_results=False)(context, *operands, **params)


def _lower_on_cpu(*args: Any, **params: Any) -> Any:
    by = attend_to_cache if DECODE_ATTENTION.is_there() else _by_xla
    return _lower(by, *args, **params)


mlir.register_lowering(_decode_attention, functools.partial(_lower, _by_xla))
mlir.register_lowering(_decode_attention, _lower_on_cpu, platform="cpu")


def _wide(cache: Any, cache_as: Quantization | None) -> Any:
    """Keys, values, or a tree of them, as attention uses them."""
    if cache_as is None:
        return cache
    return jax.tree.map(lambda piece: dequantize(piece, cache_as), cache)


def _few_wide[Out](
    call: Callable[[Any], Out], inputs: Any, cache_as: Quantization | None, batch: int
) -> Out:
    """`call`, with a few rows at a time where they are quantized.

    So what becomes of them stays in the processor's caches.
    """
    rows = batch if cache_as is None else wide_rows(batch)
    return in_groups(call, inputs, rows, batch=batch)


def in_groups[Out](
    call: Callable[[Any], Out], inputs: Any, rows: int, *, batch: int
) -> Out:
    """`call` on `rows` rows at a time of trees of arrays that begin with the batch."""
    if rows == batch:
        return call(inputs)
    grouped = jax.tree.map(
        lambda array: array.reshape(batch // rows, rows, *array.shape[1:]), inputs
    )
    return jax.tree.map(
        lambda array: array.reshape(batch, *array.shape[2:]),
        jax.lax.map(call, grouped),
    )
