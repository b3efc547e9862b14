"""What a report shows: the results of benchmarks, as values."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PHASES = ("prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run: what it took, and what each resource alone would take."""

    seconds: float
    bound_s: Mapping[str, float]
    bound_by: str
    fraction_of_bound: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A result of `bench.run`."""

    path: pathlib.Path
    machine: str
    case: str
    model: str
    lengths: str
    placement: str
    num_rows: int
    memory_cap_bytes: int | None
    tokens_per_s: float
    phases: Mapping[str, Phase]
    step_s: Sequence[float]
    peak_rss_bytes: int
    command: str
    note: str


class Tried(NamedTuple):
    """A setting of a system in a comparison, and its throughput."""

    placement: str
    num_rows: int
    tokens_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """One system of a comparison at its best setting, and what it tried."""

    name: str
    setting: str
    tokens_per_s: float
    tried: Sequence[Tried]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A result of `bench.compare`."""

    path: pathlib.Path
    machine: str
    model: str
    lengths: str
    memory_cap_bytes: int | None
    ratio: float | None
    systems: Sequence[System]
    command: str


class Route(NamedTuple):
    """A way to copy, and how fast it is at one size."""

    direction: str
    name: str
    nbytes: int
    bytes_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """A result of `bench.copy_routes`, without the routes that were refused."""

    path: pathlib.Path
    machine: str
    routes: Sequence[Route]


class Rate(NamedTuple):
    """A kernel, and how fast it is; None where the rate says nothing of it."""

    kernel: str
    shape: str
    flops_per_s: float | None
    bytes_per_s: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """A result of `bench.kernels`."""

    path: pathlib.Path
    machine: str
    model: str
    rates: Sequence[Rate]
    command: str


class Precision(NamedTuple):
    """Bits of what is kept and multiplied, how much of the past, and what they cost."""

    weight_bits: int
    kv_cache_bits: int
    activation_bits: int
    attention_sparsity: float
    perplexity: float
    increase: float
    top_1_agreement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """A result of `bench.quality`."""

    path: pathlib.Path
    machine: str
    precisions: Sequence[Precision]
    command: str


class Predicted(NamedTuple):
    """A policy, and seconds as they were predicted and measured, by phase."""

    policy: str
    predicted_s: Mapping[str, float]
    measured_s: Mapping[str, float]
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predictions:
    """A result of `bench.predictions`; errors are fractions of what was measured."""

    path: pathlib.Path
    machine: str
    rows: Sequence[Predicted]
    median_error: float
    error_of_90_percent: float
    command: str


class Work(NamedTuple):
    """A span of a trace."""

    name: str
    begin_s: float
    end_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace of a run: each lane's work in the order of its beginning."""

    path: pathlib.Path
    lanes: Mapping[str, Sequence[Work]]


class Chosen(NamedTuple):
    """Under a memory cap: the plan and the best of a grid, each with its seconds."""

    memory_cap_bytes: int
    chosen: str
    chosen_s: float
    best: str
    best_s: float
    policies: int
    ratio: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A result of `bench.grid`."""

    path: pathlib.Path
    machine: str
    model: str
    rows: Sequence[Chosen]
    command: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTwoWays:
    """A result of `bench.lengths`, or of another job that was run in two ways.

    Attributes:
        in_words: what each took.
        ratio: how many times as long the second took.
    """

    path: pathlib.Path
    machine: str
    model: str
    in_words: str
    ratio: float
    command: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """A result of `bench.frontier`: seconds of a block, and tokens per second."""

    path: pathlib.Path
    machine: str
    model: str
    points: Sequence[tuple[float, float]]
    command: str


Result = (
    Run
    | Comparison
    | Copies
    | Kernels
    | Quality
    | Predictions
    | Grid
    | InTwoWays
    | Frontier
    | Trace
)


def bits_in_words(policy: Mapping[str, Any]) -> str:
    """Of weights, cache and activations in a policy's JSON: 4/16/8."""
    kinds = "weight", "kv_cache", "activation"
    return "/".join(str(policy.get(f"{kind}_bits") or 16) for kind in kinds)
