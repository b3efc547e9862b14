"""How much each tier can still take, and a refusal that says what to do."""

import pathlib
import shutil
from collections.abc import Mapping

import jax

from flexjax.policy import Kind, Tier
from flexjax.sizes import format_bytes

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_ADVICE = {
    Tier.DEVICE: "lower batch_size, or place less on the device",
    Tier.HOST: "lower batch_size or num_batches, or place less on the host",
    Tier.DISK: "free some space or choose an offload_dir on another disk, lower "
    "batch_size or num_batches, or place less on disk",
}


def free_bytes(device: jax.Device, offload_dir: pathlib.Path) -> dict[Tier, int]:
    """Bytes that each tier can take in addition to what it holds.

    A CPU is a device with the host's memory, so there the two tiers share it.
    """
    host = free_host_bytes()
    stats = None if device.platform == "cpu" else device.memory_stats()
    limit = (stats or {}).get("bytes_limit")
    used = (stats or {}).get("bytes_in_use", 0)
    return {
        Tier.DEVICE: host if limit is None else limit - used,
        Tier.HOST: host,
        Tier.DISK: shutil.disk_usage(_existing(offload_dir)).free,
    }


def free_host_bytes() -> int:
    """Memory that this process may still take, by the machine and by its cgroup."""
    found = []
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass  # not Linux: nothing is known, so nothing is refused
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = int((_CGROUP / limit).read_text())
            found.append(most - int((_CGROUP / used).read_text()))
        except (OSError, ValueError):
            continue  # no such controller, or "max"
    return min(found, default=1 << 62)


def ensure_fits(
    needed: Mapping[tuple[Tier, Kind], int],
    free: Mapping[Tier, int],
    *,
    device_is_host: bool,
) -> None:
    """Raises ValueError if what is needed does not fit; it names the tier and the kind.

    Args:
        needed: bytes in addition to what is held already.
        free: see `free_bytes`.
        device_is_host: the device tier and the host tier share one memory.
    """
    shared = (Tier.DEVICE, Tier.HOST) if device_is_host else ()
    for tiers in {shared, *((tier,) for tier in Tier if tier not in shared)} - {()}:
        sizes = {key: n for key, n in needed.items() if key[0] in tiers and n > 0}
        total = sum(sizes.values())
        if total <= free[tiers[0]]:
            continue
        largest, kind = max(sizes, key=lambda key: sizes[key])
        names = " and ".join(tier.value for tier in tiers)
        raise ValueError(
            f"the policy needs {format_bytes(total)} more on {names}, which can take "
            f"{format_bytes(free[tiers[0]])}; most of it is "
            f"{format_bytes(sizes[largest, kind])} of {kind.value} on "
            f"{largest.value}: {_ADVICE[largest]}"
        )


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
