"""What a policy will do with a job: its seconds, and its peak bytes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from flexjax.arrangement import shape_of
from flexjax.memory.footprint import RunFootprint, run_peak_bytes
from flexjax.memory.layout import WeightLayout
from flexjax.memory.processor import Processor
from flexjax.plan.closed_form import (
    Model,
    block_form,
    phase_seconds,
    shares_of,
)
from flexjax.plan.costs import RunCosts
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.peak import peak_from_above
from flexjax.policy import Kind, Policy, Schedule, Tier
from flexjax.schedule.emit import EMITTERS
from flexjax.schedule.ops import Buffer, Cache, Cell, Hidden
from flexjax.schedule.resources import Resource, Seconds, add_seconds
from flexjax.schedule.simulate import simulate
from flexjax.workload import MOST_LAYERS_AHEAD, Workload, looking_ahead

# What is simulated of a long run, in compute calls, and of its steps and layers at the
# least: the rest takes as much longer than its slowest resource as this does. Beside
# 32 times as many calls, the seconds of 72 drawn jobs of OPT-1.3B to 66B were 0.1 % off
# on average and 2 % at most; those of a prefill alone can be 3 % off.
MOST_CELLS = 1_000
LEAST_STEPS, LEAST_LAYERS = 3, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a job will take.

    Attributes:
        prefill_s, decode_s: of all blocks.
        num_tokens: that are generated.
        prefill_terms, decode_terms: seconds of each resource, when nothing else
            happens.
        block_s: of the longest block, from its start to its last token.
    """

    prefill_s: float
    decode_s: float
    num_tokens: int
    prefill_terms: Mapping[Resource, float]
    decode_terms: Mapping[Resource, float]
    block_s: float

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.total_s

    @property
    def terms(self) -> dict[Resource, float]:
        """Seconds of each resource in the whole job."""
        total = dict(self.prefill_terms)
        add_seconds(total, self.decode_terms)
        return total

    @property
    def bottleneck(self) -> Resource:
        """The resource that is needed longest."""
        return max(self.terms, key=lambda resource: self.terms[resource])

    def idle_share(self, resource: Resource) -> float:
        """The share of the time for which a resource is not needed."""
        return max(0.0, 1.0 - self.terms[resource] / self.total_s)


def predict(
    model: Model,
    policy: Policy,
    hardware: Hardware,
    job: Job,
    *,
    layers_ahead: int = MOST_LAYERS_AHEAD,
    barrier: bool = False,
) -> Prediction:
    """What a policy takes for a job, by simulation of its first block.

    Args:
        model: that runs.
        policy: how.
        hardware: where.
        job: what it is to do.
        layers_ahead: layers whose weights are on their way while one computes.
        barrier: see `simulate`.

    Raises:
        ValueError: it runs one batch to its end after the other, so that no prefill
            comes before all of the decode.
    """
    if policy.schedule is Schedule.ROW_BY_ROW:
        raise ValueError(
            f"a run with schedule={policy.schedule.value!r} cannot be predicted yet: "
            "its phases are not one after the other"
        )
    job = job.under(policy, device_is_host=hardware.device_is_host)
    prefill_s = decode_s = 0.0
    terms: list[dict[Resource, float]] = [{}, {}]
    stretch: list[float] = []
    block_s = 0.0
    layout = model.layout(policy, hardware.processor)
    for work, times in _blocks(layout, policy, job, layers_ahead):
        block = dataclasses.replace(
            policy, batch_size=work.batch_size, num_batches=work.num_batches
        )
        form = block_form(model, block, hardware, job.lengths)
        stretch = stretch or _stretch(model, policy, hardware, work, barrier)
        shares = shares_of(policy)
        seconds = form.seconds(shares, hardware.contention)
        each = [stretch[phase] * seconds[phase] for phase in range(2)]
        block_s = block_s or sum(each)
        prefill_s += times * each[0]
        decode_s += times * each[1]
        add_seconds(terms[0], form.prefill.at(shares), times)
        add_seconds(terms[1], form.decode.at(shares), times)
    return Prediction(
        prefill_s=prefill_s,
        decode_s=decode_s,
        num_tokens=job.num_prompts * job.gen_len,
        prefill_terms=terms[0],
        decode_terms=terms[1],
        block_s=block_s,
    )


def combined(parts: Sequence[tuple[float, Prediction]]) -> Prediction:
    """A sum of predictions, each times a weight."""
    terms: list[dict[Resource, float]] = [{}, {}]
    for weight, part in parts:
        add_seconds(terms[0], part.prefill_terms, weight)
        add_seconds(terms[1], part.decode_terms, weight)
    return Prediction(
        prefill_s=sum(weight * part.prefill_s for weight, part in parts),
        decode_s=sum(weight * part.decode_s for weight, part in parts),
        num_tokens=round(sum(weight * part.num_tokens for weight, part in parts)),
        prefill_terms=terms[0],
        decode_terms=terms[1],
        block_s=max(part.block_s for _, part in parts),
    )


