"""Where tensors live and how prompts are batched: immutable pytrees, and their JSON.

The six placement fractions are the leaves of a `Policy`; everything else is static.
"""

import dataclasses
import enum
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax


class Tier(enum.Enum):
    """A level of the memory hierarchy, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    # Members are keys wherever bytes are counted, and Enum's own hash is slow.
    __hash__ = object.__hash__


class Kind(enum.Enum):
    """The kinds of tensors that a policy places."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"
    ACTIVATIONS = "activations"

    __hash__ = object.__hash__


class Schedule(enum.StrEnum):
    """The order in which the layers of a block of batches run."""

    SERIAL = "serial"
    ROW_BY_ROW = "row_by_row"
    ZIGZAG = "zigzag"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Fractions of one kind of tensor kept on each tier; the rest is on disk."""

    device: float = 0.0
    host: float = 0.0

    @property
    def disk(self) -> float:
        rest = 1.0 - self.device - self.host
        return rest if rest > 1e-9 else 0.0  # fractions such as 0.7 and 0.3 sum to 1

    def fraction(self, tier: Tier) -> float:
        return getattr(self, tier.value)


BITS = (4, 8)  # of an element of what is quantized
ACTIVATION_BITS = (8,)  # of what is rounded to be multiplied with it
static = functools.partial(dataclasses.field, metadata={"static": True})
ALL_ON_DEVICE = Placement(device=1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Where weights, KV cache and activations live, and how prompts are batched.

    A block of `batch_size * num_batches` prompts runs together: one load of a layer's
    weights serves all `num_batches` calls of `batch_size` rows.

    Attributes:
        weights, kv_cache, activations: fractions on each tier; the activations of a
            batch wait there while others are computed, so of one that is alone they
            stay on the device.
        batch_size: rows of one compute call.
        num_batches: calls that share one load of a layer's weights.
        schedule: the order of the calls.
        host_attention: attend to what is cached on host and disk on the host's own
            processor, instead of bringing it to the device. Where these two are one, it
            changes nothing.
        attention_sparsity: fraction of its past that a new token attends to, by row and
            head; prompts are attended to whole.
        weight_bits, kv_cache_bits: 4 or 8 to quantize in groups; None is as stored.
        activation_bits: 8 to round what is multiplied with quantized weights, each row
            in the weights' groups, and so to multiply integers; None multiplies what
            there is. It is for CPUs, see `flexjax.kernels.products`.
        group_size: elements of a group of weights; of a cache, at most.
    """

    weights: Placement = ALL_ON_DEVICE
    kv_cache: Placement = ALL_ON_DEVICE
    activations: Placement = ALL_ON_DEVICE
    batch_size: int = static(default=8)
    num_batches: int = static(default=1)
    schedule: Schedule = static(default=Schedule.ZIGZAG)
    host_attention: bool = static(default=False)
    attention_sparsity: float = static(default=1.0)
    weight_bits: int | None = static(default=None)
    kv_cache_bits: int | None = static(default=None)
    activation_bits: int | None = static(default=None)
    group_size: int = static(default=64)

    def placement(self, kind: Kind) -> Placement:
        return getattr(self, kind.value)

    @property
    def block_size(self) -> int:
        """Prompts that run together."""
        return self.batch_size * self.num_batches


def validate(policy: Policy) -> Policy:
    """Returns `policy` with its schedule as an enum.

    Raises:
        ValueError: a fraction is outside [0, 1], fractions sum past 1, a count is not
            positive, or a setting is none that there is.
    """
    for kind in Kind:
        _validate_placement(kind.value, policy.placement(kind))
    for name in ("batch_size", "num_batches", "group_size"):
        count = getattr(policy, name)
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}, expected an integer of at least 1")
    _validate_bits(policy)
    if type(policy.host_attention) is not bool:
        raise ValueError(
            f"host_attention is {policy.host_attention!r}, expected True or False"
        )
    if policy.host_attention and policy.kv_cache.device >= 1.0:
        raise ValueError(
            "host_attention does nothing where the whole KV cache is on the device: "
            "place some of kv_cache on host or disk, or leave host_attention out"
        )
    sparsity = policy.attention_sparsity
    if not _is_number(sparsity) or not 0.0 < sparsity <= 1.0:
        raise ValueError(
            f"attention_sparsity is {sparsity!r}, expected the fraction of the past "
            "that is attended to: more than 0, and 1.0 for all of it"
        )
    try:
        schedule = Schedule(policy.schedule)
    except ValueError:
        names = ", ".join(schedule.value for schedule in Schedule)
        raise ValueError(
            f"schedule is {policy.schedule!r}, expected one of {names}"
        ) from None
    return dataclasses.replace(policy, schedule=schedule)


