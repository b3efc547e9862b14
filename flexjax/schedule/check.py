"""Proves a schedule without running it."""

from collections.abc import Iterable

from flexjax.schedule.ops import (
    Buffer,
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


def check(ops: Iterable[Op], work: Workload) -> None:
    """Follows every buffer through `ops`.

    Holds that nothing is used before it is on the device or after it went, that no load
    overtakes the store it depends on, that nothing computed is dropped while someone
    still needs it, and that at the end nothing is left behind. Batches may end at any
    step.

    Raises:
        ValueError: the first op that breaks a rule, and the rule.
    """
    state = _State(work)
    for op in ops:
        match op:
            case Load(buffer, step):
                state.load(op, buffer, step)
            case Compute(step, layer, batch):
                state.compute(op, Cell(step, layer, batch))
            case Store(buffer, step):
                state.store(op, buffer, step)
            case Free(buffer):
                state.free(op, buffer)
    if state.on_device:
        raise ValueError(f"never freed: {sorted(map(str, state.on_device))}")


class _State:
    """What a run would hold after the ops so far."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.on_device: set[Buffer] = set()
        self._unsaved: set[Buffer] = set()  # computed, and needed later, but not stored
        self._cached_step: dict[Cache, int] = {}  # last step whose cache was stored
        self._done: dict[int, Cell] = {}  # last cell of each batch
        self._home: dict[Hidden, Cell] = {}  # the cell whose hidden state is at home
        self._staged: dict[Hidden, Cell] = {}  # the cell whose hidden state is staged

    def load(self, op: Op, buffer: Buffer, step: int) -> None:
        _require(buffer not in self.on_device, op, f"{buffer} is there already")
        match buffer:
            case Cache():
                _require(step > 0, op, "a prefill has no cache to load")
                stored = self._cached_step.get(buffer)
                _require(
                    stored == step - 1, op, f"{buffer} was stored at step {stored}"
                )
            case Hidden(batch):
                home, done = self._home.get(buffer), self._done.get(batch)
                starts = done is None or done.layer == self._work.num_layers - 1
                _require(
                    starts or (home is not None and home.step == step),
                    op,
                    f"{buffer} was never stored at step {step}",
                )
                if not starts and home is not None:
                    self._staged[buffer] = home
            case Weights():
                pass
        self.on_device.add(buffer)

    def compute(self, op: Op, cell: Cell) -> None:
        work, hidden = self._work, Hidden(cell.batch)
        for part in range(work.num_parts):
            self._on_device(op, Weights(cell.layer, part))
        self._on_device(op, hidden)
        done = self._done.get(cell.batch)
        if cell.layer > 0:
            before = Cell(cell.step, cell.layer - 1, cell.batch)
            _require(done == before, op, f"the batch has just done {done}")
            made = before.layer if work.is_decoder(before.layer) else None
            held = self._staged.get(hidden)
            _require(
                made is None or held == before, op, f"{hidden} holds what {held} made"
            )
        else:
            last = Cell(cell.step - 1, work.num_layers - 1, cell.batch)
            _require(
                done == (last if cell.step else None), op, f"the batch has done {done}"
            )
        self._done[cell.batch] = cell
        if work.is_decoder(cell.layer):
            cache = Cache(cell.layer, cell.batch)
            if cell.step > 0:
                self._on_device(op, cache)
            self.on_device.add(cache)
            if work.keeps_cache(cell.step):
                self._unsaved.add(cache)
            self._unsaved.add(hidden)
            self._staged[hidden] = cell

    def store(self, op: Op, buffer: Cache | Hidden, step: int) -> None:
        self._on_device(op, buffer)
        done = self._done.get(buffer.batch)
        fresh = done is not None and done.step == step and buffer in self._unsaved
        _require(fresh, op, f"step {step} has made nothing of {buffer}")
        self._unsaved.discard(buffer)
        if isinstance(buffer, Cache):
            self._cached_step[buffer] = step
        elif done is not None:
            self._home[buffer] = done

    def free(self, op: Op, buffer: Buffer) -> None:
        self._on_device(op, buffer)
        _require(buffer not in self._unsaved, op, f"{buffer} was not stored")
        self.on_device.discard(buffer)

    def _on_device(self, op: Op, buffer: Buffer) -> None:
        _require(buffer in self.on_device, op, f"{buffer} is not on the device")


def _require(holds: bool, op: Op, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{op}: {otherwise}")
