"""Attention apart from a layer's step: on the host, or to values chosen by their keys.

A decode call is then three: `project` on the device, `attend` beside it, and the rest
of the layer, on the device again. While one batch is attended to, the device is free
for the next one's projections.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flexjax.cached_attention import (
    KeyValue,
    attend_step,
    combine_step,
    select_step,
)
from flexjax.memory.link import DeviceLink, HostLink, Loan
from flexjax.memory.placed import Arrays, PlacedArrays
from flexjax.memory.routes import DIRECT, Route
from flexjax.models.config import OPTConfig
from flexjax.models.opt import Params
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization
from flexjax.schedule.ops import Cache
from flexjax.sparse import SparsePast
from flexjax.steps import project_step

Segments = Mapping[Tier, tuple[Arrays, ...]]


@dataclasses.dataclass(frozen=True)
class Projected:
    """What comes before attention.

    Attributes:
        hidden: what the layer was given, `[batch, 1, 1, hidden]`.
        query, new: of the new tokens, `[batch, heads, 1, head_dim]` each.
        cache: keys and values of the new tokens as the cache keeps them.
        attended: what the device finds itself, by the tier of the rows.
        start: first slot of each row that holds a real token, `[batch]`.
        length: slots of the cache that are in use.
        sparse: says that attention is, and to how much.
    """

    hidden: jax.Array
    query: jax.Array
    new: KeyValue
    cache: KeyValue
    attended: Mapping[Tier, jax.Array]
    start: jax.Array
    length: np.int32
    sparse: SparsePast | None


class Attended:
    """What attention found, in the order of the rows, and the memory that holds it."""

    def __init__(self, outs: tuple[jax.Array, ...], loans: list[Loan]) -> None:
        self.outs, self._loans = outs, loans

    def release(self) -> None:
        self.outs = ()
        while self._loans:
            self._loans.pop().release()


class AttentionApart:
    """Attends to caches that a layer's step does not get whole.

    Args of the constructor:
        cache: where keys and values are.
        link: to the device.
        routes: what becomes of the rows of each tier.
        host: the host's processor, where anything is attended to by it.
        config: of the model.
        cache_as: how the cache is quantized.
    """

    def __init__(
        self,
        cache: PlacedArrays,
        link: DeviceLink,
        routes: Mapping[Tier, Route],
        *,
        host: HostLink | None,
        config: OPTConfig,
        cache_as: Quantization | None,
    ) -> None:
        self._cache, self._routes, self._config = cache, routes, config
        self._link = link
        self._host, self._cache_as = host, cache_as

    def project(
        self,
        layer: Params,
        hidden: jax.Array,
        segments: Segments,
        start: jax.Array,
        length: np.int32,
        sparse: SparsePast | None,
    ) -> Projected:
        """Dispatches what comes before attention, and attention on the device."""
        query, new, cache = project_step(
            layer, hidden, config=self._config, cache_as=self._cache_as
        )
        attended = {
            tier: attend_step(
                *_of_rows(rows, query, new),
                segment,
                start[rows],
                length,
                *_of_rows(rows, sparse),
                cache_as=self._cache_as,
            )
            for tier, rows, segment in _spans(segments)
            if self._routes[tier] == DIRECT
        }
        return Projected(hidden, query, new, cache, attended, start, length, sparse)

    def attend(self, key: Cache, made: Projected, segments: Segments) -> Attended:
        """Attends to the rows that are left; waits until they are done."""
        outs, loans = dict(made.attended), list[Loan]()
        try:
            for tier, rows, segment in _spans(segments):
                route = self._routes[tier]
                if route.on_host:
                    found = self._on_host(made, rows, segment)
                    loans.append(self._link.lend(found, Kind.ACTIVATIONS))
                    outs[tier] = loans[-1].array
                elif route.gathers:
                    keys, *_ = segment
                    outs[tier] = self._gathered(made, key, tier, rows, keys, loans)
        except BaseException:
            Attended((), loans).release()
            raise
        return Attended(tuple(outs[tier] for tier in segments), loans)

    def _on_host(
        self, made: Projected, rows: slice, segment: tuple[Arrays, ...]
    ) -> np.ndarray:
        """Attention by the host's processor, in its memory."""
        assert self._host is not None
        needed = made.query, made.new, made.start, made.sparse
        query, new, start, sparse = jax.device_put(
            self._link.download(needed, rows), self._host.device
        )
        found = attend_step(
            query,
            new,
            segment,
            start,
            made.length,
            sparse,
            cache_as=self._cache_as,
        )
        return np.asarray(found)

    def _gathered(
        self,
        made: Projected,
        key: Cache,
        tier: Tier,
        rows: slice,
        keys: Arrays,
        loans: list[Loan],
    ) -> jax.Array:
        """Attention on the device, to the values that its keys choose."""
        query, (new_key, new_value), sparse = _of_rows(
            rows, made.query, made.new, made.sparse
        )
        selection = select_step(
            query,
            new_key,
            keys,
            made.start[rows],
            made.length,
            cache_as=self._cache_as,
            sparsity=sparse.sparsity,
        )
        slots = self._link.download(selection.slots, slice(None))
        loans.append(self._cache.gather(key, tier, slots))
        values = loans[-1].array
        return combine_step(
            selection, new_value, values, sparse, cache_as=self._cache_as
        )


def _spans(segments: Segments) -> Iterator[tuple[Tier, slice, tuple[Arrays, ...]]]:
    """Which rows of the batch a segment holds."""
    first = 0
    for tier, segment in segments.items():
        rows = slice(first, first + segment[0][0].shape[0])
        yield tier, rows, segment
        first = rows.stop


def _of_rows(rows: slice, *arrays: Any) -> Any:
    return jax.tree.map(lambda array: array[rows], arrays)
