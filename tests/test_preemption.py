"""Rows that outlive their block go on in another; the answers do not tell which."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.blocks import Row
from flexjax.checkpoint import open_store
from flexjax.llm import LLM
from flexjax.policy import Placement, Policy, Schedule, Tier
from flexjax.preemption import Waiting
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from flexjax.stopping import StopChecker
from tests.test_engine import GREEDY, PLACEMENTS, in_group, make_engine, policy_of

# Rows of a block that end at once, and one that does not.
ENDS = (16, 1, 1, 1)


def new_row(index: int, prompt, max_tokens: int) -> Row:
    params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
    return Row(index, prompt, params, StopChecker(params, eos_token_id=2))


class Blocks:
    """Blocks that take no time, of rows whose numbers of tokens are given."""

    def __init__(self, lifetimes, policy, *, most_slots: int) -> None:
        self.rows = [new_row(i, [7] * (1 + i % 5), n) for i, n in enumerate(lifetimes)]
        self.policy, self.most_slots = policy, most_slots
        self.idle = self.recomputed = 0

    def fits(self, sizes) -> bool:
        slots = max(s.prompt_len for s in sizes) + max(s.max_tokens for s in sizes)
        return len(sizes) * slots <= self.most_slots

    def run(self) -> list[list[Row]]:
        """Every block's rows, in turn."""
        size = self.policy.block_size
        waiting = Waiting(
            itertools.batched(range(len(self.rows)), size),
            lambda places: [self.rows[place] for place in places],
            policy=self.policy,
            fits=self.fits,
        )
        blocks = []
        while rows := waiting.next_block():
            assert len(rows) <= size
            has_begun = [len(row.checker.token_ids) > 0 for row in rows]
            assert all(has_begun) or not any(has_begun)
            if any(has_begun):
                assert len(rows) == 1 or self.fits([row.size for row in rows])
                self.recomputed += sum(row.size.prompt_len for row in rows)
            self._run_block(rows, waiting)
            waiting.preempt(rows)
            blocks.append(rows)
        return blocks

    def _run_block(self, rows, waiting) -> None:
        idle, alive = 0, list(rows)
        while alive:
            for row in alive:
                row.checker.push(5)
            alive = [row for row in rows if not row.has_ended]
            idle += len(rows) - len(alive)
            if waiting.is_worth_preempting(alive, idle):
                break
        self.idle += idle


@given(
    lifetimes=st.lists(st.sampled_from([1, 2, 3, 9, 40, 60]), max_size=60),
    batch_size=st.integers(1, 4),
    num_batches=st.integers(1, 3),
    most_slots=st.sampled_from([1, 100, 200, 10_000]),
)
def test_all_rows_end_and_what_is_recomputed_was_paid_for_by_idle_rows(
    lifetimes, batch_size, num_batches, most_slots
):
    policy = Policy(batch_size=batch_size, num_batches=num_batches)
    run = Blocks(lifetimes, policy, most_slots=most_slots)
    blocks = run.run()
    assert all(row.has_ended for row in run.rows)
    assert {row.index for rows in blocks for row in rows} == set(range(len(lifetimes)))
    assert run.recomputed <= run.idle


def test_a_few_rows_that_live_long_share_a_block_in_the_end():
    lifetimes = [60, 1, 1, 1] * 4
    blocks = Blocks(lifetimes, Policy(batch_size=4), most_slots=10_000).run()
    assert [len(rows) for rows in blocks] == [4] * 5
    assert sorted(row.index for row in blocks[-1]) == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("lifetimes", "policy", "most_slots"),
    [
        ([60, 60, 60, 1], Policy(batch_size=4), 10_000),  # nobody else waits
        ([60, 1, 1, 1] * 4, Policy(batch_size=4), 20),  # no memory for it
        ([9, 9, 9, 9] * 4, Policy(batch_size=4), 10_000),  # nobody is idle
        ([60, 1, 1, 1] * 4, Policy(batch_size=4, attention_sparsity=0.5), 10_000),
        ([60, 1] * 4, Policy(batch_size=4, schedule=Schedule.ROW_BY_ROW), 10_000),
    ],
)
def test_nobody_is_preempted_for_nothing(lifetimes, policy, most_slots):
    run = Blocks(lifetimes, policy, most_slots=most_slots)
    assert len(run.run()) == len(lifetimes) // 4
    assert run.recomputed == 0


