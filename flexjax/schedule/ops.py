"""The words of a schedule: four verbs on three nouns, and the shape of one cell."""

import dataclasses
from typing import NamedTuple


def is_prefix(batch: int) -> bool:
    """Whether a number is no batch's, but that of one row that batches begin with.

    The prefixes of a block are counted down, so that prefix `k` is `~k`.
    """
    return batch < 0


class Cell(NamedTuple):
    """One call of one layer on one batch at one step (step 0 is the prefill)."""

    step: int
    layer: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """Part `part` of the weights of a layer."""

    layer: int
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one batch in one layer."""

    layer: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a batch carries from layer to layer; before the first, its token rows."""

    batch: int


Buffer = Weights | Cache | Hidden


@dataclasses.dataclass(frozen=True)
class Load:
    """Starts to bring a buffer to the device, for use at `step`."""

    buffer: Buffer
    step: int


@dataclasses.dataclass(frozen=True)
class Compute:
    """Dispatches a layer on a batch; its hidden state replaces the one it was given."""

    step: int
    layer: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Store:
    """Starts to bring what `step` made of a buffer to where its placement says."""

    buffer: Cache | Hidden
    step: int


@dataclasses.dataclass(frozen=True)
class Free:
    """Waits until a buffer is used and stored, then gives its device memory back."""

    buffer: Buffer


Op = Load | Compute | Store | Free
