"""How much each tier can still take, and a refusal that says what to do."""

import contextlib
import ctypes
import gc
import pathlib
import shutil
from collections.abc import Iterator, Mapping

from flexjax.memory.link import Device
from flexjax.policy import Kind, Tier
from flexjax.sizes import format_bytes

_CGROUP = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
_LIMITS = (  # of memory, and what is taken of it: version 2 and version 1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_ADVICE = {
    Tier.DEVICE: "lower batch_size, or place less on the device",
    Tier.HOST: "lower batch_size or num_batches, or place less on the host",
    Tier.DISK: "free some space or choose an offload_dir on another disk, lower "
    "batch_size or num_batches, or place less on disk",
}


def free_bytes(device: Device, offload_dir: pathlib.Path) -> dict[Tier, int]:
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
    """Memory that this process may still take, by the machine and by its cgroups."""
    found = [1 << 62]  # what is not known refuses nothing
    machine = _numbers(pathlib.Path("/proc/meminfo"))
    if "MemAvailable:" in machine:
        found.append(machine["MemAvailable:"] * 1024)
    for folder in _cgroups():
        for limit, used in _LIMITS:
            try:
                most = int((folder / limit).read_text())
                taken = int((folder / used).read_text())
            except (OSError, ValueError):
                continue  # no such controller, or "max"
            stat = _numbers(folder / "memory.stat")
            cached = sum(
                stat.get(f"{state}_file", 0) for state in ("active", "inactive")
            )
            found.append(most - (taken - cached))
    return max(0, min(found))


def give_back_freed() -> None:
    """Returns to the system what the C library keeps of memory that was freed."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another library's
        ctypes.CDLL(None).malloc_trim(0)


def _cgroups() -> Iterator[pathlib.Path]:
    """Folders of the groups whose limits hold for this process, as far as it sees them.

    A group's limit holds for all groups below it. In a container, the paths that the
    system names may be hidden, and the root is the container's own.
    """
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = _CGROUP / controllers
        if controllers in ("", "memory"):
            group = pathlib.PurePosixPath(path.strip("/"))
            yield from (root / part for part in (group, *group.parents))


def _numbers(path: pathlib.Path) -> dict[str, int]:
    """The first number of every line, by the word before it; nothing without a file."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


def shortage(
    needed: Mapping[tuple[Tier, Kind], int],
    free: Mapping[Tier, int],
    *,
    device_is_host: bool,
) -> str | None:
    """What does not fit, by tier and kind, and what to do; None if everything fits.

    Args:
        needed: bytes in addition to what is held already.
        free: see `free_bytes`.
        device_is_host: the device tier and the host tier share one memory.
    """
    memories: list[tuple[Tier, ...]] = [(Tier.DEVICE,), (Tier.HOST,), (Tier.DISK,)]
    if device_is_host:
        memories[:2] = [(Tier.DEVICE, Tier.HOST)]
    for tiers in memories:
        sizes = {key: n for key, n in needed.items() if key[0] in tiers and n > 0}
        total = sum(sizes.values())
        if total <= free[tiers[0]]:
            continue
        largest, kind = max(sizes, key=lambda key: sizes[key])
        names = " and ".join(tier.value for tier in tiers)
        return (
            f"the policy needs {format_bytes(total)} more on {names}, which can take "
            f"{format_bytes(free[tiers[0]])}; most of it is "
            f"{format_bytes(sizes[largest, kind])} of {kind.value} on "
            f"{largest.value}: {_ADVICE[largest]}"
        )
    return None


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
