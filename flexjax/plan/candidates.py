"""Sizes of blocks to choose from, each with the best fractions that it can have."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from flexjax.plan.closed_form import BlockForm, Model, block_bytes, block_form
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.program import Solved, solve
from flexjax.policy import Policy, Tier
from flexjax.workload import MOST_LAYERS_AHEAD

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MOST_BATCHES = 64
LEAST_GAIN = 0.01  # of a block's seconds, for twice the memory: less is not looked for
MEMORIES = (Tier.DEVICE, Tier.HOST)  # in which weights wait that are ahead


class Candidate(NamedTuple):
    """A size of blocks, with fractions that a linear program found.

    Attributes:
        job_s: seconds of the whole job, by the closed form.
        policy: its sizes, and all but its placements.
        layers_ahead: layers whose weights are on their way while one computes.
        form: of a block.
        solved: its fractions.
    """

    job_s: float
    policy: Policy
    layers_ahead: int
    form: BlockForm
    solved: Solved


def candidates(
    model: Model,
    hardware: Hardware,
    job: Job,
    template: Policy,
    budgets: Mapping[Tier, int],
) -> Iterator[Candidate]:
    """Solved sizes of blocks: for each batch size, more batches while that helps."""
    job = job.under(template, device_is_host=hardware.device_is_host)
    for batch_size in _batch_sizes(job):
        num_rows = job.num_rows(dataclasses.replace(template, batch_size=batch_size))
        most = min(MOST_BATCHES, math.ceil(num_rows / batch_size))
        best_s = math.inf
        for num_batches in _doubling(most):
            policy = dataclasses.replace(
                template, batch_size=batch_size, num_batches=num_batches
            )
            found = list(_solved(model, hardware, job, policy, budgets))
            if not found:
                break
            yield from found
            job_s = min(candidate.job_s for candidate in found)
            if job_s > best_s:
                break
            best_s = job_s


def _solved(
    model: Model,
    hardware: Hardware,
    job: Job,
    policy: Policy,
    budgets: Mapping[Tier, int],
) -> Iterator[Candidate]:
    """The best fractions of a block: with fewer layers ahead, if memory is short."""
    form = block_form(model, policy, hardware, job.lengths)
    for layers_ahead in range(MOST_LAYERS_AHEAD, 0, -1):
        if layers_ahead < MOST_LAYERS_AHEAD:
            fewer = block_bytes(
                model, policy, hardware, job.lengths, layers_ahead=layers_ahead
            )
            form = dataclasses.replace(form, bytes=fewer)
        solved = solve(form, hardware, budgets)
        if solved is None:
            continue
        blocks = job.num_blocks(policy)
        job_s = solved.block_s * blocks
        yield Candidate(job_s, policy, layers_ahead, form, solved)
        gained_s = (solved.worth_s.get(tier, 0.0) * budgets[tier] for tier in MEMORIES)
        if max(gained_s) <= LEAST_GAIN * solved.block_s:
            break


def _batch_sizes(job: Job) -> list[int]:
    """Sizes to try; the last one holds all prompts, where there are few.

    Of those that begin alike, each batch gets as many as the others.
    """
    alike = job.rows_per_prefix or job.num_prompts
    smaller = [size for size in BATCH_SIZES if size < alike]
    sizes = smaller + ([alike] if alike <= BATCH_SIZES[-1] else [])
    if job.rows_per_prefix:
        sizes = [math.ceil(alike / math.ceil(alike / size)) for size in sizes]
    return sorted(set(sizes))


def _doubling(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`, which is among them."""
    counts = {1, most} | {base << power for base in (2, 3) for power in range(7)}
    return sorted(count for count in counts if count <= most)
