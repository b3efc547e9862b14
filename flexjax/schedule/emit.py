"""Emitters: functions that turn a workload into a stream of ops.

Only an emitter decides order. `serial` does one thing after the other and is what the
others are tested against. `row_by_row` and `zigzag` look ahead: while a cell computes,
the inputs of the next one and the weights of the next layer are on their way. They
differ only in the order of their cells.

Where batches begin with a prefix, its keys and values are computed when the first of
them is first at a layer, stored if one comes there again, and loaded then, once for all
that follow one another. Its hidden state stays on the device.

An emitter may be told who is still `alive`: it asks once a step for each batch, as late
as it can, and leaves out the batches that have ended.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from flexjax.policy import Schedule
from flexjax.schedule.ops import (
    Cache,
    Cell,
    Compute,
    Free,
    Hidden,
    Load,
    Op,
    Store,
    Weights,
)
from flexjax.workload import Workload

# (step, batch) -> whether the batch sees that step: a row of it still wants a token,
# and the block is not over
Alive = Callable[[int, int], bool]


def always(step: int, batch: int) -> bool:
    """Nobody ends early."""
    del step, batch
    return True


def serial(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """Load, compute, store, one after the other: slow, and plainly right."""
    prefixes = _Prefixes(work)
    for step in range(work.gen_len):
        batches = [batch for batch in range(work.num_batches) if alive(step, batch)]
        for layer in range(work.num_layers if batches else 0):
            yield from _load_weights(step, layer, range(work.num_parts))
            cells = [Cell(step, layer, batch) for batch in batches]
            for before, cell, after in zip(
                [None, *cells], cells, [*cells[1:], None], strict=False
            ):
                batch = cell.batch
                yield from prefixes.load(cell, before)
                yield from prefixes.compute(cell, before)
                yield from _load_cache(work, cell)
                yield Load(Hidden(batch), step)
                yield Compute(*cell)
                yield from _store_cache(work, cell)
                yield from _store_hidden(work, cell)
                yield from _free_cache(work, cell)
                yield Free(Hidden(batch))
                yield from prefixes.free(cell, after)
            yield from _free_weights(layer, range(work.num_parts))


def zigzag(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """FlexGen's block schedule: a layer's weights serve every batch before they go."""

    def turns() -> Iterator[_Turn]:
        for step in range(work.gen_len):
            batches = []
            for batch in range(work.num_batches):
                if alive(step, batch):
                    batches.append(batch)
                    yield _Turn(Cell(step, 0, batch), batch + 1, work.num_batches)
            for layer in range(1, work.num_layers):
                for turn, batch in enumerate(batches, 1):
                    yield _Turn(Cell(step, layer, batch), turn, len(batches))

    return _pipeline(work, turns(), num_visits=work.gen_len * work.num_layers)


def row_by_row(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """What other offloaders do: one batch to its end, then the next."""

    def turns() -> Iterator[_Turn]:
        for batch in range(work.num_batches):
            for step in range(work.gen_len):
                if not alive(step, batch):
                    break
                for layer in range(work.num_layers):
                    yield _Turn(Cell(step, layer, batch), 1, 1)

    num_visits = work.num_batches * work.gen_len * work.num_layers
    return _pipeline(work, turns(), num_visits=num_visits, one_by_one=True)


EMITTERS: dict[Schedule, Callable[[Workload, Alive], Iterator[Op]]] = {
    Schedule.SERIAL: serial,
    Schedule.ROW_BY_ROW: row_by_row,
    Schedule.ZIGZAG: zigzag,
}


def hidden_stays(schedule: Schedule, work: Workload) -> bool:
    """Whether a hidden state stays on the device until its step ends."""
    return schedule is Schedule.ROW_BY_ROW or (
        schedule is Schedule.ZIGZAG and work.num_batches == 1
    )


class _Turn(NamedTuple):
    """A cell: the `turn`-th of those that share a layer's weights, from 1 on."""

    cell: Cell
    turn: int
    num_turns: int


