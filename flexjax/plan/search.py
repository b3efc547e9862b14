"""Finds the policy that does a job in the least time within a machine's memory.

For each (batch_size, num_batches) a linear program chooses the six placement fractions
that take the least time within the memory of each tier, where a phase takes as long as
its slowest resource. An outer search walks the sizes; the best candidates are rounded
to policies that the engine runs as they are, and simulated.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from flexjax.memory.layout import Processor
from flexjax.plan.closed_form import (
    SHARES,
    BlockForm,
    Model,
    block_form,
    with_shares,
)
from flexjax.plan.hardware import Hardware
from flexjax.plan.predict import Job, Prediction, predict, predict_peak
from flexjax.plan.program import STORE, Solved, memories, solve
from flexjax.policy import Kind, Policy, Tier
from flexjax.schedule.footprint import by_tier
from flexjax.sizes import format_bytes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MOST_BATCHES = 64
NUM_SIMULATED = 4  # of the best candidates
# Of a memory, for what no plan counts: Python, XLA's code, what is fragmented.
RESERVED = 0.05
RESERVED_BYTES = 400 << 20
_TIGHTEN = 4  # times that a plan which rounding made too large is solved anew


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy, and what it will do.

    Attributes:
        policy: that the engine runs as it is.
        job: what it was searched for.
        prediction: of the whole job.
        peak: bytes of the largest block, by tier and kind.
        budgets: bytes that each memory could give; where the device is the host, the
            device's is that of both.
        worth_s: seconds of a block that one more GiB of each memory would save.
    """

    policy: Policy
    job: Job
    prediction: Prediction
    peak: Mapping[tuple[Tier, Kind], int]
    budgets: Mapping[Tier, int]
    worth_s: Mapping[Tier, float]


class _Candidate(NamedTuple):
    job_s: float
    policy: Policy
    form: BlockForm
    solved: Solved


def search(
    model: Model, hardware: Hardware, job: Job, allowed: Policy | None = None
) -> Plan:
    """The best policy for a job.

    Args:
        model: to run.
        hardware: to run it on.
        job: prompts and tokens.
        allowed: bits, sparsity and host attention that a policy shall have.

    Raises:
        ValueError: not even one prompt fits; the message says what does not, where.
    """
    shared = hardware.device_is_host
    budgets = memory_budgets(hardware.free_bytes, device_is_host=shared)
    template = allowed or Policy()
    found = sorted(
        _candidates(model, hardware, job, template, budgets),
        key=lambda candidate: candidate.job_s,
    )
    plans = []
    for candidate in found:
        plan = _rounded(model, hardware, job, candidate, budgets)
        if plan is not None:
            plans.append(plan)
        if len(plans) == NUM_SIMULATED:
            break
    if not plans:
        raise ValueError(_nothing_fits(model, hardware, job, template, budgets))
    best = min(plans, key=lambda plan: plan.prediction.total_s)
    peak = predict_peak(model, best.policy, job, hardware.processor)
    return dataclasses.replace(best, peak=peak)


def memory_budgets(
    free: Mapping[Tier, int], *, device_is_host: bool
) -> dict[Tier, int]:
    """Bytes of each memory that a plan may use, of those that are free."""

    def usable(nbytes: int) -> int:
        return max(0, int(nbytes * (1 - RESERVED)) - RESERVED_BYTES)

    device = Tier.HOST if device_is_host else Tier.DEVICE
    return {
        Tier.DEVICE: usable(free[device]),
        Tier.HOST: usable(free[Tier.HOST]),
        Tier.DISK: free[Tier.DISK],
    }


def fits(
    model: Model,
    policy: Policy,
    budgets: Mapping[Tier, int],
    job: Job,
    processor: Processor,
) -> bool:
    """Whether a policy needs no more for a job than budgets allow."""
    peak = predict_peak(model, policy, job, processor, quickly=True)
    return not _overflow(peak, budgets, processor.is_host)


def _candidates(
    model: Model,
    hardware: Hardware,
    job: Job,
    template: Policy,
    budgets: Mapping[Tier, int],
) -> Iterator[_Candidate]:
    """Solved sizes of blocks: for each batch size, more batches while that helps."""
    for batch_size in _batch_sizes(job.num_prompts):
        most = min(MOST_BATCHES, math.ceil(job.num_prompts / batch_size))
        best_s = math.inf
        for num_batches in _doubling(most):
            policy = dataclasses.replace(
                template, batch_size=batch_size, num_batches=num_batches
            )
            form = block_form(
                model,
                policy,
                hardware,
                prompt_len=job.prompt_len,
                gen_len=job.gen_len,
            )
            solved = solve(form, hardware, budgets)
            if solved is None:
                break
            job_s = solved.block_s * job.num_prompts / policy.block_size
            if policy.block_size >= job.num_prompts:
                job_s = solved.block_s
            yield _Candidate(job_s, policy, form, solved)
            if job_s > best_s:
                break
            best_s = job_s