def _validate_bits(policy: Policy) -> None:
    for name in ("weight_bits", "kv_cache_bits"):
        bits = getattr(policy, name)
        if bits is not None and (type(bits) is not int or bits not in BITS):
            raise ValueError(
                f"{name} is {bits!r}, expected 4, 8 or None, which is as stored"
            )
    bits = policy.activation_bits
    if bits is not None and (type(bits) is not int or bits not in ACTIVATION_BITS):
        raise ValueError(
            f"activation_bits is {bits!r}, expected 8 or None, which rounds nothing"
        )
    quantizes = policy.weight_bits is not None or policy.kv_cache_bits is not None
    if policy.group_size != Policy.group_size and not quantizes:
        raise ValueError(
            f"group_size={policy.group_size} does nothing where nothing is quantized: "
            "give weight_bits or kv_cache_bits, or leave group_size out"
        )


def _validate_placement(name: str, placement: Placement) -> None:
    if not isinstance(placement, Placement):
        raise ValueError(f"{name} is {placement!r}, expected a Placement")
    for tier in (Tier.DEVICE, Tier.HOST):
        _validate_fraction(name, tier, placement.fraction(tier))
    total = placement.device + placement.host
    if total > 1.0 + 1e-6:
        raise ValueError(
            f"{name}: device={placement.device} and host={placement.host} sum to "
            f"{total:g}, expected at most 1 (the rest is on disk)"
        )


def _validate_fraction(name: str, tier: Tier, fraction: Any) -> None:
    if not _is_number(fraction) or not 0.0 <= fraction <= 1.0:  # NaN neither
        raise ValueError(
            f"{name}: the fraction on {tier.value} is {fraction!r}, "
            "expected a number between 0 and 1"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def to_json(policy: Policy) -> dict[str, Any]:
    """A JSON object that `from_json` reads back."""
    values = dataclasses.asdict(policy)
    return values | {"schedule": Schedule(policy.schedule).value}


def from_json(values: Mapping[str, Any]) -> Policy:
    """Reads what `to_json` wrote; names that are left out take their defaults.

    Raises:
        ValueError: an unknown name, or a value that `validate` refuses.
    """
    _refuse_unknown("policy", values, {f.name for f in dataclasses.fields(Policy)})
    fields = dict(values)
    for kind in Kind:
        if kind.value in fields:
            fields[kind.value] = _placement_from_json(kind.value, fields[kind.value])
    return validate(Policy(**fields))


def _placement_from_json(name: str, values: Any) -> Placement:
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{name} is {values!r}, expected an object such as "
            '{"device": 0.2, "host": 0.8}'
        )
    _refuse_unknown(name, values, {tier.value for tier in Tier})
    fractions = dict(values)
    disk = fractions.pop("disk", None)
    placement = Placement(**fractions)
    _validate_placement(name, placement)
    if disk is not None:
        _validate_fraction(name, Tier.DISK, disk)
        if not math.isclose(disk, placement.disk, abs_tol=1e-6):
            raise ValueError(
                f"{name}: disk={disk!r} does not bring device={placement.device} and "
                f"host={placement.host} to a sum of 1; leave disk out, it is the rest"
            )
    return placement


def _refuse_unknown(name: str, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{name} has no {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )


def parse_placement(name: str, text: str) -> Placement:
    """Reads a placement as command lines write it: `device=0.2,host=0.8`.

    Raises:
        ValueError: not of this form, or no placement; the message starts with `name`.
    """
    fractions: dict[str, float] = {}
    for item in text.split(","):
        tier, _, fraction = item.partition("=")
        try:
            value = float(fraction)
        except ValueError:
            raise ValueError(
                f"{name}: cannot read {item!r}, expected fractions such as "
                "device=0.2,host=0.8"
            ) from None
        if tier.strip() in fractions:
            raise ValueError(f"{name}: {tier.strip()} is given twice; give it once")
        fractions[tier.strip()] = value
    return _placement_from_json(name, fractions)


def read_policy(path: pathlib.Path) -> Policy:
    """Reads a `policy.json`.

    Raises:
        ValueError: the file is missing, is not JSON or is not a policy.
    """
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, expected an object")
        return from_json(values)
    except OSError as error:
        raise ValueError(f"policy {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"policy {path}: {error}") from error