def _pipeline(
    work: Workload,
    turns: Iterator[_Turn],
    *,
    num_visits: int,
    one_by_one: bool = False,
) -> Iterator[Op]:
    """Runs `turns` with the next cell's inputs and the next layers' weights under way.

    Layers are visited one after the other and round again, whoever ends early; so
    weights are loaded as many visits before their own as `Workload.last_ahead` says, in
    the hope that some batch lives to see it. What nobody came for is freed at the end.

    Every `Free` comes one cell late, so that it waits for work that was dispatched
    before the work in progress. A hidden state that the very next cell goes on with
    stays where it is; so even where a batch is alone, the device has its next layer
    before it is through with one. Only at the end of such a step it is freed at once,
    after everything else that the next cell needs was asked for. At most
    `layers_ahead + 1` layers' weights, or as much of smaller ones, two caches and two
    hidden states are on the device; of prefixes two caches, and the states of all. With
    `one_by_one` a batch has had all its steps before the next one comes.
    """
    turn = next(turns, None)
    if turn is None:
        return
    weights = _WeightsAhead(work, num_visits)
    prefixes = _Prefixes(work, one_by_one=one_by_one)
    cell = turn.cell
    yield from weights.load_ahead(0)
    yield from prefixes.load(cell, None)
    yield Load(Hidden(cell.batch), cell.step)
    before: Cell | None = None
    visit = 0  # of the cell's layer
    while turn is not None:
        cell = turn.cell
        yield from prefixes.compute(cell, before)
        yield Compute(*cell)
        yield from _store_cache(work, cell)
        if before is not None:
            yield from _free_cache(work, before)
            yield from prefixes.free(before, cell)
            if before.layer != cell.layer:
                yield from weights.free_first()
        yield from weights.load_ahead(visit, turn.turn, turn.num_turns)
        turn = next(turns, None)
        after = None if turn is None else turn.cell
        if after is not None:
            yield from _load_cache(work, after)
            yield from prefixes.load(after, cell)
            if after.layer != cell.layer:
                visit += 1
                yield from weights.load_ahead(visit)
        if before is not None and before.batch != cell.batch:
            yield Free(Hidden(before.batch))
        if after is None or after[::2] != cell[::2]:  # of another step or batch
            yield from _store_hidden(work, cell)
            if after is None or after.batch == cell.batch:
                yield Free(Hidden(cell.batch))
            if after is not None:
                yield Load(Hidden(after.batch), after.step)
        before = cell
    yield from _free_cache(work, cell)
    yield from prefixes.free(cell, None)
    yield from weights.free_all()


