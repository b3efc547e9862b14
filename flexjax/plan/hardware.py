"""A machine in figures: what it holds, and how fast it moves and computes.

Figures are measured (`flexjax.plan.calibrate`) or described; as JSON they carry their
units in their names. `examples/` has some machines.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flexjax.memory.processor import Processor
from flexjax.policy import BITS, Tier
from flexjax.safe_files import write_atomically
from flexjax.schedule.resources import Contention

VERSION = 6
EXAMPLES = pathlib.Path(__file__).parent / "examples"
WHOLE_BITS = 16  # of a cache that is not quantized
ATTENTION = ("attention_bytes_per_s", "host_attention_bytes_per_s")
_TABLES = ("product_flops_per_s", "dequantized_bytes_per_s", "call_s", *ATTENTION)
_FROM_ZERO = ("disk_bytes", "call_s", "round_trip_s")
# By activation bits.
QUANTIZED_PRODUCTS = {
    None: "quantized_product_flops_per_s",
    8: "rounded_product_flops_per_s",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the cost model knows of a machine.

    Attributes:
        name: of the machine, for people.
        device_is_host: whether the device computes in the host's memory.
        device_memory_bytes: that a run may use; of no meaning where the device is the
            host.
        host_memory_bytes: likewise, all of a CPU's.
        disk_bytes: that a run may spill.
        disk_read_bytes_per_s, disk_write_bytes_per_s: of the offload folder.
        to_device_bytes_per_s, from_device_bytes_per_s: of copies between host and
            device; None where the device is the host, which needs none.
        product_flops_per_s: of a product of bfloat16 matrices, by the number of rows
            that the weights are multiplied with; two operations a multiplication.
        prefill_attention_flops_per_s: of attention to a whole prompt, scores that are
            masked counted too.
        attention_bytes_per_s: of keys and values for one new token a row, by the bits
            that a cache keeps; bytes are what they are when they are not quantized,
            which is called `WHOLE_BITS` whatever the model's type. Of bfloat16, and
            groups and heads of 64 elements; others may be slower.
        host_attention_bytes_per_s: the same on the host's processor.
        sampled_logits_per_s: of choosing tokens.
        dequantized_bytes_per_s: of weights made wide, by their bits, in bfloat16.
        round_trip_s: what it takes to bring a query to the host and an answer back;
            their bytes are next to nothing.
        call_s: what a call of a layer step takes besides, by the number of rows: norms,
            activations, and the call itself.
        quantized_product_flops_per_s: of products with quantized weights, by their bits
            and the number of rows; None where weights are made wide first.
        rounded_product_flops_per_s: the same where what they multiply is rounded to 8
            bits.
        compute_beside_disk, disk_beside_compute: fraction of its speed that each keeps
            while the other is busy.
    """

    name: str
    device_is_host: bool
    device_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    to_device_bytes_per_s: float | None = None
    from_device_bytes_per_s: float | None = None
    product_flops_per_s: Mapping[int, float]
    prefill_attention_flops_per_s: float
    attention_bytes_per_s: Mapping[int, float]
    host_attention_bytes_per_s: Mapping[int, float]
    sampled_logits_per_s: float
    dequantized_bytes_per_s: Mapping[int, float]
    call_s: Mapping[int, float]
    quantized_product_flops_per_s: Mapping[int, Mapping[int, float]] | None = None
    rounded_product_flops_per_s: Mapping[int, Mapping[int, float]] | None = None
    round_trip_s: float = 0.0
    compute_beside_disk: float = 1.0
    disk_beside_compute: float = 1.0

    @property
    def free_bytes(self) -> dict[Tier, int]:
        """What each tier could take."""
        return {
            Tier.DEVICE: self.device_memory_bytes,
            Tier.HOST: self.host_memory_bytes,
            Tier.DISK: self.disk_bytes,
        }

    @property
    def contention(self) -> Contention:
        return Contention(
            compute_beside_disk=self.compute_beside_disk,
            disk_beside_compute=self.disk_beside_compute,
        )

    @property
    def processor(self) -> Processor:
        """What the layout of a model depends on."""
        return Processor(
            is_host=self.device_is_host,
            multiplies_quantized=self.quantized_product_flops_per_s is not None,
            has_attention_kernel=self.device_is_host,  # as most processors have
        )

    def layer_s(
        self,
        rows: int,
        num_weights: int,
        bits: int | None = None,
        *,
        is_rounded: bool = False,
    ) -> float:
        """Seconds of a call of a layer that multiplies `rows` rows with its matrices.

        Between two measured numbers of rows, time grows evenly; past the last, with
        the rows. `num_weights` are the elements of all matrices, of `bits` bits where
        they are multiplied with as they are quantized, by rows that may be rounded.
        """
        rates = self.product_flops_per_s
        if bits is not None:
            by_bits = (
                self.rounded_product_flops_per_s
                if is_rounded
                else self.quantized_product_flops_per_s
            )
            assert by_bits is not None
            rates = by_bits[bits]
        products = {count: 2 * count / rate for count, rate in rates.items()}
        return num_weights * _between(products, rows) + _between(self.call_s, rows)


