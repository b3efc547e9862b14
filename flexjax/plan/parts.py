"""Prompts of many lengths: cut into parts, each with a plan for its own lengths.

Batches under a policy must fit with the longest prompt of all. Where few are so long,
they are far too small for the others: under a plan for 1536 tokens, prompts of 64 take
1.1 to 11 times as long as under one of their own (a thousand prompts of OPT-1.3B to
175B on the examples of machines, with 64 new tokens, predicted).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flexjax.arrangement import Group
from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.planner import best_plan
from flexjax.plan.predict import Prediction, combined, predict
from flexjax.plan.search import MOST_SPENT, Plan
from flexjax.policy import Kind, Policy, Tier
from flexjax.workload import bucket, padded_alike

# A part is cut where a prompt with its new tokens is so many times as short; the
# first of these that can be afforded.
RATIOS = (2, 4, 8)
SEARCH_S = 4.0  # what one takes, about: 0.5 to 13 s, of OPT-1.3B to OPT-175B
NUM_PREDICTED = 4  # lengths of blocks, of all that occur
LEAST_GAIN = 0.05  # below this the prediction may be wrong about which is faster


class Asked(NamedTuple):
    """What a call wants.

    Attributes:
        lengths: tokens of each prompt, beyond those that it shares.
        gen_len: tokens to generate for each, at most.
        num_shared: tokens with which prompts begin alike, at most.
        rows_per_prefix: how many of them do, on average; 0 stands for all.
        fewest_per_prefix: the same of those that are fewest.
        most_block_s: seconds that a block may take where policies are searched.
    """

    lengths: Sequence[int]
    gen_len: int
    num_shared: int = 0
    rows_per_prefix: int = 0
    fewest_per_prefix: int = 0
    most_block_s: float = math.inf

    def part(self, lengths: Sequence[int]) -> "Asked":
        """The same for some of the prompts, a few of those behind each prefix."""
        share = len(lengths) / max(1, len(self.lengths))
        alike = math.ceil(self.rows_per_prefix * share)
        fewest = self.fewest_per_prefix if share == 1 else min(1, alike)
        return self._replace(
            lengths=lengths, rows_per_prefix=alike, fewest_per_prefix=fewest
        )

    @property
    def job(self) -> Job:
        """Of prompts of which each is taken to be as long as the longest."""
        num_prompts = max(1, len(self.lengths))
        is_one = self.rows_per_prefix >= num_prompts
        return Job(
            prompt_len=bucket(max(self.lengths, default=1)),
            gen_len=self.gen_len,
            num_prompts=num_prompts,
            num_shared=self.num_shared,
            rows_per_prefix=0 if is_one else self.rows_per_prefix,
            fewest_per_prefix=0 if is_one else self.fewest_per_prefix,
        )


def asks(
    lengths: Sequence[int],
    gen_len: int,
    groups: Sequence[Group],
    most_block_s: float = math.inf,
) -> list[tuple[Asked, Sequence[int]]]:
    """What is to be planned: prompts that begin like others, and those that do not.

    Args:
        lengths: tokens of each prompt.
        gen_len: tokens to generate for each, at most.
        groups: of all prompts.
        most_block_s: seconds that a block may take.

    Returns:
        What is wanted, and the places of the prompts that it is wanted for.
    """
    found: list[tuple[Asked, Sequence[int]]] = []
    for is_shared in (False, True):
        some = [group for group in groups if (group.num_shared > 0) == is_shared]
        if not some:
            continue
        rows = [len(group.places) for group in some]
        own = [lengths[p] - group.num_shared for group in some for p in group.places]
        asked = Asked(
            own,
            gen_len,
            num_shared=max(group.num_shared for group in some),
            rows_per_prefix=math.ceil(len(own) / len(some)) if len(some) > 1 else 0,
            fewest_per_prefix=min(rows) if len(some) > 1 else 0,
            most_block_s=most_block_s,
        )
        found.append((asked, [place for group in some for place in group.places]))
    return found


def plan_parts(
    allowed: Sequence[tuple[Model, Policy]], hardware: Hardware, asked: Asked
) -> list[Plan]:
    """Plans that follow one another, each for as many prompts as its job says.

    Of all ways to cut the prompts where they, with their new tokens, have become half
    as long (or a fourth, or an eighth), the fastest as predicted, with the time to load
    what each part keeps in memory. Each part is taken to have some prompts of each
    prefix.

    Args:
        allowed: models and policies to choose from, as of `best_plan`.
        hardware: that runs them.
        asked: the longest prompt first; at least one.

    Raises:
        ValueError: not even one prompt fits, or none is done in time.
    """
    lengths, gen_len = asked.lengths, asked.gen_len

    def plan(first: int, last: int) -> Plan:
        some = asked.part(lengths[first:last])
        plan, model = best_plan(
            allowed, hardware, some.job, most_block_s=asked.most_block_s
        )
        prediction = _predicted(plan, model, hardware, lengths=some.lengths)
        return dataclasses.replace(plan, prediction=prediction)

    def seconds(plan: Plan) -> float:
        return plan.prediction.total_s + _load_s(plan, hardware)

    whole = plan(0, len(lengths))
    affordable = MOST_SPENT * whole.prediction.total_s / (SEARCH_S * len(allowed))
    for ratio in RATIOS:
        edges = _edges(lengths, gen_len, ratio)
        if math.comb(len(edges), 2) <= affordable:  # each pair of edges is a part
            break
    else:
        return [whole]
    # From each edge on, the fastest way to the end: a shortest path.
    best: dict[int, tuple[float, list[Plan]]] = {len(lengths): (0.0, [])}
    for place in reversed(range(len(edges) - 1)):
        ways = []
        for last in edges[place + 1 :]:
            is_whole = last - edges[place] == len(lengths)
            try:
                part = whole if is_whole else plan(edges[place], last)
            except ValueError:  # where the whole fits; but other sizes are tried
                continue
            rest_s, rest = best[last]
            ways.append((seconds(part) + rest_s, [part, *rest]))
        best[edges[place]] = min(ways, key=lambda way: way[0], default=(math.inf, []))
    cut_s, cut = best[0]
    return cut if cut_s < (1 - LEAST_GAIN) * seconds(whole) else [whole]


def _edges(lengths: Sequence[int], gen_len: int, ratio: int) -> list[int]:
    """Where a part may begin, and the end: at prompts that take `ratio` times less."""
    edges, most = [0], bucket(lengths[0]) + gen_len
    for place, length in enumerate(lengths):
        slots = bucket(length) + gen_len
        if slots * ratio <= most:
            edges.append(place)
            most = slots
    return [*edges, len(lengths)]


def _predicted(
    plan: Plan, model: Model, hardware: Hardware, *, lengths: Sequence[int]
) -> Prediction:
    """What a plan takes for prompts, of which each batch is padded for itself.

    Only some lengths are predicted, and what is between them is interpolated.
    """
    job = plan.job.under(plan.policy, device_is_host=hardware.device_is_host)
    padded = sorted(_padded(job, plan.policy, lengths), reverse=True)
    last = len(padded) - 1
    nodes = {padded[last * i // (NUM_PREDICTED - 1)] for i in range(NUM_PREDICTED)}
    weighed: list[tuple[float, Prediction]] = []
    for node in sorted(nodes, reverse=True):  # the first batch's first
        shares = np.interp(padded, sorted(nodes), [n == node for n in sorted(nodes)])
        prediction = plan.prediction
        if node != plan.job.prompt_len:
            job = dataclasses.replace(plan.job, prompt_len=node)
            ahead = plan.layers_ahead
            prediction = predict(model, plan.policy, hardware, job, layers_ahead=ahead)
        weighed.append((float(np.mean(shares)), prediction))
    return combined(weighed)


def _padded(job: Job, policy: Policy, lengths: Sequence[int]) -> Iterator[int]:
    """Slots of the padded prompts of all batches.

    Where prompts begin alike in groups, those of one whose lengths are spread as all.
    """
    size, at_once = policy.batch_size, job.num_at_once(policy)
    if alike := job.rows_per_prefix:
        places = range(0, alike, size)
        yield from padded_alike([lengths[i * len(lengths) // alike] for i in places])
        return
    for first in range(0, len(lengths), at_once):
        yield from padded_alike(lengths[first : first + at_once : size])


def _load_s(plan: Plan, hardware: Hardware) -> float:
    """Seconds to read what stays in memory."""
    kept = sum(
        plan.peak.get((tier, Kind.WEIGHTS), 0) for tier in (Tier.DEVICE, Tier.HOST)
    )
    return kept / hardware.disk_read_bytes_per_s