class _WeightsAhead:
    """The weights of all visits, part by part: loaded and freed in that order."""

    def __init__(self, work: Workload, num_visits: int) -> None:
        self._work = work
        self._num_parts = num_visits * work.num_parts
        self._freed = self._loaded = 0

    def load_ahead(self, visit: int, turn: int = 0, num_turns: int = 1) -> Iterator[Op]:
        """Loads what may be on its way during a visit and is not loaded yet.

        What there was no room for during the visit before is spread over the turns.
        """
        first, end = (
            (self._work.last_ahead(each) + 1) * self._work.num_parts
            for each in (visit - 1, visit)
        )
        due = -(-(end - first) * turn // num_turns)
        wanted = min(self._num_parts, first + due)
        for index in range(self._loaded, wanted):
            weights, step = self._at(index)
            yield Load(weights, step)
        self._loaded = max(self._loaded, wanted)

    def free_first(self) -> Iterator[Op]:
        """Frees the weights of the first visit that still has them."""
        return self._free_until(self._freed + self._work.num_parts)

    def free_all(self) -> Iterator[Op]:
        return self._free_until(self._loaded)

    def _free_until(self, end: int) -> Iterator[Op]:
        for index in range(self._freed, end):
            yield Free(self._at(index)[0])
        self._freed = end

    def _at(self, index: int) -> tuple[Weights, int]:
        visit, part = divmod(index, self._work.num_parts)
        step, layer = divmod(visit, self._work.num_layers)
        return Weights(layer, part), step % self._work.gen_len


class _Prefixes:
    """The keys and values that batches share, a layer at a time."""

    def __init__(self, work: Workload, *, one_by_one: bool = False) -> None:
        self._work, self._num_layers = work, work.num_prefix_layers
        self._one_by_one = one_by_one
        self._made_for: dict[int, int] = {}  # the batch in whose turn one is computed

    def load(self, cell: Cell, before: Cell | None) -> Iterator[Op]:
        """Loads what a cell needs, and the one before it did not."""
        prefix = self._work.prefix_of(cell.batch)
        if prefix is None or self._are_alike(cell, before):
            return
        if self._is_made_in(cell):
            if cell.layer == 0:
                yield Load(Hidden(prefix), cell.step)
        elif self._work.is_decoder(cell.layer):
            yield Load(Cache(cell.layer, prefix), cell.step)

    def compute(self, cell: Cell, before: Cell | None) -> Iterator[Op]:
        """Makes it in the prefill of the first batch that needs it."""
        prefix = self._work.prefix_of(cell.batch)
        if prefix is None or self._are_alike(cell, before):
            return
        if self._is_made_in(cell):
            yield Compute(0, cell.layer, prefix)
            if self._work.is_decoder(cell.layer) and self._comes_again(prefix):
                yield Store(Cache(cell.layer, prefix), 0)

    def free(self, cell: Cell, after: Cell | None) -> Iterator[Op]:
        """Frees what a cell needed, and the one after it does not."""
        prefix = self._work.prefix_of(cell.batch)
        if prefix is None or self._are_alike(cell, after):
            return
        if self._work.is_decoder(cell.layer):
            yield Free(Cache(cell.layer, prefix))
        if self._is_made_in(cell) and cell.layer == self._num_layers - 1:
            yield Free(Hidden(prefix))

    def _is_made_in(self, cell: Cell) -> bool:
        """Whether a cell is of the round in which its prefix is computed."""
        prefix = self._work.prefix_of(cell.batch)
        if cell.step > 0 or cell.layer >= self._num_layers or prefix is None:
            return False
        first = self._made_for.setdefault(prefix, cell.batch)
        return not self._one_by_one or cell.batch == first

    def _comes_again(self, prefix: int) -> bool:
        """Whether a batch comes to a layer after the round that computes its prefix."""
        ends = (0, *self._work.prefix_ends)
        is_shared = ends[~prefix + 1] - ends[~prefix] > 1
        return self._work.gen_len > 1 or (self._one_by_one and is_shared)

    def _are_alike(self, cell: Cell, other: Cell | None) -> bool:
        """Whether the same keys and values, or states, serve both of two neighbours."""
        if other is None or cell[:2] != other[:2]:
            return False
        prefix_of = self._work.prefix_of
        return prefix_of(cell.batch) == prefix_of(other.batch)


def _load_weights(step: int, layer: int, parts: range) -> Iterator[Op]:
    for part in parts:
        yield Load(Weights(layer, part), step)


def _free_weights(layer: int, parts: range) -> Iterator[Op]:
    for part in parts:
        yield Free(Weights(layer, part))


def _load_cache(work: Workload, cell: Cell) -> Iterator[Op]:
    if cell.step > 0 and work.is_decoder(cell.layer):
        yield Load(Cache(cell.layer, cell.batch), cell.step)


def _free_cache(work: Workload, cell: Cell) -> Iterator[Op]:
    if work.is_decoder(cell.layer):
        yield Free(Cache(cell.layer, cell.batch))


def _store_cache(work: Workload, cell: Cell) -> Iterator[Op]:
    if work.is_decoder(cell.layer) and work.keeps_cache(cell.step):
        yield Store(Cache(cell.layer, cell.batch), cell.step)


def _store_hidden(work: Workload, cell: Cell) -> Iterator[Op]:
    if work.is_decoder(cell.layer):
        yield Store(Hidden(cell.batch), cell.step)
