"""How much memory a schedule needs, tier by tier, at its worst moment."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from flexjax.policy import Tier
from flexjax.schedule.ops import Buffer, Cache, Cell, Compute, Free, Hidden, Load, Op
from flexjax.schedule.ops import Store

Bytes = Mapping[Tier, int]


class Footprint(Protocol):
    """Bytes by tier of everything that the ops of a run bring into being."""

    def resident(self) -> Bytes:
        """What is there from the first op to the last: the weights' homes, above all."""
        ...

    def loaded(self, buffer: Buffer, step: int) -> Bytes:
        """What a `Load` adds until its `Free`."""
        ...

    def computed(self, cell: Cell) -> Mapping[Buffer, Bytes]:
        """What a `Compute` makes, by the buffer whose `Free` lets go of it."""
        ...

    def workspace(self, cell: Cell) -> Bytes:
        """What a `Compute` needs while it runs."""
        ...

    def stored(self, buffer: Cache | Hidden, step: int) -> Bytes:
        """What the buffer takes up at home once `step` has stored it."""
        ...


def peak_bytes(ops: Iterable[Op], footprint: Footprint) -> dict[Tier, int]:
    """The largest number of bytes that each tier holds while `ops` run.

    An upper bound for any timing of the transfers: memory is counted from the op that
    asks for it to the `Free` that waits for its last use, and a home that is written
    anew counts twice until then.
    """
    now = Counter(footprint.resident())
    peak = Counter(now)
    on_device: dict[Buffer, Counter[Tier]] = {}
    homes: dict[Buffer, Counter[Tier]] = {}
    replaced: dict[Buffer, Counter[Tier]] = {}
    for op in ops:
        match op:
            case Load(buffer, step):
                on_device[buffer] = Counter(footprint.loaded(buffer, step))
                now.update(on_device[buffer])
            case Compute(step, layer, batch):
                cell = Cell(step, layer, batch)
                for buffer, size in footprint.computed(cell).items():
                    on_device.setdefault(buffer, Counter()).update(size)
                    now.update(size)
                peak |= now + Counter(footprint.workspace(cell))
            case Store(buffer, step):
                replaced[buffer] = homes.get(buffer, Counter())
                homes[buffer] = Counter(footprint.stored(buffer, step))
                now.update(homes[buffer])
            case Free(buffer):
                now.subtract(on_device.pop(buffer))
                now.subtract(replaced.pop(buffer, Counter()))
        peak |= now
    return {tier: peak[tier] for tier in Tier}
