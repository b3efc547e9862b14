"""Batches are padded for themselves, which changes nothing but what it takes."""

import dataclasses
import itertools

import numpy as np
import pytest

from flexjax import engine as engine_module
from flexjax.checkpoint import open_store
from flexjax.memory import layout, transport
from flexjax.memory.processor import Processor
from flexjax.policy import Placement, Schedule, Tier
from flexjax.schedule.footprint import by_tier
from flexjax.workload import bucket
from tests.cells import every_other
from tests.common import ApartLink
from tests.test_engine import (
    GREEDY,
    PLACEMENTS,
    in_group,
    make_engine,
    make_rows,
    policy_of,
)

PARAMS = dataclasses.replace(GREEDY, max_tokens=6)
NUMBERS = np.random.default_rng(1)
LENGTHS = (3, 70, 40, 9, 100, 1, 65, 30)
PROMPTS = [NUMBERS.integers(4, 90, length).tolist() for length in LENGTHS]


def answers(checkpoint, policy, folder):
    """Tokens and what was seen of each; scores; and the shapes of blocks."""
    engine = make_engine(open_store(checkpoint.store), policy, folder)
    rows, works = make_rows(PROMPTS, PARAMS), []
    run = engine._runner.run

    def seen(work, *rest):
        works.append(work)
        run(work, *rest)

    engine._runner.run = seen
    calls = [lambda: engine.generate(rows)]
    if policy.attention_sparsity == 1:
        calls.append(lambda: scores.extend(engine.score(PROMPTS)))
    scores = []
    for call in calls:
        call()
        needed = by_tier(engine.times.predicted_peak)
        for tier in Tier:
            assert engine.ledger.peak(tier) <= needed[tier], tier
    engine.close()
    pairs = [zip(row.logprobs, row.checker.token_ids, strict=True) for row in rows]
    logprobs = [table[token].logprob for pair in pairs for table, token in pair]
    return [row.checker.token_ids for row in rows], [logprobs, *scores], works


def assert_padding_changes_nothing(checkpoint, policy, folder, monkeypatch, atol=2e-4):
    tokens, seen, works = answers(checkpoint, policy, folder)
    assert [work.prompt_lens for work in works][:1] == [(128, 96, 32, 32)]
    with monkeypatch.context() as patch:
        patch.setattr(layout, "padded_alike", lambda lengths: (bucket(max(lengths)),))
        as_one, seen_as_one, works = answers(checkpoint, policy, folder)
    assert not any(work.prompt_lens for work in works)
    assert tokens == as_one
    for one, other in zip(seen, seen_as_one, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


CELLS = [
    *every_other(itertools.product(PLACEMENTS, [Schedule.ZIGZAG])),
    *every_other(itertools.product(["disk"], [Schedule.ROW_BY_ROW, Schedule.SERIAL])),
]


@pytest.mark.parametrize(
    ("placement", "schedule"), [in_group("padding", *cell) for cell in CELLS]
)
def test_in_any_placement(placement, schedule, golden, tmp_path, monkeypatch):
    policy = policy_of(PLACEMENTS[placement], schedule, (2, 4))
    assert_padding_changes_nothing(golden("opt-pre-ln"), policy, tmp_path, monkeypatch)


HOST = Placement(host=1.0)


@pytest.mark.parametrize(
    ("placement", "is_apart", "changes"),
    every_other(
        [
            ("disk", True, {"attention_sparsity": 0.3}),
            ("host", True, {}),
            ("host", True, {"host_attention": True}),
            ("disk", False, {"attention_sparsity": 0.3}),
            ("disk", True, {"kv_cache_bits": 8, "group_size": 16}),
        ]
    ),
    ids=str,
)
def test_with_any_attention(
    placement, is_apart, changes, golden, tmp_path, monkeypatch
):
    if is_apart:  # the device has memory of its own, as a GPU has
        monkeypatch.setattr(transport, "DeviceLink", ApartLink)
        apart = Processor(is_host=False)
        monkeypatch.setattr(engine_module, "processor_of", lambda device, **_: apart)
    policy = policy_of(PLACEMENTS[placement], Schedule.ZIGZAG, (2, 4))
    policy = dataclasses.replace(policy, **changes)
    atol = 2e-3 if "kv_cache_bits" in changes else 2e-4
    checkpoint = golden("opt-pre-ln")
    assert_padding_changes_nothing(checkpoint, policy, tmp_path, monkeypatch, atol)
