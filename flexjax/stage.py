"""The stage of one run: ops become transfers between tiers and calls of steps."""

import dataclasses
import time
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp

from flexjax.attention_apart import Attended, Projected
from flexjax.layer_calls import LayerCalls, Made, Rows
from flexjax.memory.lanes import Lane
from flexjax.memory.placed import Arrays, PlacedArrays, PlacedLoan
from flexjax.memory.transport import Transport
from flexjax.memory.weights import Loans, PlacedWeights
from flexjax.policy import Kind, Tier
from flexjax.schedule.ops import Buffer, Cache, Cell, Hidden, Weights, is_prefix
from flexjax.workload import Workload


@dataclasses.dataclass
class _Slot:
    """A cache or a hidden state on the device: how it came, and what became of it."""

    loaded: Future[PlacedLoan] | None
    made: Future[Made] | None = None  # what the last call made of it, once dispatched
    ended: Future[Made] | None = None  # the last call that uses it
    stored: Future[int] | None = None
    attended: Future[Attended] | None = None  # where attention is apart


class LayerStage:
    """Runs the layers of one block of batches.

    Args of the constructor:
        work: the block's shape.
        rows: its token ids, and what reads its logits.
        calls: the steps of its layers.
        weights, cache, hidden: where everything is.
        transport: where everything happens.
    """

    def __init__(
        self,
        work: Workload,
        rows: Rows,
        calls: LayerCalls,
        *,
        weights: PlacedWeights,
        cache: PlacedArrays,
        hidden: PlacedArrays,
        transport: Transport,
    ) -> None:
        self._work, self._rows, self._calls = work, rows, calls
        self._weights, self._cache, self._hidden = weights, cache, hidden
        self._lanes, self._ledger = transport.lanes, transport.ledger
        self._timeline = transport.timeline
        self._parts: dict[Weights, Future[Loans]] = {}
        self._slots: dict[Cache | Hidden, _Slot] = {}
        self._made_bytes: dict[Cache | Hidden, int] = {}  # last made by a call
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
        parts = [
            self._parts[Weights(cell.layer, part)]
            for part in range(self._work.num_parts)
        ]
        hidden = self._slots[Hidden(cell.batch)]
        given = hidden.made or hidden.loaded
        assert given is not None
        key = Cache(cell.layer, cell.batch)
        cache, attended = self._slots.get(key), None
        past = None if cache is None else cache.loaded
        prefix, number = None, self._work.prefix_of(cell.batch)
        if number is not None:
            prefix = self._slots.get(Cache(cell.layer, number))
        if past is not None and self._calls.attends_apart:
            projected = self._lanes.submit(
                Lane.PROJECT, self._project, cell, parts, given, past
            )
            attended = self._lanes.submit(
                Lane.ATTENTION, self._attend, cell, projected, past
            )
            task = self._lanes.submit(
                Lane.DISPATCH, self._finish, cell, parts, projected, attended
            )
        else:
            task = self._lanes.submit(
                Lane.DISPATCH, self._dispatch, cell, parts, given, past, prefix
            )
        ended = self._lanes.submit(Lane.COMPUTE, self._follow, cell, task)
        self._last_use[cell.layer] = ended
        hidden.ended = ended
        if prefix is not None:
            prefix.ended = ended
        if self._work.is_decoder(cell.layer):
            hidden.made = task
            self._slots[key] = _Slot(past, task, ended, attended=attended)
        else:
            self._heads[cell.batch] = ended

    def store(self, buffer: Cache | Hidden, step: int) -> None:
        slot, work, batch = self._slots[buffer], self._work, buffer.batch
        if is_prefix(batch):
            work, batch = work.of_prefix, 0
        made = slot.made
        assert made is not None
        if isinstance(buffer, Cache):
            slot.stored = self._cache.store(
                buffer,
                lambda: made.result().cache,
                at=work.past_len(step, batch),
                slots=work.cache_slots(step, batch),
            )
        else:
            slot.stored = self._hidden.store(buffer, lambda: _hidden_of(made))

    def free(self, buffer: Buffer) -> None:
        if isinstance(buffer, Weights):
            self._free_weights(buffer)
            return
        slot = self._slots[buffer]
        assert slot.ended is not None
        slot.ended.result()
        if slot.stored is not None:
            slot.stored.result()
        if slot.made is not None:
            slot.made.result().let_go(buffer)
            self._count(buffer, 0)
        if slot.attended is not None:
            slot.attended.result().release()
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
        for slot in self._slots.values():
            for lent in (slot.attended, slot.loaded):
                if lent is not None and lent.exception() is None:
                    lent.result().release()
        for buffer in list(self._made_bytes):
            self._count(buffer, 0)
        self._parts.clear()
        self._slots.clear()

    def _load_token_rows(self, step: int, batch: int) -> PlacedLoan:
        with self._lanes.working(Lane.HIDDEN, f"token rows, {_batch_name(batch)}"):
            rows = self._weights.token_rows(self._rows.token_ids(step, batch))
        return PlacedLoan({Tier.DEVICE: ((rows,),)})

    def _dispatch(
        self,
        cell: Cell,
        parts: list[Future[Loans]],
        given: Future[PlacedLoan] | Future[Made],
        past: Future[PlacedLoan] | None,
        prefix: _Slot | None,
    ) -> Made:
        tensors, state = _tensors(parts), _state(given)
        segments = () if past is None else past.result().segments
        shared = () if prefix is None else _prefix_arrays(prefix)
        jax.block_until_ready((tensors, segments))  # so that the call's time is its own
        with self._lanes.working(Lane.DISPATCH, _name(cell)):
            if not self._work.is_decoder(cell.layer):
                return self._calls.head(cell, tensors, state)
            return self._counted(
                cell, self._calls.layer(cell, tensors, state, segments, shared)
            )

    def _project(
        self,
        cell: Cell,
        parts: list[Future[Loans]],
        given: Future[PlacedLoan] | Future[Made],
        past: Future[PlacedLoan],
    ) -> Projected:
        """What of a decode call comes before attention; waits until it is done."""
        tensors, state = _tensors(parts), _state(given)
        loaded = past.result()
        jax.block_until_ready((tensors, loaded.segments))
        with self._lanes.working(Lane.PROJECT, _name(cell)):
            made = self._calls.project(cell, tensors, state, loaded.by_tier)
            jax.block_until_ready((made.query, made.new))
        return made

    def _attend(
        self, cell: Cell, projected: Future[Projected], past: Future[PlacedLoan]
    ) -> Attended:
        made, loaded = projected.result(), past.result()
        with self._lanes.working(Lane.ATTENTION, _name(cell)):
            return self._calls.attend(cell, made, loaded.by_tier)

    def _finish(
        self,
        cell: Cell,
        parts: list[Future[Loans]],
        projected: Future[Projected],
        attended: Future[Attended],
    ) -> Made:
        """What of a decode call comes after attention."""
        made, found = projected.result(), attended.result()
        with self._lanes.working(Lane.DISPATCH, _name(cell)):
            done = self._calls.finish(cell, _tensors(parts), made, found)
            return self._counted(cell, done)

    def _counted(self, cell: Cell, made: Made) -> Made:
        cache = sum(array.nbytes for array in made.cache)
        self._count(Cache(cell.layer, cell.batch), cache)
        assert made.hidden is not None
        self._count(Hidden(cell.batch), made.hidden.nbytes)
        return made

    def _follow(self, cell: Cell, task: Future[Made]) -> Made:
        """Waits until a compute call has ended, and counts how long it took."""
        made = task.result()
        jax.block_until_ready(made.done)
        now = time.perf_counter()
        begun = max(made.dispatched_s, self._device_free_s)
        self._timeline.worked(Lane.COMPUTE, _name(cell), begun, now)
        self._device_free_s = now
        return made

    def _count(self, buffer: Cache | Hidden, nbytes: int) -> None:
        """Counts what a call made of `buffer`, in place of what the one before made."""
        kind = Kind.KV_CACHE if isinstance(buffer, Cache) else Kind.ACTIVATIONS
        added = nbytes - self._made_bytes.pop(buffer, 0)
        if nbytes:
            self._made_bytes[buffer] = nbytes
        self._ledger.hold(Tier.DEVICE, kind, added)


