"""What one cell of a schedule computes: the steps that make up the call of a layer."""

import dataclasses
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.attention import Branches, SharedPrefix
from flexjax.attention_apart import Attended, AttentionApart, Projected, Segments
from flexjax.memory.placed import Arrays
from flexjax.models.config import OPTConfig
from flexjax.models.opt import Params, unflatten
from flexjax.quant import Quantization
from flexjax.schedule.ops import Cache, Cell, Hidden, is_prefix
from flexjax.sparse import SparsePast
from flexjax.steps import (
    decode_step,
    embed_step,
    final_step,
    finish_step,
    prefill_step,
)
from flexjax.value_sums import ValueSums
from flexjax.workload import Workload

Tensors = dict[str, jax.Array]  # the weights of a layer and of what comes with it


class Rows(Protocol):
    """The rows of a block, as the stage sees them; a prefix is a batch of one."""

    last_only: bool  # whether the head reads the last slot alone

    def token_ids(self, step: int, batch: int) -> np.ndarray:
        """Int32 `[batch, seq]`: what the batch feeds in at `step`."""
        ...

    def start(self, batch: int) -> jax.Array:
        """Int32 `[batch]`: the first slot of each row that holds a real token."""
        ...

    def origin(self, batch: int) -> jax.Array:
        """Int32 `[batch]`: the slot of each row that has position 0.

        It is before the first slot where rows stand behind a prefix.
        """
        ...

    def branches(self, batch: int) -> Branches | None:
        """Of the batch's rows, if some hold several sequences."""
        ...

    def read_head(
        self, cell: Cell, block: int, table: jax.Array, hidden: jax.Array
    ) -> Any:
        """Dispatches one block of the vocabulary.

        Returns:
            A tree of arrays to wait for, which no later call donates.
        """
        ...


@dataclasses.dataclass
class Made:
    """What a compute call made; everything in it may still be on its way."""

    dispatched_s: float  # when, by `time.perf_counter`
    done: Any  # what to wait for: arrays that no later call donates
    hidden: jax.Array | None = None  # [batch, 1, seq, hidden]
    cache: Arrays = ()  # key and value, [batch, heads, seq, head_dim]

    def let_go(self, buffer: Cache | Hidden) -> None:
        """Drops the arrays of `buffer`, once the call has ended and they are stored."""
        self.done = ()
        if isinstance(buffer, Cache):
            self.cache = ()
        else:
            self.hidden = None


