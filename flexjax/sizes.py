"""Sizes in bytes, as people write them: "10GiB", "512MB" or a plain number."""

import re

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base ** (power + 1)
    for power, prefix in enumerate("kmgtp")
    for suffix, base in (("b", 1000), ("", 1000), ("ib", 1024), ("i", 1024))
}


def parse_bytes(text: str | int) -> int:
    """Bytes of "10GiB" (powers of 1024), "512MB" (powers of 1000) or a plain number.

    Raises:
        ValueError: not a size, or a negative one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(
            f"{text!r} is not a size; write bytes, or a number with a unit such as "
            "'10GiB' or '512MB'"
        )
    return round(float(match[1]) * _UNITS[match[2]])


def format_bytes(num_bytes: int) -> str:
    """A size as people read it, in powers of 1024: "1.5 GiB"."""
    value = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
