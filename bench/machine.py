"""What a result was measured on: enough to compare results, and no name of a host."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
from typing import Any

import jax

import flexjax
from flexjax.host_facts import (
    cpu_flags,
    cpu_model,
    num_cores,
    physical_memory_bytes,
)
from flexjax.kernels.compiled import AVX2, AVX512
from flexjax.memory.link import Device

_PACKAGES = ("jax", "jaxlib", "numpy", "tensorstore")
# What products and attention can be computed with.
_FLAGS = (*AVX2.names, *AVX512.names, "amx_bf16", "amx_int8", "amx_tile")


def describe_machine(disk_folder: pathlib.Path | None = None) -> dict[str, Any]:
    """The machine and the versions, as JSON values.

    Args:
        disk_folder: lies on the disk that is described; the working folder, if None.
    """
    device: Device = jax.devices()[0]
    return {
        "cpu": _describe_cpu(),
        "memory_bytes": physical_memory_bytes(),
        "disk": _describe_disk(disk_folder or pathlib.Path()),
        "accelerator": _describe_accelerator(device),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": _versions(),
    }


def _describe_cpu() -> dict[str, Any]:
    return {
        "model": cpu_model(),
        "cores": num_cores(),
        "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
    }


def _describe_disk(folder: pathlib.Path) -> dict[str, Any]:
    usage = shutil.disk_usage(folder)
    return {
        "free_bytes": usage.free,
        "size_bytes": usage.total,
        "rotational": _is_rotational(folder.stat().st_dev),
    }


def _is_rotational(device: int) -> bool | None:
    """Whether the disk turns; None where the system does not say."""
    block = pathlib.Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own, but lies in its disk's folder.
    for folder in (block, block.resolve().parent):
        try:
            return (folder / "queue/rotational").read_text().strip() == "1"
        except OSError:
            continue
    return None


def _describe_accelerator(device: Device) -> dict[str, Any] | None:
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() or {}
    return {
        "model": getattr(device, "device_kind", device.platform),
        "count": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
    }


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "python": platform.python_version(),
        "flexjax": flexjax.__version__,
        **versions,
    }