def _between(seconds: Mapping[int, float], rows: int) -> float:
    counts = sorted(seconds)
    most = counts[-1]
    found = np.interp(rows, counts, [seconds[count] for count in counts])
    return float(found) * max(1.0, rows / most)


def validate_hardware(hardware: Hardware) -> Hardware:
    """Returns `hardware`.

    Raises:
        ValueError: a figure is none that a machine can have; the message names it.
    """
    if not isinstance(hardware.name, str):
        raise ValueError(f"name is {hardware.name!r}, expected a text")
    if type(hardware.device_is_host) is not bool:
        raise ValueError(
            f"device_is_host is {hardware.device_is_host!r}, expected true or false"
        )
    for name, value in _figures(hardware):
        if name.endswith("memory_bytes") or name.startswith(_FROM_ZERO):
            _check(name, value, least=0)
        elif name in ("compute_beside_disk", "disk_beside_compute"):
            _check(name, value, above=0, most=1)
        else:
            _check(name, value, above=0)
    _check_together(hardware)
    return hardware


def _check_together(hardware: Hardware) -> None:
    """Refuses figures that cannot stand beside each other."""
    for name in ("to_device_bytes_per_s", "from_device_bytes_per_s"):
        is_given = getattr(hardware, name) is not None
        if is_given == hardware.device_is_host:
            why = "is the host's processor" if is_given else "has its own memory"
            what = "has no meaning" if is_given else "is missing"
            raise ValueError(f"{name} {what}: this device {why}")
    if hardware.compute_beside_disk + hardware.disk_beside_compute < 1:
        raise ValueError(
            "compute_beside_disk and disk_beside_compute sum to less than 1, but disk "
            "and processor that take turns keep as much"
        )
    _check_tables(hardware)


def _check_tables(hardware: Hardware) -> None:
    """Refuses tables that lack what is asked of them."""
    by_rows: dict[str, Mapping[int, float]] = {
        "product_flops_per_s": hardware.product_flops_per_s,
        "call_s": hardware.call_s,
    }
    for name in QUANTIZED_PRODUCTS.values():
        for bits, rates in (getattr(hardware, name) or {}).items():
            by_rows[f"{name} of {bits} bits"] = rates
    for name, table in by_rows.items():
        if not table:
            raise ValueError(f"{name} is empty; give it some numbers of rows")
        if (fewest := min(table)) < 1:
            raise ValueError(f"{name} has {fewest} rows, expected 1 or more")
    by_bits: dict[str, Mapping[int, Any]] = {
        "dequantized_bytes_per_s": hardware.dequantized_bytes_per_s
    }
    given = {name: getattr(hardware, name) for name in QUANTIZED_PRODUCTS.values()}
    by_bits |= {name: table for name, table in given.items() if table is not None}
    by_bits |= {name: getattr(hardware, name) for name in ATTENTION}
    for name, table in by_bits.items():
        needed = {*BITS, WHOLE_BITS} if name in ATTENTION else {*BITS}
        if missing := needed - set(table):
            raise ValueError(f"{name} lacks {min(missing)} bits")
    missing = [name for name, table in given.items() if table is None]
    for name in QUANTIZED_PRODUCTS.values():
        if name not in missing and not hardware.device_is_host:
            raise ValueError(
                f"{name} has no meaning: weights are made wide for a device with "
                "memory of its own"
            )
    if len(missing) == 1:
        raise ValueError(f"{missing[0]} is missing: a machine has all of them or none")


