"""What the system says of the machine that this runs on."""

import functools
import os
import pathlib
import platform
from collections.abc import Mapping

_CPU_INFO = pathlib.Path("/proc/cpuinfo")


def cpu_model() -> str:
    """The processor's name, or its architecture where the system tells no name."""
    return _cpu_facts().get("model name") or platform.machine()


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux calls it; nothing where it is not Linux."""
    return frozenset(_cpu_facts().get("flags", "").split())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def physical_memory_bytes() -> int:
    """All memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def _cpu_facts() -> Mapping[str, str]:
    """What Linux says of the first processor."""
    try:
        first, _, _ = _CPU_INFO.read_text().partition("\n\n")
    except OSError:
        return {}
    facts = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in facts}