def _stretch(
    model: Model, policy: Policy, hardware: Hardware, work: Workload, barrier: bool
) -> list[float]:
    """How much longer prefill and decode take than their slowest resource."""
    layout = model.layout(policy, hardware.processor)
    sizes = RunFootprint(work=work, policy=policy, weights=layout, scores=False)
    part, contention = _Part(work, RunCosts(sizes, hardware)), hardware.contention
    run = simulate(
        EMITTERS[policy.schedule], part.work, part, contention, barrier=barrier
    )
    last = part.work.gen_len - 1
    first_s = run.step_ends_s[0]
    stretch = []
    for seconds, steps in (
        (first_s, range(1)),
        (run.step_ends_s[last] - first_s, range(1, last + 1)),
    ):
        terms: dict[Resource, float] = {}
        for step in steps:
            add_seconds(terms, run.step_busy_s[step])
        stretch.append(seconds / phase_seconds(terms, contention) if steps else 1.0)
    return stretch


def predict_peak(
    model: Model,
    policy: Policy,
    job: Job,
    processor: Processor,
    *,
    layers_ahead: int = MOST_LAYERS_AHEAD,
    quickly: bool = False,
) -> Mapping[tuple[Tier, Kind], int]:
    """Bytes of a job's largest block, which is the first, by tier and kind.

    With `quickly` as many or more, in a fraction of the time.
    """
    layout = model.layout(policy, processor)
    work, _ = next(_blocks(layout, policy, job, layers_ahead))
    if job.rows_per_prefix:  # there may be more batches than their average makes
        whole = job.lengths.workload(layout, policy, policy.block_size)
        work = job.lengths.at_worst(looking_ahead(whole, layers_ahead))
    if not quickly:
        return run_peak_bytes(work, policy, layout)
    return peak_from_above(
        RunFootprint(work=work, policy=policy, weights=layout, scores=False)
    )


def _blocks(
    layout: WeightLayout, policy: Policy, job: Job, layers_ahead: int
) -> Iterator[tuple[Workload, int]]:
    """The shapes of a job's blocks, and how often each occurs."""
    shape = shape_of(policy, policy.block_size, job.rows_per_prefix)
    most = shape.batch_size * shape.num_batches
    whole, rest = divmod(job.num_rows(policy), most)
    for num_rows, times in ((most, whole), (rest, 1)):
        if num_rows and times:
            work = job.lengths.workload(layout, policy, num_rows)
            yield looking_ahead(work, layers_ahead), times


class _Part:
    """Costs of some of a run's layers and steps, spread over all."""

    def __init__(self, work: Workload, costs: RunCosts) -> None:
        self._costs, self._whole = costs, work
        least = min(LEAST_STEPS, work.gen_len)
        most = MOST_CELLS // (least * work.num_batches) - work.num_head_blocks
        num_layers = min(work.num_decoder_layers, max(LEAST_LAYERS, most))
        cells = work.num_batches * (num_layers + work.num_head_blocks)
        self.work = dataclasses.replace(
            work,
            num_decoder_layers=num_layers,
            gen_len=min(work.gen_len, max(least, MOST_CELLS // cells)),
        )

    def load(self, buffer: Buffer, step: int) -> Seconds:
        if not isinstance(buffer, Hidden):
            buffer = dataclasses.replace(buffer, layer=self._layer(buffer.layer))
        return self._costs.load(buffer, self._step(step))

    def compute(self, cell: Cell) -> Seconds:
        step, layer = self._step(cell.step), self._layer(cell.layer)
        return self._costs.compute(Cell(step, layer, cell.batch))

    def store(self, buffer: Cache | Hidden, step: int) -> Seconds:
        if isinstance(buffer, Cache):
            buffer = dataclasses.replace(buffer, layer=self._layer(buffer.layer))
        return self._costs.store(buffer, self._step(step))

    def _step(self, step: int) -> int:
        """Which step of the whole run one of the part is.

        After the first, which is the prefill, each is in the middle of an equal share
        of the others.
        """
        whole, part = self._whole.gen_len, self.work.gen_len
        if step == 0:
            return 0
        return 1 + (2 * step - 1) * (whole - 1) // (2 * (part - 1))

    def _layer(self, layer: int) -> int:
        """Which layer of the whole run one of the part is."""
        whole, part = self._whole.num_decoder_layers, self.work.num_decoder_layers
        if layer >= part:
            return layer - part + whole
        return layer * whole // part
