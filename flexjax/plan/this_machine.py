"""Which machine this is, and what of it is free."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from flexjax.host_facts import cpu_model, num_cores, physical_memory_bytes
from flexjax.kernels.compiled import Kernel
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.kernels.products import PRODUCTS
from flexjax.memory.capacity import free_bytes
from flexjax.memory.link import Device, is_shared


def machine_id(offload_dir: pathlib.Path, device: Device) -> str:
    """A name for what figures depend on: processors, memory, disk, kernels, and JAX.

    A disk is known by the system's number for it.
    """
    folder = offload_dir.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    facts = [
        cpu_model(),
        num_cores(),
        physical_memory_bytes(),
        _device_kind(device),
        _compiled_for(PRODUCTS) if is_shared(device) else None,
        _compiled_for(DECODE_ATTENTION),  # on a GPU's host, too
        existing.stat().st_dev,
        jax.__version__,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _compiled_for(kernel: Kernel) -> Sequence[str] | None:
    """The instructions that a kernel uses here; None where it is not there."""
    instructions = kernel.instructions()
    return instructions.names if instructions and kernel.is_there() else None


def budgets(offload_dir: pathlib.Path, device: Device) -> dict[str, Any]:
    """What is free now, as fields of `Hardware`."""
    free = free_bytes(device, offload_dir)
    fields = ("device_memory_bytes", "host_memory_bytes", "disk_bytes")
    return dict(zip(fields, free.values(), strict=True))


def machine_name(device: Device) -> str:
    """What people call it."""
    host = f"{cpu_model()}, {num_cores()} cores"
    return host if is_shared(device) else f"{_device_kind(device)}, {host}"


def _device_kind(device: Device) -> str:
    return getattr(device, "device_kind", device.platform)
