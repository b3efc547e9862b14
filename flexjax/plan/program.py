"""The linear program over a block's six placement fractions.

FlexGen's (arXiv 2303.06865, section 4.3), over `closed_form`'s terms.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog

from flexjax.plan.closed_form import SHARES, BlockForm, Linear
from flexjax.plan.hardware import Hardware
from flexjax.policy import Kind, Tier
from flexjax.schedule.resources import DISK, Contention, Resource

STORE = (Tier.DISK, Kind.WEIGHTS)  # is there already, whatever a policy places
# What a second of any resource counts beside one of the block: a tie-break, without
# which what fits in memory went by the disk for as long as the disk was not slowest.
TRAFFIC = 0.01
# Seconds that a share counts for being near: a tie-break for what costs nothing
# anywhere, as the cache of a run that ends with its first token.
NEARBY_S = {Tier.DEVICE: 2e-5, Tier.HOST: 1e-5}


class Solved(NamedTuple):
    """The fractions of a block, its seconds, and what a byte more of memory saves."""

    shares: dict[tuple[Kind, Tier], float]
    block_s: float
    worth_s: dict[Tier, float]  # of a byte more; a hundredth of its traffic included


def solve(
    form: BlockForm, hardware: Hardware, budgets: Mapping[Tier, int]
) -> Solved | None:
    """The fractions that take the least time; None where nothing fits."""
    rows: list[list[float]] = []  # coefficients of shares, prefill and decode
    limits: list[float] = []
    for phase, linear in enumerate((form.prefill, form.decode)):
        own = [-1.0, 0.0] if phase == 0 else [0.0, -1.0]
        for base, slope in _lines(linear, hardware.contention):
            rows.append([*slope, *own])
            limits.append(-base)
    for kind in Kind:
        rows.append([float(share[0] is kind) for share in SHARES] + [0.0, 0.0])
        limits.append(1.0)
    # Where hidden states go home, every call waits for one: so none goes by the disk.
    rows.append([-float(kind is Kind.ACTIVATIONS) for kind, _ in SHARES] + [0.0, 0.0])
    limits.append(-1.0)
    pools = memories(device_is_host=hardware.device_is_host)
    scale = 1 / 2**30  # so that all numbers of the program are of a size
    for tiers in pools:
        keys = [key for key in form.bytes.keys if key[0] in tiers and key != STORE]
        slopes = [np.array(form.bytes.slope(key)) for key in keys]
        slope = sum(slopes, np.zeros(len(SHARES)))  # there may be nothing
        base = sum(form.bytes.base.get(key, 0.0) for key in keys)
        rows.append([*(slope * scale), 0.0, 0.0])
        limits.append((budgets[tiers[0]] - base) * scale)
    apart = not hardware.device_is_host
    bounds = [(0, 1 if apart or tier is Tier.DEVICE else 0) for _, tier in SHARES]
    # Seconds of all resources: of plans that are as fast, the one that moves the least.
    spent = np.sum(
        [p.slope(r) for p in (form.prefill, form.decode) for r in Resource], axis=0
    )
    near = np.array([NEARBY_S[tier] for _, tier in SHARES])
    result = linprog(
        [*(TRAFFIC * spent - near), 1.0, 1.0],
        A_ub=np.array(rows),
        b_ub=limits,
        bounds=[*bounds, (0, None), (0, None)],
        method="highs",
    )
    if result.status != 0:
        return None
    worth = -result.ineqlin.marginals[-len(pools) :] * scale
    return Solved(
        shares=dict(zip(SHARES, result.x[: len(SHARES)].tolist(), strict=True)),
        block_s=float(result.x[-2] + result.x[-1]),
        worth_s={t[0]: float(w) for t, w in zip(pools, worth, strict=True)},
    )


def memories(*, device_is_host: bool) -> list[tuple[Tier, ...]]:
    """The tiers that share each memory."""
    if device_is_host:
        return [(Tier.DEVICE, Tier.HOST), (Tier.DISK,)]
    return [(tier,) for tier in Tier]


def _lines(
    linear: Linear, contention: Contention
) -> Iterator[tuple[float, list[float]]]:
    """Seconds that a phase takes at least, as linear functions of the shares.

    One for each resource; and two for compute beside the disk, which reads or writes,
    whose larger one is `Contention.seconds`.
    """

    def line(*resources: Resource) -> np.ndarray:
        return np.sum(
            [(linear.base.get(r, 0.0), *linear.slope(r)) for r in resources], 0
        )

    compute, disk = line(Resource.COMPUTE), line(*DISK)
    beside = [a * disk + b * compute for a, b in contention.lines()]
    for found in (*(line(resource) for resource in Resource), *beside):
        yield found[0], found[1:].tolist()