CELLS = [
    *((placement, Schedule.ZIGZAG, (2, 2)) for placement in PLACEMENTS),
    ("device", Schedule.ZIGZAG, (4, 1)),
    ("disk", Schedule.ZIGZAG, (1, 4)),
    ("mixed, activations on disk", Schedule.SERIAL, (2, 2)),
]


@pytest.mark.parametrize(
    ("placement", "schedule", "shape"),
    [in_group("preemption", *cell) for cell in CELLS],
)
def test_preempted_rows_get_hugging_faces_tokens(
    placement, schedule, shape, golden, tmp_path
):
    checkpoint = golden("opt-pre-ln")
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
    numbers = [index % len(checkpoint.prompts) for index in range(16)]
    rows = [
        new_row(index, checkpoint.prompts[number], ENDS[index % 4])
        for index, number in enumerate(numbers)
    ]
    engine.generate(rows)
    assert engine.times.num_preemptions > 0
    for row, number in zip(rows, numbers, strict=True):
        count = row.params.max_tokens
        assert row.checker.token_ids == checkpoint.greedy_ids[number][:count]
    needed = by_tier(engine.times.predicted_peak)
    for tier in Tier:
        assert engine.ledger.peak(tier) <= needed[tier], tier
    # What was seen of each token, before and after, is what scoring says.
    for row, scored in zip(
        rows, engine.score([row.tokens for row in rows]), strict=True
    ):
        pairs = zip(row.logprobs, row.checker.token_ids, strict=True)
        seen = [table[token].logprob for table, token in pairs]
        np.testing.assert_allclose(seen, scored[len(row.prompt) - 1 :], atol=2e-4)
    engine.close()
    assert list(tmp_path.iterdir()) == []


ON_DISK = Policy(
    weights=Placement(),
    kv_cache=Placement(device=0.5, host=0.5),
    batch_size=2,
    num_batches=2,
)
WAYS = [
    SamplingParams(temperature=0.9, top_p=0.95),
    SamplingParams(temperature=1.2, seed=7),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(temperature=1.0, stop_token_ids=tuple(range(4, 20))),
]


def answers(llm: LLM, prompts):
    """What comes of prompts of which one of four lives long, each in another way."""
    params = [
        dataclasses.replace(
            WAYS[index % 4],
            max_tokens=16 if index // 4 == index % 4 else 1 + index % 2,
            ignore_eos=True,
            logprobs=1,
        )
        for index in range(16)
    ]
    return [output.outputs[0] for output in llm.generate(prompts, params)]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    "changes",
    [
        in_group("preemption", {}),
        in_group("preemption", {"kv_cache_bits": 8, "group_size": 16}),
        in_group("preemption", {"kv_cache_bits": 4, "group_size": 16}),
        in_group("preemption", {"host_attention": True}),
    ],
    ids=["plain", "cache of 8 bits", "cache of 4 bits", "host attention"],
)
def test_what_comes_of_a_prompt_does_not_depend_on_where_it_waited(
    changes, golden, tmp_path
):
    policy = dataclasses.replace(ON_DISK, **changes)
    checkpoint, found = golden("opt-pre-ln"), []
    prompts = [[*checkpoint.prompts[0][:5], 30 + index] for index in range(16)]
    for num_batches in (2, 8):  # several blocks, or one in which nobody is preempted
        policy = dataclasses.replace(policy, num_batches=num_batches)
        with LLM(checkpoint.store, policy=policy, offload_dir=tmp_path) as llm:
            found.append(answers(llm, prompts))
            assert (llm.metrics["num_preemptions"] > 2) == (num_batches == 2)
    for index, (one, other) in enumerate(zip(*found, strict=True)):
        assert one.token_ids == other.token_ids, index
        assert one.finish_reason == other.finish_reason
        assert one.cumulative_logprob == pytest.approx(
            other.cumulative_logprob, abs=2e-3
        )
