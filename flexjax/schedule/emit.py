"""Emitters: functions that turn a workload into a stream of ops.

Only an emitter decides order. `serial` does one thing after the other and is what the
others are tested against. `row_by_row` and `zigzag` look ahead: while a cell computes,
the inputs of the next one and the weights of the next layer are on their way. They
differ only in the order of their cells.

An emitter may be told who is still `alive`: it asks once a step for each batch, as late
as it can, and leaves out the batches that have ended.
"""

from collections.abc import Callable, Iterator

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

# (step, batch) -> whether some row of the batch still wants a token at that step
Alive = Callable[[int, int], bool]


def always(step: int, batch: int) -> bool:
    """Nobody ends early."""
    del step, batch
    return True


def serial(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """Load, compute, store, one after the other: slow, and plainly right."""
    for step in range(work.gen_len):
        batches = [batch for batch in range(work.num_batches) if alive(step, batch)]
        for layer in range(work.num_layers if batches else 0):
            yield from _load_weights(step, layer, range(work.num_parts))
            for batch in batches:
                cell = Cell(step, layer, batch)
                yield from _load_cache(work, cell)
                yield Load(Hidden(batch), step)
                yield Compute(*cell)
                yield from _stores(work, cell)
                yield from _free_cache(work, cell)
                yield Free(Hidden(batch))
            yield from _free_weights(layer, range(work.num_parts))


def zigzag(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """FlexGen's block schedule: a layer's weights serve every batch before they go."""

    def cells() -> Iterator[Cell]:
        for step in range(work.gen_len):
            batches = []
            for batch in range(work.num_batches):
                if alive(step, batch):
                    batches.append(batch)
                    yield Cell(step, 0, batch)
            for layer in range(1, work.num_layers):
                for batch in batches:
                    yield Cell(step, layer, batch)

    return _pipeline(work, cells(), width=work.num_batches)


def row_by_row(work: Workload, alive: Alive = always) -> Iterator[Op]:
    """What other offloaders do: one batch to its end, then the next."""

    def cells() -> Iterator[Cell]:
        for batch in range(work.num_batches):
            for step in range(work.gen_len):
                if not alive(step, batch):
                    break
                for layer in range(work.num_layers):
                    yield Cell(step, layer, batch)

    return _pipeline(work, cells(), width=1)


EMITTERS: dict[Schedule, Callable[[Workload, Alive], Iterator[Op]]] = {
    Schedule.SERIAL: serial,
    Schedule.ROW_BY_ROW: row_by_row,
    Schedule.ZIGZAG: zigzag,
}


def _pipeline(work: Workload, cells: Iterator[Cell], width: int) -> Iterator[Op]:
    """Runs `cells` with the next cell's inputs and the next layer's weights under way.

    Every `Free` comes one cell late, so that it waits for work that was dispatched
    before the work in progress; only a hidden state that the very next cell needs again
    is freed at once. At most two layers' weights, two caches and two hidden states are
    on the device.

    Args:
        work: what is run.
        cells: in the order in which they compute.
        width: cells in a row that share a layer's weights.
    """
    cell = next(cells, None)
    if cell is None:
        return
    parts = range(work.num_parts)
    yield from _load_weights(cell.step, cell.layer, parts)
    yield from _load_cache(work, cell)
    yield Load(Hidden(cell.batch), cell.step)
    before: Cell | None = None
    ahead: _Ahead | None = None
    while cell is not None:
        yield Compute(*cell)
        yield from _stores(work, cell)
        if before is not None:
            yield from _free_cache(work, before)
        if before is None or before.layer != cell.layer:
            if before is not None:
                yield from _free_weights(before.layer, parts)
            ahead = _Ahead(work, cell, width)
        assert ahead is not None
        yield from ahead.load(up_to=cell.batch % width)
        after = next(cells, None)
        if after is not None:
            yield from _load_cache(work, after)
        if before is not None and before.batch != cell.batch:
            yield Free(Hidden(before.batch))
        if after is None or after.batch == cell.batch:
            yield Free(Hidden(cell.batch))
        if after is not None:
            yield Load(Hidden(after.batch), after.step)
            if after.layer != cell.layer:
                yield from ahead.load(up_to=width - 1)
        before, cell = cell, after
    assert before is not None and ahead is not None
    yield from _free_cache(work, before)
    yield from _free_weights(before.layer, parts)
    yield from ahead.free()


class _Ahead:
    """The weights of the layer after a cell's, loaded part by part.

    Which step the layer will serve is a guess, since a batch may end before it; a guess
    that nobody comes for is freed at the end.
    """

    def __init__(self, work: Workload, cell: Cell, width: int) -> None:
        self._width, self._loaded = width, 0
        self._layer = (cell.layer + 1) % work.num_layers
        self._step = cell.step + (self._layer == 0)
        last_batch = width > 1 or cell.batch == work.num_batches - 1
        nothing_follows = self._step == work.gen_len and last_batch
        self._num_parts = 0 if nothing_follows else work.num_parts
        if self._step == work.gen_len:
            self._step = 0  # the next batch's prefill

    def load(self, *, up_to: int) -> Iterator[Op]:
        """The parts that are due when `up_to + 1` of `width` cells have been issued."""
        due = -(-self._num_parts * (up_to + 1) // self._width)
        yield from _load_weights(self._step, self._layer, range(self._loaded, due))
        self._loaded = max(self._loaded, due)

    def free(self) -> Iterator[Op]:
        return _free_weights(self._layer, range(self._loaded))


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


def _stores(work: Workload, cell: Cell) -> Iterator[Op]:
    if work.is_decoder(cell.layer):
        if work.keeps_cache(cell.step):
            yield Store(Cache(cell.layer, cell.batch), cell.step)
        yield Store(Hidden(cell.batch), cell.step)
