"""Time and memory of a block as linear functions of its six placement fractions.

Bytes of a run and seconds of its ops grow evenly with the fractions, but for rounding
to whole tensors and rows. So they are taken from seven corners, where everything of a
kind is on one tier: one with all on disk, and one for each fraction that is 1 instead.
No formula of the engine's is written twice.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from flexjax.arrangement import shape_of
from flexjax.memory.footprint import RunFootprint
from flexjax.memory.layout import MOST_PARTS, WeightLayout, lay_out
from flexjax.memory.processor import Processor, Tensors
from flexjax.models.config import OPTConfig
from flexjax.plan.costs import RunCosts
from flexjax.plan.hardware import Hardware
from flexjax.plan.peak import Counted, peak_from_above
from flexjax.policy import Kind, Placement, Policy, Tier
from flexjax.schedule.emit import hidden_stays
from flexjax.schedule.ops import Cache, Cell, Hidden
from flexjax.schedule.resources import DISK, Contention, Resource, add_seconds
from flexjax.workload import MOST_LAYERS_AHEAD, Workload, looking_ahead

# The variables: the share of a kind on a tier; the rest is on disk.
SHARES = tuple((kind, tier) for kind in Kind for tier in (Tier.DEVICE, Tier.HOST))
MOST_SAMPLED = 5  # steps whose seconds stand for those of all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is known of a model before a weight is read."""

    config: OPTConfig
    dtype: np.dtype
    tensors: Tensors

    @functools.cached_property
    def _layouts(self) -> dict[Any, WeightLayout]:
        return {}

    def layout(self, policy: Policy, processor: Processor) -> WeightLayout:
        """How it lies under a policy."""
        # All that a layout depends on; a search asks for the same few over and over.
        parts = min(policy.num_batches, MOST_PARTS)
        weights = policy.weights
        key = weights.device, weights.host, parts, policy.activation_bits, processor
        if key not in self._layouts:
            self._layouts[key] = lay_out(
                self.config,
                self.dtype,
                self.tensors,
                policy,
                processor=processor,
            )
        return self._layouts[key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A value by resource, or by tier and kind: `base` plus shares times `slopes`."""

    base: Mapping[Any, float]
    slopes: Mapping[tuple[Kind, Tier], Mapping[Any, float]]

    def at(self, shares: Mapping[tuple[Kind, Tier], float]) -> dict[Any, float]:
        total = dict(self.base)
        for share, slope in self.slopes.items():
            for key, value in slope.items():
                total[key] = total.get(key, 0.0) + shares[share] * value
        # What is nothing may come out a little below it.
        return {key: max(0.0, value) for key, value in total.items()}

    @property
    def keys(self) -> list[Any]:
        found = dict.fromkeys(self.base)
        for slope in self.slopes.values():
            found |= dict.fromkeys(slope)
        return list(found)

    def slope(self, key: Any) -> list[float]:
        """By share, in the order of `SHARES`."""
        return [self.slopes[share].get(key, 0.0) for share in SHARES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockForm:
    """A block's seconds and bytes.

    Attributes:
        prefill, decode: seconds by resource.
        bytes: peak bytes by tier and kind.
    """

    prefill: Linear
    decode: Linear
    bytes: Linear

    def seconds(
        self, shares: Mapping[tuple[Kind, Tier], float], contention: Contention
    ) -> tuple[float, float]:
        """Of prefill and decode: what the slowest resource takes."""
        prefill_s = phase_seconds(self.prefill.at(shares), contention)
        return prefill_s, phase_seconds(self.decode.at(shares), contention)


def phase_seconds(terms: Mapping[Resource, float], contention: Contention) -> float:
    """Of a phase whose resources all work at the same time: the largest term wins."""
    compute_s = terms.get(Resource.COMPUTE, 0.0)
    disk_s = sum(terms.get(resource, 0.0) for resource in DISK)
    return max(contention.seconds(disk_s, compute_s), *terms.values())


def shares_of(policy: Policy) -> dict[tuple[Kind, Tier], float]:
    """The variables' values under a policy."""
    return {(k, tier): policy.placement(k).fraction(tier) for k, tier in SHARES}


def with_shares(policy: Policy, shares: Mapping[tuple[Kind, Tier], float]) -> Policy:
    """`policy` with other placements."""
    return dataclasses.replace(
        policy,
        **{
            kind.value: Placement(
                device=shares[kind, Tier.DEVICE], host=shares[kind, Tier.HOST]
            )
            for kind in Kind
        },
    )


class Lengths(NamedTuple):
    """Tokens of a block's longest row.

    Attributes:
        prompt_len: of a prompt, beyond what it shares.
        gen_len: that are new.
        num_shared: with which prompts begin alike.
        rows_per_prefix: how many do, on average; 0 stands for all.
        fewest_per_prefix: the same of those that are fewest.
    """

    prompt_len: int
    gen_len: int
    num_shared: int = 0
    rows_per_prefix: int = 0
    fewest_per_prefix: int = 0

    def workload(self, layout: WeightLayout, policy: Policy, num_rows: int) -> Workload:
        """A block of so many rows of about these lengths."""
        return layout.workload(
            policy,
            shape_of(policy, num_rows, self.rows_per_prefix),
            prompt_len=self.prompt_len,
            gen_len=self.gen_len,
            num_shared=self.num_shared,
        )

    def at_worst(self, work: Workload) -> Workload:
        """`work` with as many prefixes as a block may have, and one to spare.

        That is where it has those of the fewest rows, and of two more some batches.
        """
        if not (work.prefix_ends and self.rows_per_prefix):
            return work
        each = math.ceil(max(1, self.fewest_per_prefix) / work.batch_size)
        return work.behind(3 + max(0, work.num_batches - 2) // each)


def block_form(
    model: Model, policy: Policy, hardware: Hardware, lengths: Lengths
) -> BlockForm:
    """The form of a whole block under `policy`, whatever its placements."""
    corners = list(_corners(model, policy, hardware, lengths, MOST_LAYERS_AHEAD))
    return BlockForm(
        prefill=_linear([corner.prefill_s() for corner in corners]),
        decode=_linear([corner.decode_s() for corner in corners]),
        bytes=_linear([corner.peak_bytes() for corner in corners]),
    )


def block_bytes(
    model: Model,
    policy: Policy,
    hardware: Hardware,
    lengths: Lengths,
    *,
    layers_ahead: int,
) -> Linear:
    """Bytes of a block with so many layers ahead; its seconds are the same."""
    corners = _corners(model, policy, hardware, lengths, layers_ahead)
    return _linear([corner.peak_bytes() for corner in corners])


def _corners(
    model: Model,
    policy: Policy,
    hardware: Hardware,
    lengths: Lengths,
    layers_ahead: int,
) -> "Iterator[_Corner]":
    for corner in _corner_policies(policy):
        layout = model.layout(corner, hardware.processor)
        work = lengths.workload(layout, corner, corner.block_size)
        work = looking_ahead(work, layers_ahead)
        sizes = RunFootprint(work=work, policy=corner, weights=layout, scores=False)
        yield _Corner(sizes, hardware, lengths.at_worst(work))


def _corner_policies(policy: Policy) -> list[Policy]:
    nothing = dict.fromkeys(SHARES, 0.0)
    return [with_shares(policy, nothing)] + [
        with_shares(policy, nothing | {share: 1.0}) for share in SHARES
    ]


def _linear(values: list[Mapping[Any, float]]) -> Linear:
    base, *others = values
    return Linear(
        base=base,
        slopes={
            share: {
                key: other.get(key, 0.0) - base.get(key, 0.0)
                for key in base.keys() | other.keys()
            }
            for share, other in zip(SHARES, others, strict=True)
        },
    )


class _Corner:
    """A block of which everything of a kind is on one tier.

    So all its layers are alike, and all its batches: what holds for one holds for all.
    """

    def __init__(
        self, sizes: RunFootprint, hardware: Hardware, at_worst: Workload
    ) -> None:
        self._sizes, self._work = sizes, sizes.work
        self._at_worst = dataclasses.replace(sizes, work=at_worst)
        self._costs = RunCosts(sizes, hardware)

    def prefill_s(self) -> dict[Resource, float]:
        """Seconds by resource, when nothing else happens."""
        return self._step_s(0)

    def decode_s(self) -> dict[Resource, float]:
        """The same of all steps after the prefill.

        Steps grow evenly but for buckets of the cache: some of them stand for all. The
        last one is by itself, since it stores no cache.
        """
        last = self._work.gen_len - 1
        total = self._step_s(last) if last else dict.fromkeys(Resource, 0.0)
        count = max(0, last - 1)
        steps = {round(s) for s in np.linspace(1, last - 1, min(count, MOST_SAMPLED))}
        for step in steps:
            add_seconds(total, self._step_s(step), count / len(steps))
        return total

    def _step_s(self, step: int) -> dict[Resource, float]:
        work, costs = self._work, self._costs
        total = dict(self._weights_s)
        cell, cache, hidden = Cell(step, 0, 0), Cache(0, 0), Hidden(0)
        cells = work.num_decoder_layers * work.num_batches
        if hidden_stays(self._sizes.policy.schedule, work):
            add_seconds(total, costs.load(hidden, step), work.num_batches)
        else:  # the head reads hidden states too
            loads = work.num_layers * work.num_batches
            add_seconds(total, costs.load(hidden, step), loads)
            add_seconds(total, costs.store(hidden, step), cells)
        for seconds in (
            costs.compute(cell),
            costs.load(cache, step) if step > 0 else {},
            costs.store(cache, step) if work.keeps_cache(step) else {},
        ):
            add_seconds(total, seconds, cells)
        if work.prefixes:
            self._add_prefixes(total, step)
        return total

    def _add_prefixes(self, total: dict[Resource, float], step: int) -> None:
        """Adds what is done once a layer for each prefix."""
        work, costs = self._work, self._costs
        first, count = work.prefixes[0], len(work.prefixes)
        cache = Cache(0, first)
        if step == 0:
            add_seconds(total, costs.load(Hidden(first), 0), count)
            each = [costs.compute(Cell(0, 0, first))]
            each += [costs.store(cache, 0)] if work.gen_len > 1 else []
        else:
            each = [costs.load(cache, step)]
        for seconds in each:
            add_seconds(total, seconds, count * work.num_decoder_layers)

    @functools.cached_property
    def _weights_s(self) -> dict[Resource, float]:
        """Of what is the same in every step: all weights, and the head."""
        work, costs = self._work, self._costs
        total: dict[Resource, float] = dict.fromkeys(Resource, 0.0)
        add_seconds(total, costs.load_all_weights())
        for layer in range(work.num_decoder_layers, work.num_layers):
            add_seconds(total, costs.compute(Cell(0, layer, 0)), work.num_batches)
        return total

    def peak_bytes(self) -> Counted:
        return peak_from_above(self._at_worst, alike=True)