def _batch_sizes(num_prompts: int) -> list[int]:
    """Sizes to try; the last one holds all prompts, where there are few."""
    smaller = [size for size in BATCH_SIZES if size < num_prompts]
    return smaller + ([num_prompts] if num_prompts <= BATCH_SIZES[-1] else [])


def _doubling(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is among them."""
    counts = {1, most} | {base << power for base in (2, 3) for power in range(7)}
    return sorted(count for count in counts if count <= most)


def _rounded(
    model: Model,
    hardware: Hardware,
    job: Job,
    candidate: _Candidate,
    budgets: Mapping[Tier, int],
) -> Plan | None:
    """The candidate as a policy that fits as the engine counts; None if none does."""
    tight = dict(budgets)
    solved: Solved | None = candidate.solved
    for _ in range(_TIGHTEN):
        if solved is None:
            return None
        policy = with_shares(candidate.policy, _floored(solved.shares))
        if policy.kv_cache.device >= 1.0:  # there is nothing that it would act on
            policy = dataclasses.replace(policy, host_attention=False)
        peak = predict_peak(model, policy, job, hardware.processor, quickly=True)
        over = _overflow(peak, budgets, hardware.device_is_host)
        if not over:
            return Plan(
                policy=policy,
                job=job,
                prediction=predict(model, policy, hardware, job),
                peak=peak,
                budgets=budgets,
                worth_s={tier: n * 2**30 for tier, n in solved.worth_s.items()},
            )
        tight = {tier: tight[tier] - over.get(tier, 0) for tier in Tier}
        solved = solve(candidate.form, hardware, tight)
    return None


def _floored(
    shares: Mapping[tuple[Kind, Tier], float],
) -> dict[tuple[Kind, Tier], float]:
    """Shares with four digits, no larger than they were."""
    floored = {
        share: min(1.0, max(0.0, math.floor(value * 10_000 + 1e-6) / 10_000))
        for share, value in shares.items()
    }
    for kind in Kind:
        device, host = shares[kind, Tier.DEVICE], shares[kind, Tier.HOST]
        if device + host > 1 - 1e-6 and host > 0:  # nothing is to be on disk
            floored[kind, Tier.HOST] = round(1.0 - floored[kind, Tier.DEVICE], 4)
    return floored


def _overflow(
    peak: Mapping[tuple[Tier, Kind], int],
    budgets: Mapping[Tier, int],
    device_is_host: bool,
) -> dict[Tier, int]:
    """Bytes past each memory's budget, where there are any."""
    held = by_tier({key: size for key, size in peak.items() if key != STORE})
    over: dict[Tier, int] = {}
    for tiers in memories(device_is_host=device_is_host):
        excess = sum(held[tier] for tier in tiers) - budgets[tiers[0]]
        if excess > 0:
            # At least as much as moves a fraction by a digit.
            over[tiers[0]] = max(math.ceil(1.02 * excess), budgets[tiers[0]] // 1000)
    return over


def _nothing_fits(
    model: Model,
    hardware: Hardware,
    job: Job,
    template: Policy,
    budgets: Mapping[Tier, int],
) -> str:
    """Which memory is too small for one prompt, by how much, and what most of it is.

    With everything as far away as it goes.
    """
    alone = dataclasses.replace(template, batch_size=1, num_batches=1)
    policy = with_shares(alone, dict.fromkeys(SHARES, 0.0))
    one = dataclasses.replace(job, num_prompts=1)
    peak = predict_peak(model, policy, one, hardware.processor)
    peak = {key: size for key, size in peak.items() if key != STORE}
    held = by_tier(peak)
    for tiers in memories(device_is_host=hardware.device_is_host):
        needed = sum(held[tier] for tier in tiers)
        if needed <= budgets[tiers[0]]:
            continue
        own = {key: size for key, size in peak.items() if key[0] in tiers}
        (tier, kind), most = max(own.items(), key=lambda item: item[1])
        names = " and ".join(tier.value for tier in tiers)
        return (
            f"not even one prompt of {job.prompt_len} tokens fits: with all on disk "
            f"that can be there, {names} needs {format_bytes(needed)}, and a plan may "
            f"use {format_bytes(budgets[tiers[0]])} of it, "
            f"{format_bytes(needed - budgets[tiers[0]])} too little; most of it is "
            f"{format_bytes(most)} of {kind.value} on {tier.value}; give it more, or "
            "take shorter prompts or a smaller model"
        )
    return (
        "no placement of one prompt fits: the disk has room for "
        f"{format_bytes(budgets[Tier.DISK])}; free some, or give more memory"
    )
