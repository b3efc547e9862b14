"""Prompts of many lengths: cut where that is faster, as predicted, and only there."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.arrangement import Group, blocks_of
from flexjax.memory.most_bytes import most_peak_bytes
from flexjax.memory.processor import Processor
from flexjax.plan import parts
from flexjax.plan.hardware import read_hardware
from flexjax.plan.job import Job
from flexjax.plan.parts import Asked, asks, plan_parts
from flexjax.plan.planner import Found, best_plan, find_model
from flexjax.plan.predict import combined, predict, predict_peak
from flexjax.policy import Placement, Policy
from flexjax.workload import bucket, looking_ahead, padded_alike
from tests.plan.test_closed_form import CONFIG

HARDWARE = read_hardware("t4-208gb")
GEN_LEN = 64
MIXED = [1500] * 20 + [60] * 5000


@pytest.fixture(scope="module")
def allowed():
    return [(find_model("facebook/opt-2.7b", platform="cpu").model(Policy()), Policy())]


@pytest.fixture(scope="module")
def cut(allowed):
    """Plans for `MIXED`."""
    return plan_parts(allowed, HARDWARE, Asked(MIXED, GEN_LEN))


def test_prompts_of_one_length_get_one_plan(allowed):
    job = Job(prompt_len=512, gen_len=GEN_LEN, num_prompts=4000)
    (plan,) = plan_parts(allowed, HARDWARE, Asked([500] * 4000, GEN_LEN))
    assert plan == best_plan(allowed, HARDWARE, job)[0]


def test_a_few_long_prompts_do_not_slow_down_all_others(allowed, cut):
    job = Job(prompt_len=1536, gen_len=GEN_LEN, num_prompts=len(MIXED))
    whole = best_plan(allowed, HARDWARE, job)[0]
    first, second = cut
    assert (first.job.num_prompts, second.job.num_prompts) == (20, 5000)
    assert (first.job.prompt_len, second.job.prompt_len) == (1536, 64)
    under_whole = predict(
        allowed[0][0],
        whole.policy,
        HARDWARE,
        second.job,
        layers_ahead=whole.layers_ahead,
    )
    assert second.prediction.total_s < under_whole.total_s / 2
    assert second == dataclasses.replace(
        best_plan(allowed, HARDWARE, second.job)[0], prediction=second.prediction
    )


def test_no_block_of_a_part_takes_longer_than_it_may(allowed, cut):
    most_s = 0.3 * cut[1].prediction.block_s
    found = plan_parts(allowed, HARDWARE, Asked(MIXED, GEN_LEN, most_block_s=most_s))
    assert sum(plan.job.num_prompts for plan in found) == len(MIXED)
    assert all(plan.prediction.block_s <= most_s for plan in found)
    with pytest.raises(ValueError, match="no block is done within 0.1 s"):
        plan_parts(allowed, HARDWARE, Asked(MIXED[:1], 2, most_block_s=0.1))


def test_a_job_that_is_short_is_not_searched_for_long(allowed, monkeypatch):
    searched = []

    def counted(*args, **options):
        searched.append(args)
        return best_plan(*args, **options)

    monkeypatch.setattr(parts, "best_plan", counted)
    (plan,) = plan_parts(allowed, HARDWARE, Asked([1500, 60, 60], GEN_LEN))
    assert plan.job == Job(prompt_len=1536, gen_len=GEN_LEN, num_prompts=3)
    assert len(searched) == 1


def test_what_is_longer_than_any_memory_is_refused(allowed):
    small = dataclasses.replace(
        HARDWARE, device_memory_bytes=10**8, host_memory_bytes=10**8
    )
    with pytest.raises(ValueError, match="not even one prompt of 2048 tokens fits"):
        plan_parts(allowed, small, Asked([2000, 5, 5], GEN_LEN))


def test_a_plan_is_predicted_for_the_lengths_of_its_batches(allowed):
    lengths = sorted(range(200, 520, 1), reverse=True)
    (plan,) = plan_parts(allowed, HARDWARE, Asked(lengths, GEN_LEN))
    model, size = allowed[0][0], plan.policy.block_size
    assert 1 < size < len(lengths) / 4

    @functools.cache
    def at(length, count):
        job = Job(prompt_len=length, gen_len=GEN_LEN, num_prompts=count)
        return predict(
            model, plan.policy, HARDWARE, job, layers_ahead=plan.layers_ahead
        )

    blocks = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    each = [padded_alike(block[:: plan.policy.batch_size]) for block in blocks]
    exact = combined(
        [
            (1 / len(padded), at(slots, len(block)))
            for block, padded in zip(blocks, each, strict=True)
            for slots in padded
        ]
    )
    assert plan.prediction.total_s == pytest.approx(exact.total_s, rel=0.01)
    assert plan.prediction.num_tokens == pytest.approx(exact.num_tokens, abs=2)
    assert plan.prediction.block_s == pytest.approx(exact.block_s)


@dataclasses.dataclass
class Timed:
    """A plan of which nothing is known but what it takes."""

    job: Job
    total_s: float

    @property
    def prediction(self):
        return self


@given(
    counts=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    powers=st.lists(st.integers(0, 4), min_size=10, max_size=10),
)
def test_no_way_to_cut_is_faster(counts, powers):
    """With times that are drawn: of all ways, the one that takes least."""
    lengths = [
        length
        for length, count in zip((1900, 800, 350, 100), counts, strict=False)
        for _ in range(count)
    ]
    edges = [0, *itertools.accumulate(counts)]
    ranges = list(itertools.combinations(edges, 2))
    times = dict(zip(ranges, powers, strict=False))

    def fake_plan(_allowed, _hardware, job, **_options):
        first = lengths.index(next(n for n in lengths if bucket(n) == job.prompt_len))
        return Timed(job, 2.0 ** times[first, first + job.num_prompts]), None

    assert parts._edges(lengths, 1, 2) == edges
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "best_plan", fake_plan)
        patch.setattr(parts, "_predicted", lambda plan, *_, lengths: plan)
        patch.setattr(parts, "_load_s", lambda *_: 0.0)
        patch.setattr(parts, "SEARCH_S", 1e-9)
        patch.setattr(dataclasses, "replace", lambda plan, prediction: plan)
        found = plan_parts([None], None, Asked(lengths, 1))
    assert sum(plan.job.num_prompts for plan in found) == len(lengths)
    whole_s = 2.0 ** times[0, len(lengths)]
    ways = [
        sum(2.0 ** times[pair] for pair in itertools.pairwise([0, *inner, edges[-1]]))
        for count in range(len(edges) - 1)
        for inner in itertools.combinations(edges[1:-1], count)
    ]
    cut_s = sum(plan.total_s for plan in found)
    assert cut_s == (min(ways) if min(ways) < 0.95 * whole_s else whole_s)


def test_what_begins_like_others_is_asked_for_apart():
    groups = [Group(0, [1, 4]), Group(70, [0, 2, 3]), Group(90, [5, 6])]
    lengths = [100, 10, 110, 120, 20, 200, 190]
    alone, sharing = asks(lengths, 8, groups, 30.0)
    assert alone == (Asked([10, 20], 8, most_block_s=30.0), [1, 4])
    expected = Asked([30, 40, 50, 110, 100], 8, 90, 3, 2, 30.0)
    assert sharing == (expected, [0, 2, 3, 5, 6])
    assert sharing[0].job.rows_per_prefix == 3
    (whole,) = asks(lengths, 8, [Group(9, range(7))])
    assert whole[0].job.rows_per_prefix == 0
    assert asks([], 8, [Group(0, [])]) == [(Asked([], 8), [])]


@given(
    num_groups=st.integers(2, 9),
    each=st.integers(2, 40),
    batch_size=st.integers(1, 30),
    num_batches=st.integers(1, 6),
)
def test_a_job_has_as_many_blocks_as_the_engine_makes_of_it(
    num_groups, each, batch_size, num_batches
):
    policy = Policy(batch_size=min(batch_size, each), num_batches=num_batches)
    count = num_groups * each
    groups = [Group(70, range(n, n + each)) for n in range(0, count, each)]
    ((asked, _),) = asks([100] * count, 8, groups)
    blocks = blocks_of(groups, [100] * count, policy)
    rows = sum(block.batch_size * len(block.batches) for block in blocks)
    assert asked.job.num_rows(policy) == rows
    assert math.ceil(asked.job.num_blocks(policy)) == len(blocks)
    assert asked.job.num_at_once(policy) <= policy.block_size


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=8),
    own=st.sampled_from([10, 30, 60, 100, 300]),
    policy=st.builds(
        Policy,
        kv_cache=st.sampled_from([Placement(device=1.0), Placement(host=0.7)]),
        batch_size=st.integers(1, 10),
        num_batches=st.integers(1, 9),
    ),
)
@settings(deadline=None)
def test_no_block_of_groups_of_any_size_needs_more_than_is_planned(sizes, own, policy):
    ends = list(itertools.accumulate(sizes))
    groups = [Group(70, range(e - n, e)) for n, e in zip(sizes, ends, strict=True)]
    lengths = [70 + own] * ends[-1]
    ((asked, _),) = asks(lengths, 8, groups)
    # As a plan's, which are no larger than groups are on average.
    batch_size = min(policy.batch_size, asked.rows_per_prefix)
    policy = dataclasses.replace(policy, batch_size=batch_size)
    model = Found(CONFIG, np.dtype(np.float16)).model(policy)
    processor = Processor(is_host=False)
    planned = predict_peak(model, policy, asked.job, processor, quickly=True)
    layout = model.layout(policy, processor)
    works = [
        layout.workload(policy, block.shape, prompt_len=own, gen_len=8, num_shared=70)
        for block in blocks_of(groups, lengths, policy)
    ]
    works = [looking_ahead(work) for work in works]
    for key, nbytes in most_peak_bytes(works, policy, layout).items():
        assert nbytes <= planned[key], key


def test_where_attention_cannot_share_a_job_is_of_whole_prompts():
    job = Job(
        prompt_len=64,
        gen_len=8,
        num_prompts=90,
        num_shared=900,
        rows_per_prefix=9,
        fewest_per_prefix=3,
    )
    on_host = Policy(kv_cache=Placement(host=1.0), host_attention=True)
    whole = Job(prompt_len=964, gen_len=8, num_prompts=90)
    assert job.under(on_host, device_is_host=False) == whole
    assert job.under(on_host, device_is_host=True) == job
    assert job.under(Policy(attention_sparsity=0.5), device_is_host=True) == whole


def test_groups_are_predicted_for_batches_of_their_own_rows(allowed):
    """Each has two long rows, and so a long batch."""
    lengths = sorted([*[500] * 16, *[30] * 240], reverse=True)
    job = Job(
        prompt_len=512,
        gen_len=8,
        num_prompts=256,
        num_shared=900,
        rows_per_prefix=32,
        fewest_per_prefix=32,
    )
    policy = Policy(batch_size=32, num_batches=4)
    assert [*parts._padded(job, policy, lengths)] == [512]
    two = dataclasses.replace(policy, batch_size=16)
    assert [*parts._padded(job, two, lengths)] == [512, 32]
    alike = dataclasses.replace(job, rows_per_prefix=0, fewest_per_prefix=0)
    assert [*parts._padded(alike, policy, lengths)] == [512, 32, 32, 32, 32, 32, 32, 32]


def test_a_part_has_a_few_of_each_group():
    asked = Asked([9] * 60, 8, 90, 20, 15)
    assert asked.part([9] * 60) == asked
    assert asked.part([9] * 6) == Asked([9] * 6, 8, 90, 2, 1)
    assert Asked([9] * 4, 8).part([9]) == Asked([9], 8)
