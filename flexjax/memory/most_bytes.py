"""What the blocks of a call need at the most, without sizing each of them."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable

from flexjax.memory.footprint import RunFootprint, run_peak_bytes
from flexjax.memory.layout import WeightLayout
from flexjax.policy import Kind, Policy, Schedule, Tier
from flexjax.schedule.ops import Cell
from flexjax.workload import Workload


def most_peak_bytes(
    works: Iterable[Workload],
    policy: Policy,
    weights: WeightLayout,
    *,
    scores: bool = False,
) -> Counter[tuple[Tier, Kind]]:
    """Bytes that no run of these exceeds, by tier and kind, whoever ends early.

    Those that differ only in how their batches are padded, and in which of them begin
    alike, are as good as one whose batches are all as long as the longest, and which
    has as many prefixes as any of them, and one more: there may be thousands of them,
    and to size one takes up to seconds.
    """
    alike: defaultdict[Workload, set[Workload]] = defaultdict(set)
    for work in works:
        plain = dataclasses.replace(work, prompt_lens=())
        # There it depends on a prefix's batches whether it is stored.
        if policy.schedule is not Schedule.ROW_BY_ROW:
            plain = dataclasses.replace(plain, prefix_ends=())
        alike[plain].add(work)
    most: Counter[tuple[Tier, Kind]] = Counter()
    for plain, several in alike.items():
        work = next(iter(several))
        # Of batches padded otherwise, any two follow one another once those between
        # them have ended.
        if len(several) == 1 and not work.prompt_lens:
            most |= Counter(run_peak_bytes(work, policy, weights, scores=scores))
            continue
        num_prefixes = max(len(work.prefix_ends) for work in several)
        begin_alike = len({work.prefix_ends for work in several}) == 1
        # One prefix more makes up for where in the block its batches change it.
        cover = work if begin_alike else plain.behind(num_prefixes + 1)
        cover = dataclasses.replace(cover, prompt_lens=())
        peak = Counter(run_peak_bytes(cover, policy, weights, scores=scores))
        sizes = RunFootprint(work=cover, policy=policy, weights=weights, scores=scores)
        lengths = {length for work in several for length in work.prompt_lens}
        most |= peak + _beyond(sizes, lengths)
    return most


def _beyond(sizes: RunFootprint, lengths: Iterable[int]) -> Counter[tuple[Tier, Kind]]:
    """What a prefill of shorter prompts needs beside it, more than one of the longest.

    It may be in larger groups of rows.
    """
    workspace = Counter(sizes.workspace(Cell(0, 0, 0)))
    most: Counter[tuple[Tier, Kind]] = Counter()
    for length in lengths:
        work = dataclasses.replace(sizes.work, prompt_len=length)
        shorter = dataclasses.replace(sizes, work=work).workspace(Cell(0, 0, 0))
        most |= Counter(shorter) - workspace
    return most
