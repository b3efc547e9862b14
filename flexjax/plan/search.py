"""Finds the policy that does a job in the least time within a machine's memory.

For each (batch_size, num_batches) a linear program chooses the six placement fractions
that take the least time within the memory of each tier, where a phase takes as long as
its slowest resource (`candidates`). Here the best of them are rounded to policies that
the engine runs as they are, and simulated.
"""

import dataclasses
import math
from collections.abc import Mapping

from flexjax.memory.processor import Processor
from flexjax.plan.candidates import Candidate, candidates
from flexjax.plan.closed_form import SHARES, Model, with_shares
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.predict import Prediction, predict, predict_peak
from flexjax.plan.program import STORE, Solved, memories, solve
from flexjax.policy import Kind, Policy, Tier
from flexjax.schedule.footprint import by_tier
from flexjax.sizes import format_bytes

# Sizes that are simulated of those that may be the best, which were 1 to 40 in ten jobs
# of OPT-1.3B to 175B on the examples of machines. With the least alone, what was found
# for three of them took 16, 41 and 52 % longer, and 4 % in another.
LEAST_SIMULATED, MOST_SIMULATED = 4, 48
SIMULATED_S = 0.25  # what one takes, about
MOST_SPENT = 0.05  # of the predicted time, on searching for what would be faster
NEARLY = 0.9  # as good as the best by the closed form: it may be better simulated
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
        peak: bytes of the largest block, by tier and kind: as many or more.
        budgets: bytes that each memory could give; where the device is the host, the
            device's is that of both.
        layers_ahead: layers whose weights are on their way while one computes.
    """

    policy: Policy
    job: Job
    prediction: Prediction
    peak: Mapping[tuple[Tier, Kind], int]
    budgets: Mapping[Tier, int]
    layers_ahead: int


def search(
    model: Model,
    hardware: Hardware,
    job: Job,
    allowed: Policy | None = None,
    *,
    most_block_s: float = math.inf,
) -> Plan:
    """The best policy for a job.

    Args:
        model: to run.
        hardware: to run it on.
        job: prompts and tokens.
        allowed: bits, sparsity and host attention that a policy shall have.
        most_block_s: seconds that a block may take.

    Raises:
        ValueError: not even one prompt fits; the message says what does not, where. Or
            none is done in time.
    """
    shared = hardware.device_is_host
    budgets = memory_budgets(hardware.free_bytes, device_is_host=shared)
    template = allowed or Policy()
    found = sorted(
        candidates(model, hardware, job, template, budgets),
        key=lambda candidate: candidate.job_s,
    )
    plans: dict[Policy, Plan] = {}  # by their sizes, which a candidate's policy is
    ahead: list[Candidate] = []  # more of the same sizes, with other layers ahead
    best_s = math.inf

    def simulate(candidate: Candidate) -> None:
        nonlocal best_s
        plan = _rounded(model, hardware, job, candidate, budgets)
        if plan is None or plan.prediction.block_s > most_block_s:
            return
        known, total_s = plans.get(candidate.policy), plan.prediction.total_s
        if known is None or total_s < known.prediction.total_s:
            plans[candidate.policy] = plan
        best_s = min(best_s, total_s)

    for candidate in found:
        # No plan takes less than its slowest resource, of which the closed form tells.
        if candidate.job_s >= best_s or len(plans) >= _affordable(best_s):
            break
        if candidate.policy in plans:
            ahead.append(candidate)
        elif candidate.solved.block_s <= most_block_s:
            simulate(candidate)
    for candidate in ahead:
        if NEARLY * plans[candidate.policy].prediction.total_s <= best_s:
            simulate(candidate)
    if not plans and math.isfinite(most_block_s):
        quickest = frontier(model, hardware, job, template)[0].prediction.block_s
        raise ValueError(
            f"no block is done within {most_block_s:g} s; the quickest takes about "
            f"{quickest:.3g} s"
        )
    if not plans:
        raise ValueError(_nothing_fits(model, hardware, job, template, budgets))
    return min(plans.values(), key=lambda plan: plan.prediction.total_s)


def _affordable(job_s: float) -> float:
    """Sizes to simulate for a job that will take so long."""
    most = min(MOST_SIMULATED, MOST_SPENT * job_s / SIMULATED_S)
    return max(LEAST_SIMULATED, most)


def with_exact_peak(plan: Plan, model: Model, processor: Processor) -> Plan:
    """The plan with its schedule's own peak, which takes longer to find."""
    ahead = plan.layers_ahead
    peak = predict_peak(model, plan.policy, plan.job, processor, layers_ahead=ahead)
    return dataclasses.replace(plan, peak=peak)


def frontier(
    model: Model, hardware: Hardware, job: Job, allowed: Policy | None = None
) -> list[Plan]:
    """Plans of which none gives more tokens per second in less time a block.

    In the order of their blocks' times; each for as many prompts as it takes at once.

    Raises:
        ValueError: not even one prompt fits.
    """
    shared = hardware.device_is_host
    budgets = memory_budgets(hardware.free_bytes, device_is_host=shared)
    template = allowed or Policy()
    found: list[Plan] = []
    best_per_s = 0.0  # prompts, by the closed form
    for candidate in sorted(
        candidates(model, hardware, job, template, budgets),
        key=lambda candidate: candidate.solved.block_s,
    ):
        under = job.under(candidate.policy, device_is_host=shared)
        rows = under.num_at_once(candidate.policy)
        per_s = rows / candidate.solved.block_s
        if per_s > NEARLY * best_per_s:
            best_per_s = max(best_per_s, per_s)
            one = dataclasses.replace(job, num_prompts=rows)
            plan = _rounded(model, hardware, one, candidate, budgets)
            found += [] if plan is None else [plan]
    if not found:
        raise ValueError(_nothing_fits(model, hardware, job, template, budgets))
    plans: list[Plan] = []
    best = 0.0  # tokens per second
    for plan in sorted(found, key=lambda plan: plan.prediction.block_s):
        if plan.prediction.tokens_per_s > best:
            best = plan.prediction.tokens_per_s
            plans.append(plan)
    return plans


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


def _rounded(
    model: Model,
    hardware: Hardware,
    job: Job,
    candidate: Candidate,
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
        ahead = candidate.layers_ahead
        peak = predict_peak(
            model,
            policy,
            job,
            hardware.processor,
            layers_ahead=ahead,
            quickly=True,
        )
        over = _overflow(peak, budgets, hardware.device_is_host)
        if not over:
            return Plan(
                policy=policy,
                job=job,
                prediction=predict(model, policy, hardware, job, layers_ahead=ahead),
                peak=peak,
                budgets=budgets,
                layers_ahead=ahead,
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
    length = job.prompt_len + job.num_shared
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
            f"not even one prompt of {length} tokens fits: with all on disk "
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