class LayerCalls:
    """Dispatches the calls of one block; all but `attend` return before they are done.

    Args of the constructor:
        work: the block's shape.
        rows: its token ids, and what reads its logits.
        config: of the model.
        cache_as: how the cache is quantized.
        sparsity: fraction of its past that a new token attends to.
        sums: of the caches' values, where that is less than all.
        apart: attends where the step of a layer cannot.
    """

    def __init__(
        self,
        work: Workload,
        rows: Rows,
        config: OPTConfig,
        *,
        cache_as: Quantization | None,
        sparsity: float = 1.0,
        sums: ValueSums | None = None,
        apart: AttentionApart | None = None,
    ) -> None:
        self._work, self._rows, self._config = work, rows, config
        self._cache_as, self._sparsity = cache_as, sparsity
        self._sums, self._apart = sums, apart
        self._no_padding = np.zeros(work.batch_size, np.int32)
        self._step, self._lengths = -1, dict[int, jax.Array]()

    @property
    def attends_apart(self) -> bool:
        """Whether a decode call is `project`, `attend` and `finish`, not `layer`."""
        return self._apart is not None

    def head(self, cell: Cell, tensors: Tensors, state: jax.Array) -> Made:
        """A block of the vocabulary."""
        dispatched_s = time.perf_counter()
        block = cell.layer - self._work.num_decoder_layers
        table = tensors[self._config.head_table]
        return Made(dispatched_s, self._rows.read_head(cell, block, table, state))

    def layer(
        self,
        cell: Cell,
        tensors: Tensors,
        state: jax.Array,
        segments: tuple[tuple[Arrays, ...], ...],
        shared: Arrays,
    ) -> Made:
        """A whole decoder layer on the hidden state of a batch.

        Args:
            cell: the call.
            tensors: of the layer.
            state: the batch's.
            segments: of its cache, but for a prefill.
            shared: key and value of the prefix before its rows; empty if there is none.
        """
        dispatched_s = time.perf_counter()
        params, layer = _cut(tensors, cell)
        state = self._enter(cell, params, state)
        config, start = self._config, self._rows.start(cell.batch)
        prefix, number = None, self._work.prefix_of(cell.batch)
        if number is not None:
            key, value = shared
            prefix = SharedPrefix(key, value, self._rows.start(number))
        if cell.step == 0:
            state, cache = prefill_step(
                layer,
                state,
                start,
                prefix,
                self._rows.branches(cell.batch),
                config=config,
                cache_as=self._cache_as,
                is_prefix=is_prefix(cell.batch),
            )
            self._add_values(cell, cache, start)
        else:
            state, cache = decode_step(
                layer,
                state,
                segments,
                start,
                self._length_of(cell),
                self._sparse(cell) if prefix is None else prefix,
                config=config,
                cache_as=self._cache_as,
            )
            self._add_values(cell, cache, self._no_padding)
        # To wait for `state` would not do: the next layer's call donates it.
        return self._leave(cell, params, Made(dispatched_s, cache, state, cache))

    def project(
        self, cell: Cell, tensors: Tensors, state: jax.Array, segments: Segments
    ) -> Projected:
        """A decoder layer up to its attention, and attention on the device."""
        assert self._apart is not None
        params, layer = _cut(tensors, cell)
        state = self._enter(cell, params, state)
        start, length = self._rows.start(cell.batch), self._past_len(cell)
        sparse = self._sparse(cell)
        made = self._apart.project(layer, state, segments, start, length, sparse)
        self._add_values(cell, made.cache, self._no_padding)
        return made

    def attend(self, cell: Cell, made: Projected, segments: Segments) -> Attended:
        """A decoder layer's attention that is apart; waits for it."""
        assert self._apart is not None
        return self._apart.attend(Cache(cell.layer, cell.batch), made, segments)

    def finish(
        self, cell: Cell, tensors: Tensors, made: Projected, found: Attended
    ) -> Made:
        """A decoder layer from its attention on."""
        dispatched_s = time.perf_counter()
        params, layer = _cut(tensors, cell)
        state, done = finish_step(layer, made.hidden, found.outs, config=self._config)
        return self._leave(cell, params, Made(dispatched_s, done, state, made.cache))

    def _sparse(self, cell: Cell) -> SparsePast | None:
        if self._sums is None:
            return None
        return SparsePast(self._sums[Cache(cell.layer, cell.batch)], self._sparsity)

    def _add_values(self, cell: Cell, cache: Arrays, start: Any) -> None:
        if self._sums is not None and self._work.keeps_cache(cell.step):
            _, values = cache
            self._sums.add(Cache(cell.layer, cell.batch), values, start)

    def _past_len(self, cell: Cell) -> np.int32:
        return np.int32(self._work.past_len(cell.step, cell.batch))

    def _length_of(self, cell: Cell) -> jax.Array:
        """`_past_len` on the device, to which it comes once a step."""
        if cell.step != self._step:
            self._step, self._lengths = cell.step, {}
        length = self._past_len(cell)
        if length not in self._lengths:
            self._lengths[int(length)] = jnp.asarray(length)
        return self._lengths[int(length)]

    def _enter(self, cell: Cell, params: Params, state: jax.Array) -> jax.Array:
        """What the decoder layer of `cell` is given: the embedding is the first's."""
        if cell.layer > 0:
            return state
        origin, length = self._rows.origin(cell.batch), self._past_len(cell)
        branches = self._rows.branches(cell.batch) if cell.step == 0 else None
        return embed_step(params, state, origin, length, branches, config=self._config)

    def _leave(self, cell: Cell, params: Params, made: Made) -> Made:
        """What the decoder layer of `cell` gives: the final norm is the last one's."""
        is_last = cell.layer == self._work.num_decoder_layers - 1
        if is_last and (self._work.scores_prefixes or not is_prefix(cell.batch)):
            last_only = self._rows.last_only
            made.hidden = made.done = final_step(
                params, made.hidden, config=self._config, last_only=last_only
            )
        return made


def _cut(tensors: dict[str, jax.Array], cell: Cell) -> tuple[Params, Params]:
    """What comes with a decoder layer's weights, and these."""
    params = unflatten(tensors)
    return params, params.pop("layers")[str(cell.layer)]
