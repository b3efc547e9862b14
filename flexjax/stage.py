"""The stage of one run: ops become transfers between tiers and calls of steps."""

import dataclasses
import time
from concurrent.futures import Future
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from flexjax.memory.lanes import Lane
from flexjax.memory.placed import Arrays, PlacedArrays, PlacedLoan
from flexjax.memory.transport import Transport
from flexjax.memory.weights import Loans, PlacedWeights
from flexjax.models.opt import unflatten
from flexjax.policy import Kind, Tier
from flexjax.quant import Quantization
from flexjax.schedule.ops import Buffer, Cache, Cell, Hidden, Weights
from flexjax.steps import decode_step, embed_step, final_step, prefill_step
from flexjax.workload import Workload


class Rows(Protocol):
    """The rows of a block, as the stage sees them."""

    last_only: bool  # whether the head reads the last slot alone

    def token_ids(self, step: int, batch: int) -> np.ndarray:
        """Int32 `[batch, seq]`: what the batch feeds in at `step`."""
        ...

    def start(self, batch: int) -> jax.Array:
        """Int32 `[batch]`: the first slot of each row that holds a real token."""
        ...

    def read_head(
        self, cell: Cell, block: int, table: jax.Array, hidden: jax.Array
    ) -> Any:
        """Dispatches one block of the vocabulary; a tree of arrays to wait for."""
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


@dataclasses.dataclass
class _Slot:
    """A cache or a hidden state on the device: how it came, and what became of it."""

    loaded: Future[PlacedLoan] | None
    made: Future[Made] | None = None  # once dispatched
    ended: Future[Made] | None = None
    stored: Future[int] | None = None


