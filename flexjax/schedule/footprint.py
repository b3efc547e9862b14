"""How much memory a schedule needs, by tier and kind, at its worst moment."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from flexjax.policy import Kind, Tier
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

Bytes = Mapping[tuple[Tier, Kind], int]


class Footprint(Protocol):
    """Bytes of everything that the ops of a run bring into being."""

    def resident(self) -> Bytes:
        """What is there from the first op to the last: above all, weights at home."""
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


def peak_bytes(ops: Iterable[Op], footprint: Footprint) -> dict[tuple[Tier, Kind], int]:
    """The largest number of bytes of each kind that each tier holds while `ops` run.

    An upper bound for any timing of the transfers: memory is counted from the op that
    asks for it to the `Free` that waits for its last use, and a home that is written
    anew counts twice until then. What a call makes of a buffer takes the place of what
    the call before it made. What a tier needs in all is the sum over its kinds, since
    stage buffers stay with their kind between one use and the next.
    """
    now = dict(footprint.resident())
    peak = dict(now)
    loaded: dict[Buffer, Bytes] = {}
    made: dict[Buffer, Bytes] = {}
    homes: dict[Buffer, Bytes] = {}
    replaced: dict[Buffer, Bytes] = {}
    for op in ops:
        match op:
            case Load(buffer, step):
                loaded[buffer] = footprint.loaded(buffer, step)
                _add(now, loaded[buffer])
            case Compute(step, layer, batch):
                cell = Cell(step, layer, batch)
                makes, workspace = footprint.computed(cell), footprint.workspace(cell)
                for size in (*makes.values(), workspace):
                    _add(now, size)
                _raise(peak, now)
                _add(now, workspace, -1)
                for buffer, size in makes.items():
                    _add(now, made.get(buffer, {}), -1)
                    made[buffer] = size
            case Store(buffer, step):
                replaced[buffer] = homes.get(buffer, {})
                homes[buffer] = footprint.stored(buffer, step)
                _add(now, homes[buffer])
            case Free(buffer):
                _raise(peak, now)  # only here it falls
                for held in (loaded, made, replaced):
                    _add(now, held.pop(buffer, {}), -1)
    _raise(peak, now)
    return {key: nbytes for key, nbytes in peak.items() if nbytes > 0}


def _add(now: dict[tuple[Tier, Kind], int], size: Bytes, sign: int = 1) -> None:
    for key, nbytes in size.items():
        now[key] = now.get(key, 0) + sign * nbytes


def _raise(peak: dict[tuple[Tier, Kind], int], now: Bytes) -> None:
    for key, nbytes in now.items():
        if nbytes > peak.get(key, 0):
            peak[key] = nbytes


def by_tier(sizes: Bytes) -> dict[Tier, int]:
    """The sum over the kinds, for every tier."""
    total = dict.fromkeys(Tier, 0)
    for (tier, _), nbytes in sizes.items():
        total[tier] += nbytes
    return total
