"""The loop over a schedule's ops. It knows no tensors; a stage does."""

from collections.abc import Iterable
from typing import Protocol

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
)


class Stage(Protocol):
    """What ops act upon. Only `free` waits; everything else returns at once."""

    def load(self, buffer: Buffer, step: int) -> None: ...
    def compute(self, cell: Cell) -> None: ...
    def store(self, buffer: Cache | Hidden, step: int) -> None: ...
    def free(self, buffer: Buffer) -> None: ...
    def abandon(self) -> None:
        """Waits for what was started and gives back what it holds, after a failure."""
        ...


def execute(ops: Iterable[Op], stage: Stage) -> None:
    """Issues `ops` in order.

    Raises:
        Exception: whatever an op raised, at the latest at the `Free` that waits for it;
            the stage is empty then.
    """
    try:
        for op in ops:
            match op:
                case Load(buffer, step):
                    stage.load(buffer, step)
                case Compute(step, layer, batch):
                    stage.compute(Cell(step, layer, batch))
                case Store(buffer, step):
                    stage.store(buffer, step)
                case Free(buffer):
                    stage.free(buffer)
    except BaseException:
        stage.abandon()
        raise