class LayerStage:
    """Runs the layers of one block of batches.

    Args of the constructor:
        work: the block's shape.
        rows: its token ids, and what reads its logits.
        weights, cache, hidden: where everything is.
        transport: where everything happens.
        cache_as: how the cache is quantized.
    """

    def __init__(
        self,
        work: Workload,
        rows: Rows,
        *,
        weights: PlacedWeights,
        cache: PlacedArrays,
        hidden: PlacedArrays,
        transport: Transport,
        cache_as: Quantization | None = None,
    ) -> None:
        self._work, self._rows = work, rows
        self._weights, self._cache, self._hidden = weights, cache, hidden
        self._lanes, self._ledger = transport.lanes, transport.ledger
        self._timeline = transport.timeline
        self._config, self._cache_as = weights.config, cache_as
        self._parts: dict[Weights, Future[Loans]] = {}
        self._slots: dict[Cache | Hidden, _Slot] = {}
        # Calls that end:
        self._last_use: dict[int, Future[Made]] = {}  # the last of a layer
        self._heads: dict[int, Future[Made]] = {}  # the last head call of a batch
        self._device_free_s = 0.0  # when the last call ended, by `time.perf_counter`
        self._begun: dict[int, int] = {}  # the step that a batch is at

    def outcome(self, batch: int) -> Any:
        """Waits for the last head call of a batch; what `read_head` returned."""
        return self._heads[batch].result().done

    def load(self, buffer: Buffer, step: int) -> None:
        match buffer:
            case Weights(layer, part):
                self._parts[buffer] = self._weights.load(layer, part)
            case Cache():
                self._slots[buffer] = _Slot(loaded=self._cache.load(buffer))
            case Hidden(batch) if self._begun.get(batch) != step:
                self._begun[batch] = step
                self._slots[buffer] = _Slot(
                    loaded=self._lanes.submit(
                        Lane.HIDDEN, self._load_token_rows, step, batch
                    )
                )
            case Hidden():
                self._slots[buffer] = _Slot(loaded=self._hidden.load(buffer))

    def compute(self, cell: Cell) -> None:
        hidden = self._slots[Hidden(cell.batch)]
        cache = self._slots.get(Cache(cell.layer, cell.batch))
        task = self._lanes.submit(
            Lane.DISPATCH,
            self._dispatch,
            cell,
            [
                self._parts[Weights(cell.layer, part)]
                for part in range(self._work.num_parts)
            ],
            hidden.loaded,
            cache and cache.loaded,
        )
        ended = self._lanes.submit(Lane.COMPUTE, self._follow, cell, task)
        self._last_use[cell.layer] = ended
        if self._work.is_decoder(cell.layer):
            self._slots[Hidden(cell.batch)] = _Slot(hidden.loaded, task, ended)
            self._slots[Cache(cell.layer, cell.batch)] = _Slot(
                cache and cache.loaded, task, ended
            )
        else:
            self._heads[cell.batch] = ended

    def store(self, buffer: Cache | Hidden, step: int) -> None:
        slot, work = self._slots[buffer], self._work
        made = slot.made
        assert made is not None
        if isinstance(buffer, Cache):
            slot.stored = self._cache.store(
                buffer,
                lambda: made.result().cache,
                at=work.past_len(step),
                slots=work.cache_slots(step),
            )
        else:
            slot.stored = self._hidden.store(buffer, lambda: _hidden_of(made))

    def free(self, buffer: Buffer) -> None:
        if isinstance(buffer, Weights):
            self._free_weights(buffer)
            return
        slot = self._slots[buffer]
        if slot.ended is not None:
            made = slot.ended.result()
            if slot.stored is not None:
                slot.stored.result()
            self._count(made, buffer, -1)
            made.let_go(buffer)
        else:
            assert isinstance(buffer, Hidden)
            self._heads[buffer.batch].result()
        if slot.loaded is not None:
            slot.loaded.result().release()
        del self._slots[buffer]

    def _free_weights(self, buffer: Weights) -> None:
        loans = self._parts[buffer].result()
        if buffer.layer in self._last_use:
            self._last_use[buffer.layer].result()
            if buffer.part == self._work.num_parts - 1:
                del self._last_use[buffer.layer]
        for loan in loans.values():
            loan.release()
        del self._parts[buffer]

    def abandon(self) -> None:
        self._lanes.drain()
        for parts in self._parts.values():
            if parts.exception() is None:
                for loan in parts.result().values():
                    loan.release()
        for buffer, slot in self._slots.items():
            if slot.made is not None and slot.made.exception() is None:
                self._count(slot.made.result(), buffer, -1)
            if slot.loaded is not None and slot.loaded.exception() is None:
                slot.loaded.result().release()
        self._parts.clear()
        self._slots.clear()

    def _load_token_rows(self, step: int, batch: int) -> PlacedLoan:
        with self._lanes.working(Lane.HIDDEN, f"token rows, batch {batch}"):
            rows = self._weights.token_rows(self._rows.token_ids(step, batch))
        return PlacedLoan([((rows,),)])

    def _dispatch(
        self,
        cell: Cell,
        parts: list[Future[Loans]],
        hidden: Future[PlacedLoan],
        past: Future[PlacedLoan] | None,
    ) -> Made:
        loans = [part.result() for part in parts]
        tensors = {n: loan.array for part in loans for n, loan in part.items()}
        loaded = hidden.result()
        segments = () if past is None else past.result().segments
        with self._lanes.working(Lane.DISPATCH, _name(cell)):
            dispatched_s = time.perf_counter()
            state = _joined(loaded)
            if not self._work.is_decoder(cell.layer):
                block = cell.layer - self._work.num_decoder_layers
                table = tensors[self._config.head_table]
                head = self._rows.read_head(cell, block, table, state)
                return Made(dispatched_s, head)
            done, state, cache = self._decode(cell, tensors, state, segments)
        made = Made(dispatched_s, done, state, cache)
        self._count(made, Cache(cell.layer, cell.batch), 1)
        self._count(made, Hidden(cell.batch), 1)
        return made

    def _decode(
        self,
        cell: Cell,
        tensors: dict[str, jax.Array],
        state: jax.Array,
        segments: tuple[tuple[Arrays, ...], ...],
    ) -> tuple[Any, jax.Array, Arrays]:
        """What to wait for, the hidden state, and the keys and values to store."""
        params = unflatten(tensors)
        layer = params.pop("layers")[str(cell.layer)]
        config, start = self._config, self._rows.start(cell.batch)
        length = np.int32(self._work.past_len(cell.step))
        if cell.layer == 0:
            state = embed_step(params, state, start, length, config=config)
        if cell.step == 0:
            state, cache = prefill_step(
                layer, state, start, config=config, cache_as=self._cache_as
            )
        else:
            state, cache = decode_step(
                layer,
                state,
                segments,
                start,
                length,
                config=config,
                cache_as=self._cache_as,
            )
        if cell.layer < self._work.num_decoder_layers - 1:
            return cache, state, cache  # the next layer's call donates `state`
        last_only = self._rows.last_only
        state = final_step(params, state, config=config, last_only=last_only)
        return state, state, cache

    def _follow(self, cell: Cell, task: Future[Made]) -> Made:
        """Waits until a compute call has ended, and counts how long it took."""
        made = task.result()
        jax.block_until_ready(made.done)
        now = time.perf_counter()
        begun = max(made.dispatched_s, self._device_free_s)
        self._timeline.worked(Lane.COMPUTE, _name(cell), begun, now)
        self._device_free_s = now
        return made

    def _count(self, made: Made, buffer: Buffer, sign: int) -> None:
        """Counts what a compute call made and a `Free` lets go of."""
        if isinstance(buffer, Cache):
            nbytes = sum(array.nbytes for array in made.cache)
            self._ledger.hold(Tier.DEVICE, Kind.KV_CACHE, sign * nbytes)
        elif made.hidden is not None:
            self._ledger.hold(Tier.DEVICE, Kind.ACTIVATIONS, sign * made.hidden.nbytes)


def _name(cell: Cell) -> str:
    return f"step {cell.step}, layer {cell.layer}, batch {cell.batch}"


def _hidden_of(task: Future[Made]) -> Arrays:
    hidden = task.result().hidden
    assert hidden is not None
    return (hidden,)


def _joined(loan: PlacedLoan) -> jax.Array:
    """The rows of all tiers as one batch."""
    arrays = [array for ((array,),) in loan.segments]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