def _name(cell: Cell) -> str:
    return f"step {cell.step}, layer {cell.layer}, {_batch_name(cell.batch)}"


def _batch_name(batch: int) -> str:
    return f"prefix {~batch}" if is_prefix(batch) else f"batch {batch}"


def _hidden_of(task: Future[Made]) -> Arrays:
    hidden = task.result().hidden
    assert hidden is not None
    return (hidden,)


def _prefix_arrays(slot: _Slot) -> Arrays:
    """Key and value of the one row of a prefix, made or loaded."""
    if slot.made is not None:
        return slot.made.result().cache
    assert slot.loaded is not None
    (segment,) = jax.block_until_ready(slot.loaded.result().segments)
    return tuple(array for (array,) in segment)


def _tensors(parts: list[Future[Loans]]) -> dict[str, jax.Array]:
    """The weights of all parts, once they are there."""
    return {n: loan.array for part in parts for n, loan in part.result().items()}


def _state(given: Future[PlacedLoan] | Future[Made]) -> jax.Array:
    """The hidden state of a whole batch, once a call has been asked for it, or it came.

    A call is given what it overwrites: that must not be on its way any more, since
    nobody could tell then when the memory that it came from is free.
    """
    state = given.result()
    if isinstance(state, Made):
        assert state.hidden is not None
        return state.hidden
    arrays = [array for ((array,),) in state.segments]
    jax.block_until_ready(arrays)
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)
