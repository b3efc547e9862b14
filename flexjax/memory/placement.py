"""The rounding rules: which tensor, and which rows, live on which tier.

Tensors are placed whole and rows are placed whole; what rounding one of them leaves
over is carried to the next, so that over the whole model the effective fractions are
the requested ones to within one tensor or one row.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from flexjax.policy import Placement, Tier


class Rows(NamedTuple):
    """Rows of one batch on each tier, in the order in which they lie in the batch."""

    device: int = 0
    host: int = 0
    disk: int = 0

    def spans(self) -> dict[Tier, slice]:
        """The rows of each tier that has any."""
        first, spans = 0, {}
        for tier, count in zip(Tier, self, strict=True):
            if count:
                spans[tier] = slice(first, first + count)
            first += count
        return spans


@functools.lru_cache(maxsize=1 << 14)
def place_rows(placement: Placement, batch_size: int, index: int) -> Rows:
    """Splits the rows of the `index`-th batch of a sequence of equal batches.

    Over the first n batches the rows on the device are the nearest integer to their
    share of all rows, for every n; likewise the rows on the host among those that are
    not on the device.
    """
    first, last = index * batch_size, (index + 1) * batch_size
    device = [_nearest(placement.device * count) for count in (first, last)]
    elsewhere = 1.0 - placement.device
    share = min(1.0, placement.host / elsewhere) if elsewhere > 1e-9 else 0.0
    host = [
        _nearest(share * (count - on_device))
        for count, on_device in zip((first, last), device, strict=True)
    ]
    on_device, on_host = device[1] - device[0], host[1] - host[0]
    return Rows(on_device, on_host, batch_size - on_device - on_host)


def _nearest(x: float) -> int:
    # A fraction such as 0.7 times a count must not miss a half by its last bit.
    return math.floor(x + 0.5 + 1e-9)


def place_tensors(
    placement: Placement,
    nbytes: Mapping[str, int],
    *,
    small_bytes: int = 0,
    small_tier: Tier = Tier.HOST,
) -> dict[str, Tier]:
    """Gives every tensor of a model a tier.

    All tensors stand in one fixed line, and the tiers cut it where their fractions say.
    So a larger fraction on the device keeps everything that a smaller one kept there,
    and no cut is off by more than half a tensor. In the line, the tensors of equal size
    and equal name stand together, in an order that spreads any stretch of it evenly
    over the layers: what is streamed is about the same in every layer.

    Args:
        placement: the requested fractions.
        nbytes: size of each tensor; `layers.<n>.` in front of a name tells the layer.
        small_bytes: a smaller tensor is on `small_tier`, if it would be farther away.
        small_tier: see there.
    """
    line = sorted(nbytes, key=lambda name: (nbytes[name], *_spread(name)))
    total = sum(nbytes.values())
    device_end = placement.device * total
    host_end = (placement.device + placement.host) * total
    tiers, end = {}, 0
    for name in line:
        middle, end = end + nbytes[name] / 2, end + nbytes[name]
        on_device, on_host = middle <= device_end, middle <= host_end
        if nbytes[name] < small_bytes:
            on_device |= small_tier is Tier.DEVICE
            on_host |= small_tier is Tier.HOST
        tiers[name] = Tier.DEVICE if on_device else Tier.HOST if on_host else Tier.DISK
    return tiers


def _spread(name: str) -> tuple[str, float]:
    """A tensor's name in its layer, and the layer's place in van der Corput's sequence.

    Any run of that sequence (the layer's number with its bits reversed, behind the
    binary point) is spread evenly over its range.
    """
    prefix, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    if prefix != "layers" or not number.isdigit():
        return name, 0.0
    bits = format(int(number), "b")[::-1]
    return inner, int(bits, 2) / 2 ** len(bits)


def effective(nbytes: Mapping[str, int], tiers: Mapping[str, Tier]) -> dict[Tier, int]:
    """Bytes that a placement of tensors really puts on each tier."""
    held = dict.fromkeys(Tier, 0)
    for name, tier in tiers.items():
        held[tier] += nbytes[name]
    return held


def partition(nbytes: Mapping[str, int], num_parts: int) -> list[list[str]]:
    """Cuts tensors, in their order, into parts of about the same size."""
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    total, end = sum(nbytes.values()), 0
    for name, size in nbytes.items():
        middle, end = end + size / 2, end + size
        parts[min(num_parts - 1, int(num_parts * middle / max(total, 1)))].append(name)
    return parts
