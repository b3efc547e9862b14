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
    is_prefix,
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
    state.finish()


class _State:
    """What a run would hold after the ops so far."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self.on_device: set[Buffer] = set()
        self._unsaved: set[Buffer] = set()  # computed, and needed later, but not stored
        self._cached_step: dict[Cache, int] = {}  # last step whose cache was stored
        self._done: dict[int, Cell] = {}  # last cell of each batch
        self._home: dict[Hidden, Cell] = {}  # the cell whose hidden state is at home
        self._staged: dict[
            Hidden, Cell | None
        ] = {}  # that whose hidden state is staged
        self._loaded_step: dict[Cache, int] = {}  # last step that a cache came for
        self._fresh_prefix: set[Buffer] = set()  # computed, and not stored

    def load(self, op: Op, buffer: Buffer, step: int) -> None:
        _require(buffer not in self.on_device, op, f"{buffer} is there already")
        match buffer:
            case Cache(_, batch) if is_prefix(batch):
                is_stored = self._cached_step.get(buffer) is not None
                _require(is_stored, op, f"{buffer} was never stored")
            case Cache():
                _require(step > 0, op, "a prefill has no cache to load")
                stored = self._cached_step.get(buffer)
                _require(
                    stored == step - 1, op, f"{buffer} was stored at step {stored}"
                )
                self._loaded_step[buffer] = step
            case Hidden(batch) if self._is_between_steps(batch):
                self._staged[buffer] = _token_rows(step, batch)
            case Hidden():
                home = self._home.get(buffer)
                _require(
                    home is not None and home.step == step,
                    op,
                    f"{buffer} was never stored at step {step}",
                )
                self._staged[buffer] = home
            case Weights():
                pass
        self.on_device.add(buffer)

    def compute(self, op: Op, cell: Cell) -> None:
        work, hidden = self._work, Hidden(cell.batch)
        for part in range(work.num_parts):
            self._on_device(op, Weights(cell.layer, part))
        self._on_device(op, hidden)
        done, held = self._done.get(cell.batch), self._staged.get(hidden)
        _require(done == self._before(cell), op, f"the batch has just done {done}")
        _require(held == self._input(cell), op, f"{hidden} holds what {held} made")
        self._done[cell.batch] = cell
        cache = Cache(cell.layer, cell.batch)
        if is_prefix(cell.batch):
            if not work.is_decoder(cell.layer):
                return
            self.on_device.add(cache)
            self._fresh_prefix.add(cache)
            self._staged[hidden] = cell
        elif work.is_decoder(cell.layer):
            if (prefix := work.prefix_of(cell.batch)) is not None:
                self._on_device(op, Cache(cell.layer, prefix))
            if cell.step > 0:
                self._on_device(op, cache)
                came = self._loaded_step.get(cache)
                _require(came == cell.step, op, f"{cache} came for step {came}")
            self.on_device.add(cache)
            if work.keeps_cache(cell.step):
                self._unsaved.add(cache)
            self._unsaved.add(hidden)
            self._staged[hidden] = cell
        elif cell.layer == work.num_layers - 1:
            self._unsaved.discard(hidden)  # nobody needs it any more

    def store(self, op: Op, buffer: Cache | Hidden, step: int) -> None:
        self._on_device(op, buffer)
        done = self._done.get(buffer.batch)
        if isinstance(buffer, Cache) and buffer in self._fresh_prefix:
            self._fresh_prefix.discard(buffer)
            self._cached_step[buffer] = step
            return
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

    def finish(self) -> None:
        if self.on_device:
            raise ValueError(f"never freed: {sorted(map(str, self.on_device))}")
        for batch, done in self._done.items():
            if not self._is_between_steps(batch):
                raise ValueError(f"batch {batch} stops inside a step, after {done}")

    def _is_between_steps(self, batch: int) -> bool:
        done = self._done.get(batch)
        work = self._work
        num_layers = work.num_prefix_layers if is_prefix(batch) else work.num_layers
        return done is None or done.layer == num_layers - 1

    def _before(self, cell: Cell) -> Cell | None:
        """What the batch of `cell` does before it."""
        if cell.layer > 0:
            return cell._replace(layer=cell.layer - 1)
        if cell.step > 0:
            return Cell(cell.step - 1, self._work.num_layers - 1, cell.batch)
        return None

    def _input(self, cell: Cell) -> Cell:
        """What makes the hidden state that `cell` is given."""
        if cell.layer == 0:
            return _token_rows(cell.step, cell.batch)
        return cell._replace(layer=min(cell.layer, self._work.num_decoder_layers) - 1)

    def _on_device(self, op: Op, buffer: Buffer) -> None:
        _require(buffer in self.on_device, op, f"{buffer} is not on the device")


def _token_rows(step: int, batch: int) -> Cell:
    """What stands for the embedding, which is no layer of its own."""
    return Cell(step, -1, batch)


def _require(holds: bool, op: Op, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{op}: {otherwise}")
