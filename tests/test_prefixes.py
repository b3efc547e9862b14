"""What prompts have in common is computed once a block, and changes nothing."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import settings

from flexjax import engine as engine_module
from flexjax import shared_prefixes
from flexjax.arrangement import Group
from flexjax.checkpoint import open_store
from flexjax.llm import LLM
from flexjax.memory import transport
from flexjax.memory.processor import Processor
from flexjax.plan.job import Job
from flexjax.policy import Placement, Policy, Schedule, Tier
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from tests.cells import RUNS_ALL, every_other
from tests.common import ApartLink
from tests.test_engine import (
    GREEDY,
    PLACEMENTS,
    in_group,
    make_engine,
    make_rows,
    policy_of,
    random_cells,
)

PARAMS = dataclasses.replace(GREEDY, max_tokens=6)
NUM_COMMON = 40
OWN = (1, 30, 7, 2, 19)  # tokens of each prompt behind what all have in common
NUMBERS = np.random.default_rng(0)
COMMON = NUMBERS.integers(4, 90, NUM_COMMON).tolist()
PROMPTS = [COMMON + NUMBERS.integers(4, 90, count).tolist() for count in OWN]
OTHERS = [[9] * 33 + PROMPTS[place][NUM_COMMON:] for place in (1, 3, 4)]
# Of prompts that begin in two ways, and of some that share nothing.
MANY = [PROMPTS[0], OTHERS[0], PROMPTS[1], *OTHERS[1:], *PROMPTS[2:]]
GROUPS = [Group(20, [1, 4, 3]), Group(0, [2, 7]), Group(33, [0, 5, 6])]


def alike(num_common, prompts=PROMPTS):
    return [Group(num_common, range(len(prompts)))]


def run_with(engine, groups, prompts=PROMPTS, params=PARAMS):
    """Tokens and what was seen of each, of prompts that begin alike."""
    rows = make_rows(prompts, params)
    engine.generate_blocks(
        [row.size for row in rows],
        lambda places: [rows[place] for place in places],
        groups=groups,
    )
    needed = by_tier(engine.times.predicted_peak)
    for tier in Tier:
        assert engine.ledger.peak(tier) <= needed[tier], tier
    pairs = [zip(row.logprobs, row.checker.token_ids, strict=True) for row in rows]
    seen = [[table[token].logprob for table, token in of_row] for of_row in pairs]
    return [row.checker.token_ids for row in rows], seen


# Prompts, and the groups that they are run in.
ONE, SEVERAL = (PROMPTS, alike(NUM_COMMON)), (MANY, GROUPS)


def assert_sharing_changes_nothing(
    store, policy, folder, case, *, scores=False, atol=2e-4
) -> int:
    """Returns the tokens that were spared."""
    engine, (prompts, groups) = make_engine(open_store(store), policy, folder), case
    try:
        alone = run_with(engine, (), prompts)
        tokens, seen = run_with(engine, groups, prompts)
        assert tokens == alone[0]
        for one, other in zip(seen, alone[1], strict=True):
            np.testing.assert_allclose(one, other, atol=atol)
        spared = engine.times.num_shared
        if scores:
            assert_scores_are_the_same(engine, prompts, groups)
        return spared
    finally:
        engine.close()
        assert list(folder.iterdir()) == []


def assert_scores_are_the_same(engine, prompts, groups) -> None:
    groups = [
        group._replace(num_shared=max(0, group.num_shared - 1)) for group in groups
    ]
    shared = {}
    alone = [Group(0, [place]) for place in range(len(prompts))]
    engine.score_blocks(prompts, alone, shared.update, groups=groups)
    for place, one in enumerate(engine.score(prompts)):
        assert one.dtype == shared[place].logprobs.dtype
        np.testing.assert_allclose(one, shared[place].logprobs, atol=2e-4)
    needed = by_tier(engine.times.predicted_peak)
    for tier in Tier:
        assert engine.ledger.peak(tier) <= needed[tier], tier


CELLS = [
    *every_other(itertools.product(PLACEMENTS, [Schedule.ZIGZAG], [(2, 2)])),
    *itertools.product(["disk"], [Schedule.SERIAL, Schedule.ROW_BY_ROW], [(2, 2)]),
    ("mixed, activations on disk", Schedule.ROW_BY_ROW, (2, 3)),
]


@pytest.mark.parametrize(
    ("placement", "schedule", "shape"), [in_group("prefixes", *cell) for cell in CELLS]
)
def test_sharing_changes_nothing_in_any_placement(
    placement, schedule, shape, golden, tmp_path
):
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    store = golden("opt-pre-ln").store
    spared = assert_sharing_changes_nothing(
        store, policy, tmp_path, SEVERAL, scores=True
    )
    # Less where a group is in two blocks, each of which computes its prefix.
    assert 33 < spared <= 2 * 20 + 2 * 33


@pytest.mark.parametrize("placement", every_other(["disk", "device"]))
def test_sharing_with_all_changes_nothing(placement, golden, tmp_path):
    policy = policy_of(PLACEMENTS[placement], Schedule.ZIGZAG, (2, 3))
    store = golden("opt-pre-ln").store
    spared = assert_sharing_changes_nothing(store, policy, tmp_path, ONE, scores=True)
    assert spared == 4 * NUM_COMMON


@pytest.mark.parametrize(
    "name", every_other(["opt-post-ln-projected", "opt-gelu-no-bias"])
)
def test_sharing_changes_nothing_in_any_variant(name, golden, tmp_path):
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (2, 2))
    assert_sharing_changes_nothing(golden(name).store, policy, tmp_path, ONE)


@pytest.mark.skipif(not RUNS_ALL, reason="drawn with FLEXJAX_ALL_CELLS=1, some above")
@settings(max_examples=20)
@random_cells
def test_sharing_changes_nothing_in_random_cells(
    golden, tmp_path_factory, drawn, schedule, shape
):
    folder = tmp_path_factory.mktemp("spill")
    policy = policy_of(drawn, schedule, shape)
    assert_sharing_changes_nothing(golden("opt-pre-ln").store, policy, folder, SEVERAL)


@pytest.fixture
def _apart(monkeypatch):
    """The device has memory of its own, as a GPU has."""
    monkeypatch.setattr(transport, "DeviceLink", ApartLink)
    apart = Processor(is_host=False)
    monkeypatch.setattr(engine_module, "processor_of", lambda device, **_: apart)


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize(
    "placement", every_other(["host", "disk", "mixed, activations on disk"])
)
def test_sharing_changes_nothing_on_a_device_with_memory_of_its_own(
    placement, golden, tmp_path
):
    policy = policy_of(PLACEMENTS[placement], Schedule.ZIGZAG, (2, 2))
    store = golden("opt-pre-ln").store
    assert_sharing_changes_nothing(store, policy, tmp_path, SEVERAL)


HOST = Placement(host=1.0)


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache": HOST, "host_attention": True},
        {"attention_sparsity": 0.5},
    ],
    ids=str,
)
def test_where_a_prefix_cannot_be_shared_it_is_a_part_of_every_prompt(
    changes, golden, tmp_path
):
    policy = dataclasses.replace(Policy(batch_size=2, num_batches=2), **changes)
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    assert run_with(engine, ()) == run_with(engine, alike(NUM_COMMON))
    assert run_with(engine, (), MANY) == run_with(engine, GROUPS, MANY)
    assert engine.times.num_shared == 0
    engine.close()


@pytest.mark.parametrize(
    ("bits", "placement"),
    every_other([(4, "mixed, activations on disk"), (8, "host")]),
)
def test_a_prefix_gives_what_it_would_in_a_quantized_cache(
    bits, placement, golden, tmp_path
):
    """So that nothing depends on what other prompts are in the call.

    But for what rounds the other way, where a sum in another order gives another code.
    """
    policy = policy_of(PLACEMENTS[placement], Schedule.ZIGZAG, (2, 2))
    policy = dataclasses.replace(policy, kv_cache_bits=bits, group_size=16)
    store = golden("opt-pre-ln").store
    assert_sharing_changes_nothing(store, policy, tmp_path, SEVERAL, atol=2e-3)


def test_less_is_kept_and_less_is_predicted(golden, tmp_path):
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (5, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    peaks = []
    for num_common in (0, NUM_COMMON):
        run_with(engine, alike(num_common))
        needed = by_tier(engine.times.predicted_peak)[Tier.DEVICE]
        peaks.append((engine.ledger.peak(Tier.DEVICE), needed))
    engine.close()
    (alone, alone_predicted), (shared, shared_predicted) = peaks
    assert shared < alone
    assert shared_predicted < alone_predicted


SHARING = {
    "all alike": alike(NUM_COMMON, range(12)),
    "two groups": [
        Group(NUM_COMMON, [0, 1, 2, 3, 8, 9, 10, 11]),
        Group(33, [4, 5, 6, 7]),
    ],
}


@pytest.mark.parametrize("groups", SHARING.values(), ids=list(SHARING))
def test_preempted_rows_go_on_as_if_they_had_shared_nothing(groups, golden, tmp_path):
    """Behind what all share, or where groups differ each with its whole prompt."""
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (4, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    found = []
    for sharing in ((), groups):
        rows = [
            dataclasses.replace(row, index=index)
            for index, length in enumerate([80, 1, 1, 1] * 3)
            for row in make_rows(
                [PROMPTS[index % 5]], dataclasses.replace(PARAMS, max_tokens=length)
            )
        ]
        engine.generate_blocks(
            [row.size for row in rows],
            lambda places, rows=rows: [rows[place] for place in places],
            groups=sharing,
        )
        assert engine.times.num_preemptions > 0
        needed = by_tier(engine.times.predicted_peak)
        assert engine.ledger.peak(Tier.DEVICE) <= needed[Tier.DEVICE]
        found.append([row.checker.token_ids for row in rows])
    engine.close()
    assert found[0] == found[1]


def test_prompts_that_do_not_begin_alike_are_refused(golden, tmp_path):
    policy = policy_of(PLACEMENTS["host"], Schedule.ZIGZAG, (5, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    prompts = [[COMMON[0] + 1, *PROMPTS[0][1:]], *PROMPTS[1:]]
    with pytest.raises(ValueError, match="to begin with the same 40 tokens and do not"):
        run_with(engine, alike(NUM_COMMON), prompts)
    first, again = (run_with(engine, alike(NUM_COMMON)) for _ in range(2))
    assert first == again
    engine.close()


def test_a_plan_for_prompts_that_share_does_for_those_that_share_less():
    jobs = [
        Job(
            prompt_len=own,
            gen_len=8,
            num_prompts=9,
            num_shared=shared,
            rows_per_prefix=alike,
        )
        for own, shared, alike in (
            (128, 1200, 3),
            (128, 1199, 4),
            (128, 1200, 0),
            (64, 0, 0),
        )
    ]
    first, *others = jobs
    assert all(first.joined(job) == first for job in others)


@pytest.mark.usefixtures("own_cache")
def test_a_model_shares_by_itself_and_says_so(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_prefixes, "LEAST_SHARED", NUM_COMMON)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(golden("opt-pre-ln").store, offload_dir=tmp_path) as llm:
        found = llm.generate(PROMPTS, params)
        assert llm.metrics["num_shared_tokens"] == 4 * NUM_COMMON
        assert f"behind {NUM_COMMON} that all share" in llm.plan.reason
        alone = [llm.generate([prompt], params)[0] for prompt in PROMPTS]
        assert llm.metrics["num_shared_tokens"] == 0
        shared = llm.score(PROMPTS)
        assert llm.metrics["num_shared_tokens"] == 4 * (NUM_COMMON - 1)
        scores = [llm.score([prompt])[0] for prompt in PROMPTS]
        assert llm.metrics["num_shared_tokens"] == 0
    for one, other in zip(shared, scores, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    for one, other in zip(found, alone, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


@pytest.mark.usefixtures("own_cache")
def test_a_model_finds_what_groups_of_prompts_share(golden, tmp_path, monkeypatch):
    """All run under one policy, where it was given or all fits on the device."""
    monkeypatch.setattr(shared_prefixes, "LEAST_SHARED", 30)
    monkeypatch.setattr(shared_prefixes, "LEAST_BATCH", 1)
    monkeypatch.setattr(shared_prefixes, "TOKENS_OF_A_PASS", 1)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    prompts = [*MANY[:-1], [8, 7, 6], [3] * 20]
    num_shared = 2 * 33 + 3 * NUM_COMMON
    store, found = golden("opt-pre-ln").store, []
    for policy in (None, Policy(batch_size=2, num_batches=8)):
        with LLM(store, policy=policy, offload_dir=tmp_path) as llm:
            outputs = llm.generate(prompts, params)
            assert llm.metrics["num_shared_tokens"] == num_shared
            assert "parts" not in llm.metrics
            assert [one.prompt_token_ids for one in outputs] == prompts
            found.append([one.outputs[0].token_ids for one in outputs])
            scores = llm.score(prompts)
            assert llm.metrics["num_shared_tokens"] == num_shared - 5
    with LLM(store, offload_dir=tmp_path) as llm:
        alone = [llm.generate([prompt], params)[0] for prompt in prompts]
        found.append([one.outputs[0].token_ids for one in alone])
        for one, prompt in zip(scores, prompts, strict=True):
            np.testing.assert_allclose(one, llm.score([prompt])[0], atol=2e-4)
    assert found[0] == found[1] == found[2]
