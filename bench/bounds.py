"""How fast a phase of a run could have been: what each resource needs, at its limit."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from flexjax.policy import Tier

DISK_READ, DISK_WRITE, COMPUTE = "disk read", "disk write", "compute"
TO_DEVICE, FROM_DEVICE = "host to device", "device to host"

_DISK, _HOST, _DEVICE = Tier.DISK.value, Tier.HOST.value, Tier.DEVICE.value


def bounds_s(
    bytes_moved: Mapping[str, int], rates: Mapping[str, float], compute_s: float
) -> dict[str, float]:
    """Seconds that each resource needs at least.

    Args:
        bytes_moved: by link, such as "disk->host".
        rates: bytes per second of a resource; one that has none bounds nothing.
        compute_s: seconds of the steps when everything is at hand.
    """
    nbytes: Counter[str] = Counter()
    for link, count in bytes_moved.items():
        resource = _resource(link)
        if resource is not None and resource in rates and count:
            nbytes[resource] += count
    bounds = {resource: count / rates[resource] for resource, count in nbytes.items()}
    return bounds | {COMPUTE: compute_s}


def _resource(link: str) -> str | None:
    source, _, target = link.partition("->")
    if source == _DISK:
        return DISK_READ
    if target == _DISK:
        return DISK_WRITE
    return {(_HOST, _DEVICE): TO_DEVICE, (_DEVICE, _HOST): FROM_DEVICE}.get(
        (source, target)
    )


def phase_report(
    phase: Mapping[str, Any], rates: Mapping[str, float], compute_s: float
) -> dict[str, Any]:
    """A phase of a run beside its bounds.

    Args:
        phase: its `seconds`, its `bytes_moved` by link and its `busy_s` by lane.
        rates: see `bounds_s`.
        compute_s: see `bounds_s`.
    """
    seconds, moved = phase["seconds"], phase["bytes_moved"]
    bounds = bounds_s(moved, rates, compute_s)
    bound_by = max(bounds, key=lambda resource: bounds[resource])
    return {
        "seconds": seconds,
        "bytes_moved": dict(moved),
        "bytes_per_s": {
            link: nbytes / seconds for link, nbytes in moved.items() if seconds
        },
        "busy_s": dict(phase["busy_s"]),
        "bound_s": bounds,
        "bound_by": bound_by,
        "fraction_of_bound": fraction(bounds[bound_by], seconds),
    }


def fraction(bound_s: float, seconds: float) -> float | None:
    """The share of the limit that was reached; None where nothing ran."""
    return bound_s / seconds if seconds else None
