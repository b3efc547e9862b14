"""Rows that outlive their block go on in another; the answers do not tell which."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.arrangement import one_block, shape_of
from flexjax.blocks import Row
from flexjax.checkpoint import open_store
from flexjax.engine import Engine
from flexjax.llm import LLM
from flexjax.policy import Placement, Policy, Schedule, Tier
from flexjax.preemption import Waiting
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from flexjax.stopping import StopChecker
from flexjax.workload import looking_ahead
from tests.cells import RUNS_ALL, every_other
from tests.test_engine import GREEDY, PLACEMENTS, in_group, make_engine, policy_of

# Rows of a block that end at once, and one that does not.
ENDS = (16, *[1] * 7)


def new_row(index: int, prompt, max_tokens: int) -> Row:
    params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
    return Row(index, prompt, params, StopChecker(params, eos_token_id=2))


ROW_BY_ROW = Policy(batch_size=4, schedule=Schedule.ROW_BY_ROW)


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
            [
                one_block(places, self.policy)
                for places in itertools.batched(range(len(self.rows)), size)
            ],
            lambda places: [self.rows[place] for place in places],
            policy=self.policy,
            fits=self.fits,
        )
        blocks = []
        while block := waiting.next_block():
            rows = block.rows
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
            if waiting.is_worth_preempting(rows, idle):
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


@given(num_rows=st.integers(1, 200), most_rows=st.integers(0, 200))
def test_blocks_of_preempted_rows_have_few_sizes(num_rows, most_rows):
    policy = Policy(batch_size=48, num_batches=3)
    waiting = Waiting(
        [], lambda places: [], policy=policy, fits=lambda sizes: len(sizes) <= most_rows
    )
    rows = [new_row(index, [7], 9) for index in range(num_rows)]
    for row in rows:
        row.checker.push(5)
    assert waiting.preempt(rows) == num_rows
    found = []
    while block := waiting.next_block():
        rows = block.rows
        assert len(rows) <= max(1, most_rows)
        found += rows
        is_all = len(found) == num_rows
        assert is_all or len(rows) % 6 == 0 or most_rows < 6
    assert {row.index for row in found} == set(range(num_rows))


@pytest.mark.parametrize(
    ("lifetimes", "policy", "most_slots"),
    [
        ([60, 1, 1, 1], Policy(batch_size=4), 10_000),  # nobody else waits
        ([60, 1, 1, 1] * 4, Policy(batch_size=4), 20),  # no memory for it
        ([60, 60, 60, 60] * 4, Policy(batch_size=4), 10_000),  # nobody is idle
        ([60, 1, 1, 1] * 4, Policy(batch_size=4, attention_sparsity=0.5), 10_000),
        ([60, 1, 1, 1] * 4, ROW_BY_ROW, 10_000),
        ([12, 1, 1, 1] * 4, Policy(batch_size=4), 10_000),  # hardly anything is to come
    ],
)
def test_nobody_is_preempted_for_nothing(lifetimes, policy, most_slots):
    run = Blocks(lifetimes, policy, most_slots=most_slots)
    assert len(run.run()) == len(lifetimes) // 4
    assert run.recomputed == 0


CELLS = [
    *((placement, Schedule.ZIGZAG, (4, 2)) for placement in PLACEMENTS),
    ("device", Schedule.ZIGZAG, (8, 1)),
    ("disk", Schedule.ZIGZAG, (2, 4)),
    ("mixed, activations on disk", Schedule.SERIAL, (4, 2)),
]


@pytest.mark.parametrize(
    ("placement", "schedule", "shape"),
    [in_group("preemption", *cell) for cell in every_other(CELLS)],
)
def test_preempted_rows_get_hugging_faces_tokens(
    placement, schedule, shape, golden, tmp_path
):
    checkpoint = golden("opt-pre-ln")
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
    numbers = [index % len(checkpoint.prompts) for index in range(24)]
    rows = [
        new_row(index, checkpoint.prompts[number], ENDS[index % 8])
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


@pytest.mark.parametrize("is_tight", [False, True])
def test_preempted_rows_take_no_more_memory_than_was_there(
    is_tight, golden, tmp_path, monkeypatch
):
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (8, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    rows = [new_row(i, [7] * 30, 80 if i % 8 < 2 else 1) for i in range(40)]
    first = looking_ahead(
        engine.weights.layout.workload(
            policy, shape_of(policy, 8), prompt_len=30, gen_len=80
        )
    )
    needed = engine.predict(first, scores=False)
    most_bytes = sum(needed.values())
    if is_tight:
        held = sum(engine.ledger.held(*key) for key in needed)
        free = dict.fromkeys(Tier, most_bytes - held)
        monkeypatch.setattr("flexjax.memory.room.free_bytes", lambda *_: free)
    sizes = []
    run = engine._runner.run

    def watched(work, *args):
        sizes.append((work.batch_size, work.prompt_len))
        run(work, *args)

    monkeypatch.setattr(engine._runner, "run", watched)
    engine.generate(rows)
    assert engine.times.num_preemptions >= 8
    assert sizes.count((8, 32)) == 5, "of rows that were not preempted"
    assert sizes.count((8, 64)) == (0 if is_tight else 1), "of those that were"
    if is_tight:
        assert sum(map(engine.ledger.peak, Tier)) <= most_bytes
    engine.close()


def test_every_output_is_given_away_once_and_every_token_told(golden, tmp_path):
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (8, 1))
    checkpoint, given, told = golden("opt-pre-ln"), [], []
    params = [dataclasses.replace(GREEDY, max_tokens=ENDS[i % 8]) for i in range(24)]
    with LLM(checkpoint.store, policy=policy, offload_dir=tmp_path) as llm:
        llm.generate_each(
            [[7, 8, 9]] * 24, params, on_outputs=given.append, on_tokens=told.append
        )
        metrics = llm.metrics
    assert metrics["num_preemptions"] == 3
    assert [len(outputs) for outputs in given] == [7, 7, 7, 3]
    outputs = {index: one for block in given for index, one in block.items()}
    assert sorted(outputs) == list(range(24))
    for index, output in outputs.items():
        assert len(output.outputs[0].token_ids) == params[index].max_tokens
        assert len(output.outputs[0].logprobs) == params[index].max_tokens
    assert sum(told) == metrics["num_tokens"] == sum(p.max_tokens for p in params)


def test_nobody_is_preempted_where_that_is_not_wanted(golden, tmp_path):
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (8, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    rows = [new_row(index, [7, 8, 9], ENDS[index % 8]) for index in range(24)]
    ended = []
    engine.generate_blocks(
        [row.size for row in rows],
        lambda places: [rows[place] for place in places],
        on_rows=lambda rows: ended.append(len(rows)),
        may_preempt=False,
    )
    engine.close()
    assert ended == [8, 8, 8]
    assert engine.times.num_preemptions == 0


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("latency_s", [math.inf, 3600.0])
def test_where_the_time_of_a_block_is_bounded_nobody_is_preempted(
    latency_s, golden, tmp_path, monkeypatch
):
    asked = []
    run = Engine.generate_blocks

    def watched(self, *args, may_preempt, **options):
        asked.append(may_preempt)
        run(self, *args, may_preempt=may_preempt, **options)

    monkeypatch.setattr(Engine, "generate_blocks", watched)
    with LLM(golden("opt-pre-ln").store, offload_dir=tmp_path) as llm:
        llm.generate_each(
            [[7, 8]], GREEDY, on_outputs=lambda _: None, block_latency_s=latency_s
        )
    assert asked == [latency_s == math.inf]


ON_DISK = Policy(
    weights=Placement(),
    kv_cache=Placement(device=0.5, host=0.5),
    batch_size=4,
    num_batches=2,
)
WAYS = [
    SamplingParams(temperature=0.9, top_p=0.95),
    SamplingParams(temperature=1.2, seed=7),
    SamplingParams(temperature=0.0, repetition_penalty=1.5),
    SamplingParams(temperature=1.0, stop_token_ids=tuple(range(4, 20))),
]


def answers(llm: LLM, prompts):
    """What comes of prompts of which one of eight lives long, each in another way."""
    params = [
        dataclasses.replace(
            WAYS[index % 4],
            max_tokens=16 if index // 8 == index % 8 else 1 + index % 2,
            ignore_eos=True,
            logprobs=1,
        )
        for index in range(32)
    ]
    return [output.outputs[0] for output in llm.generate(prompts, params)]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    "changes",
    [
        in_group("preemption", {}),
        in_group("preemption", {"kv_cache_bits": 8, "group_size": 16}),
        in_group("preemption", {"host_attention": True}),
    ]
    + [in_group("preemption", {"kv_cache_bits": 4, "group_size": 16})] * RUNS_ALL,
    ids=str,
)
def test_what_comes_of_a_prompt_does_not_depend_on_where_it_waited(
    changes, golden, tmp_path
):
    policy = dataclasses.replace(ON_DISK, **changes)
    checkpoint, found = golden("opt-pre-ln"), []
    prompts = [[*checkpoint.prompts[0][:5], 30 + index] for index in range(32)]
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