def _figures(hardware: Hardware) -> Iterator[tuple[str, Any]]:
    """Every number of a machine, with its name."""
    for field in dataclasses.fields(Hardware):
        value = getattr(hardware, field.name)
        if field.name in _TABLES:
            for key, rate in value.items():
                yield f"{field.name} of {key}", rate
        elif field.name in QUANTIZED_PRODUCTS.values():
            for bits, rates in (value or {}).items():
                for rows, rate in rates.items():
                    yield f"{field.name} of {bits} bits and {rows} rows", rate
        elif field.name in ("name", "device_is_host"):
            continue
        elif value is not None or field.default is not None:  # None where it may be
            yield field.name, value


def _check(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Also of an integer that no float can hold.
    is_finite = is_number and abs(value) <= sys.float_info.max
    if is_finite and least <= value <= most and value > above:
        return
    wanted = f"at least {least:g}" if math.isfinite(least) else f"more than {above:g}"
    if math.isfinite(most):
        wanted += f" and at most {most:g}"
    raise ValueError(f"{name} is {value!r}, expected a number of {wanted}")


def hardware_to_json(hardware: Hardware) -> dict[str, Any]:
    """A JSON object that `hardware_from_json` reads back."""
    return {"version": VERSION} | dataclasses.asdict(hardware)


def hardware_from_json(values: Any) -> Hardware:
    """Reads what `hardware_to_json` wrote.

    Raises:
        ValueError: not such an object, of another version, or with absurd figures.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, expected an object")
    fields = dict(values)
    if fields.pop("version", None) != VERSION:
        raise ValueError(
            f"version is {values.get('version')!r}, this flexjax reads {VERSION}: "
            "calibrate anew"
        )
    known = {field.name for field in dataclasses.fields(Hardware)}
    required = {
        field.name
        for field in dataclasses.fields(Hardware)
        if field.default is dataclasses.MISSING
    }
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"a machine has no {unknown[0]!r}")
    if missing := sorted(required - set(fields)):
        raise ValueError(f"{missing[0]} is missing")
    for name in _TABLES:
        fields[name] = _with_numbers(name, fields[name])
    for name in QUANTIZED_PRODUCTS.values():
        if fields.get(name) is not None:
            fields[name] = {
                bits: _with_numbers(f"{name} of {bits} bits", rates)
                for bits, rates in _with_numbers(name, fields[name]).items()
            }
    return validate_hardware(Hardware(**fields))


def _with_numbers(name: str, table: Any) -> dict[int, float]:
    """A table whose keys, which JSON makes texts, are numbers again."""
    if not isinstance(table, dict):
        raise ValueError(f"{name} is {table!r}, expected an object of figures")
    try:
        return {int(key): value for key, value in table.items()}
    except ValueError as error:
        raise ValueError(f"{name} has a key that is no number: {error}") from error


def read_hardware(name: str) -> Hardware:
    """Reads a machine's file; or one of `examples`, by its name.

    Raises:
        ValueError: there is no such file, or it describes no machine.
    """
    path = pathlib.Path(name)
    if not path.exists() and name in example_names():
        path = EXAMPLES / f"{name}.json"
    try:
        return hardware_from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(
            f"hardware {name} cannot be read: {error.strerror}; give a file, or one of "
            f"{', '.join(example_names())}"
        ) from error
    except ValueError as error:
        raise ValueError(f"hardware {path}: {error}") from error


def write_hardware(path: pathlib.Path, hardware: Hardware) -> None:
    """Writes what `read_hardware` reads."""
    text = json.dumps(hardware_to_json(hardware), indent=1)
    write_atomically(path, text.encode() + b"\n")


def example_names() -> list[str]:
    """Machines that come with flexjax."""
    return sorted(path.stem for path in EXAMPLES.glob("*.json"))
