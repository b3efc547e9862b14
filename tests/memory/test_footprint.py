"""Laws of a run's bytes, on weights that are only sizes."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexjax import workload
from flexjax.memory.disk import MAX_TAIL_SLOTS, MOST_PASSING, passing_bytes, tail_slots
from flexjax.memory.footprint import (
    RunFootprint,
    cache_rows,
    condensed,
    hidden_rows,
    run_peak_bytes,
)
from flexjax.memory.head_blocks import HeadBlocks
from flexjax.memory.most_bytes import most_peak_bytes
from flexjax.models.config import OPTConfig
from flexjax.policy import Kind, Placement, Policy, Schedule, Tier
from flexjax.schedule.emit import EMITTERS, always
from flexjax.schedule.footprint import peak_bytes
from flexjax.schedule.ops import Cache, Hidden
from flexjax.workload import Workload
from tests.drawn import until, works

CONFIG = OPTConfig(vocab_size=101, hidden_size=8, num_attention_heads=2, ffn_dim=32)
ON_DISK = Policy(kv_cache=Placement(), activations=Placement())


def weights(work, *, shared=False, home_bytes=1000, part_bytes=10):
    """What a footprint asks of a `WeightLayout`."""
    return SimpleNamespace(
        config=dataclasses.replace(CONFIG, num_hidden_layers=work.num_decoder_layers),
        head=HeadBlocks(num_blocks=work.num_head_blocks, rows=10),
        dtype=np.dtype(np.float16),
        device_is_host=shared,
        token_row_bytes=2 * CONFIG.hidden_size,
        home_bytes=dict.fromkeys(Tier, home_bytes),
        staged_bytes=lambda layer, part: {
            (Tier.DEVICE, Kind.WEIGHTS): part_bytes * (1 + layer)
        },
    )


def footprint(work, policy, *, scores=False, shared=False, skipped=0):
    return RunFootprint(
        work=work,
        policy=policy,
        weights=weights(work, shared=shared),
        scores=scores,
        skipped=skipped,
    )


def peak(work, policy, *, short=False, **options):
    run, skipped = condensed(work) if short else (work, 0)
    sizes = footprint(work, policy, skipped=skipped, **options)
    return peak_bytes(EMITTERS[policy.schedule](run, lambda step, batch: True), sizes)


CORNERS = [Placement(device=1.0), Placement(host=1.0), Placement()]
placements = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: Placement(device=pair[0], host=(1 - pair[0]) * pair[1])
)
policies = st.builds(
    Policy,
    kv_cache=placements,
    activations=placements,
    schedule=st.sampled_from(Schedule),
    kv_cache_bits=st.sampled_from([None, 4, 8]),
)
# A cache that gets new slots with the step before the last that stores one.
GROWING = Workload(num_decoder_layers=1, prompt_len=29, gen_len=6)


@given(work=works(most_tokens=40), policy=policies, shared=st.booleans())
@example(work=GROWING, policy=ON_DISK, shared=False)
def test_the_prefill_and_the_last_steps_alone_have_the_whole_run_s_peak(
    work, policy, shared
):
    short = peak(work, policy, short=True, shared=shared)
    assert short == peak(work, policy, shared=shared)
    assert condensed(work)[0].gen_len <= 5


@given(work=works(most_tokens=70))
def test_a_condensed_run_differs_in_its_length_alone(work):
    short, skipped = condensed(work)
    assert dataclasses.replace(short, gen_len=short.gen_len + skipped) == work
    assert short.gen_len == min(work.gen_len, 5)


@given(work=works(), policy=policies, more=st.integers(1, 70))
def test_more_tokens_never_need_less(work, policy, more):
    """Past the first: where that is all, prefills follow each other row by row."""
    shorter, longer = (
        dataclasses.replace(work, gen_len=work.gen_len + extra)
        for extra in (1, 1 + more)
    )
    assert Counter(peak(shorter, policy)) <= Counter(peak(longer, policy, short=True))


@given(work=works(), corner=st.sampled_from(CORNERS), more=st.integers(1, 8))
def test_more_rows_never_need_less(work, corner, more):
    """Where rows are on one tier, so that none is rounded from one to another."""
    policy = Policy(kv_cache=corner, activations=corner)
    wider = dataclasses.replace(work, batch_size=work.batch_size + more)
    assert Counter(peak(work, policy)) <= Counter(peak(wider, policy))


@given(work=works(), policy=policies, layer=st.integers(0, 3), batch=st.integers(0, 4))
def test_a_batch_s_rows_are_all_somewhere(work, policy, layer, batch):
    for rows in (
        cache_rows(policy, work, Cache(layer, batch)),
        hidden_rows(policy, work, Hidden(batch)),
    ):
        assert sum(rows) == work.batch_size


def test_rows_of_a_cache_are_rounded_over_all_layers_and_batches():
    work = Workload(num_decoder_layers=2, num_batches=2)
    policy = Policy(kv_cache=Placement(device=0.25, host=0.75))
    rows = [
        cache_rows(policy, work, Cache(layer, batch))
        for layer in range(2)
        for batch in range(2)
    ]
    assert sum(row.device for row in rows) == 1
    assert sum(row.host for row in rows) == 3


SHAPE = Workload(num_decoder_layers=1, batch_size=4, prompt_len=32, gen_len=3)
HIDDEN_SLOT = 8 * 2  # hidden_size, float16
CACHE_SLOT = 2 * HIDDEN_SLOT  # key and value
# Bytes of a key by its bits: two heads of 4 elements, each with a scale and a minimum.
KEY_SLOT = {None: HIDDEN_SLOT, 8: 2 * (4 + 4), 4: 2 * (2 + 4)}


def test_a_home_has_room_for_whole_buckets_of_slots():
    sizes = footprint(SHAPE, Policy(kv_cache=Placement(host=1.0)))
    stored = sizes.stored(Cache(0, 0), 0)
    assert stored[Tier.HOST, Kind.KV_CACHE] == 4 * 64 * CACHE_SLOT
    assert not stored[Tier.DEVICE, Kind.KV_CACHE]


def test_a_cache_on_disk_keeps_a_tail_of_slots_in_host_memory():
    """Not yet in the prefill, which is written as a whole."""
    sizes = footprint(SHAPE, Policy(kv_cache=Placement()))
    slots = tail_slots(4 * CACHE_SLOT // 2)
    for step in range(2 * slots + 1):
        stored = sizes.stored(Cache(0, 0), step)
        written = SHAPE.prompt_len + step // slots * slots
        assert stored[Tier.DISK, Kind.KV_CACHE] == 4 * written * CACHE_SLOT
        tail = 4 * slots * CACHE_SLOT if step > 0 else 0
        assert stored.get((Tier.HOST, Kind.KV_CACHE), 0) == tail


@given(work=works(most_tokens=40), policy=policies, shared=st.booleans())
def test_what_is_on_disk_passes_through_host_memory(work, policy, shared):
    """On its way out; and what is behind a prompt, on its way in at the same time."""
    with_disk = footprint(work, policy, scores=True, shared=shared).resident()
    none = Policy(kv_cache=CORNERS[0], activations=CORNERS[0])
    without = footprint(work, none, scores=True, shared=shared).resident()
    slots = max(work.prompt_len, MAX_TAIL_SLOTS)
    longest = {
        Kind.KV_CACHE: (slots * KEY_SLOT[policy.kv_cache_bits], MOST_PASSING),
        Kind.ACTIVATIONS: (work.prompt_len * HIDDEN_SLOT, 1),
    }
    tail = tail_slots(work.batch_size * KEY_SLOT[policy.kv_cache_bits])
    ways = {Kind.KV_CACHE: 1 + (work.gen_len > tail), Kind.ACTIVATIONS: 1}
    for kind, (row_bytes, segments) in longest.items():
        is_spilled = policy.placement(kind).disk > 0
        passing = passing_bytes(work.batch_size, row_bytes, stripes=segments)
        more = Counter(with_disk)[Tier.HOST, kind] - Counter(without)[Tier.HOST, kind]
        assert more == (ways[kind] * passing if is_spilled else 0)


@pytest.mark.parametrize(
    ("placement", "shared", "device", "host"),
    [
        (Placement(device=1.0), False, 0, 0),
        (Placement(host=1.0), False, 4, 0),
        (Placement(), False, 4, 4),
        (Placement(device=0.5, host=0.25), False, 2, 1),
        (Placement(host=1.0), True, 0, 0),  # looked at in place
        (Placement(), True, 4, 0),
    ],
)
def test_a_load_needs_room_for_what_is_not_there_yet(placement, shared, device, host):
    sizes = footprint(SHAPE, Policy(kv_cache=placement), shared=shared)
    loaded = Counter(sizes.loaded(Cache(0, 0), 1))
    row = 64 * CACHE_SLOT
    assert loaded[Tier.DEVICE, Kind.KV_CACHE] == device * row
    assert loaded[Tier.HOST, Kind.KV_CACHE] == host * row


@given(work=works(most_tokens=40))
@example(work=GROWING)
def test_a_step_has_room_for_what_the_steps_before_stored(work):
    sizes = footprint(work, ON_DISK)
    slot_bytes = work.batch_size * sizes.cache_slot_bytes
    for step in range(1, work.gen_len):
        stored = sizes.stored(Cache(0, 0), step - 1)
        on_disk = stored[Tier.DISK, Kind.KV_CACHE]
        kept = on_disk + stored.get((Tier.HOST, Kind.KV_CACHE), 0)
        loaded = sizes.loaded(Cache(0, 0), step)[Tier.DEVICE, Kind.KV_CACHE]
        assert on_disk <= work.past_len(step, 0) * slot_bytes <= min(kept, loaded)


def test_logits_wait_for_the_last_block_of_the_vocabulary():
    work = Workload(num_decoder_layers=1, num_batches=3, batch_size=4)
    logits = 4 * 4 * CONFIG.vocab_size
    key = Tier.DEVICE, Kind.ACTIVATIONS
    assert footprint(work, Policy()).resident()[key] == logits
    blocks = dataclasses.replace(work, num_head_blocks=2)
    assert footprint(blocks, Policy()).resident()[key] == 3 * logits
    assert key not in footprint(blocks, Policy(), scores=True).resident()


@given(
    work=works(),
    policy=policies,
    shared=st.booleans(),
    others=st.lists(st.tuples(st.booleans(), st.sets(st.integers(1, 4))), max_size=3),
    prefill_tokens=st.sampled_from([16, 100, 1024]),
)
@settings(max_examples=50)
def test_many_blocks_are_sized_by_one_that_needs_as_much(
    work, policy, shared, others, prefill_tokens
):
    """Which may be padded or begin otherwise."""
    several = [work]
    for is_longest, firsts in others:
        prefix_ends = {*(end for end in firsts if end < work.num_batches)}
        prefix_ends = (*sorted(prefix_ends), work.num_batches)
        several.append(
            dataclasses.replace(
                work,
                prompt_lens=() if is_longest else work.prompt_lens,
                prefix_ends=prefix_ends if work.prefix_len else (),
            )
        )
    with pytest.MonkeyPatch.context() as patch:
        # Few tokens at a time, so that shorter prompts are worked on in larger groups.
        patch.setattr(workload, "PREFILL_TOKENS", prefill_tokens)
        layout = weights(work, shared=shared)
        most = most_peak_bytes(several, policy, layout)
        for each in several:
            sizes = RunFootprint(work=each, policy=policy, weights=layout, scores=False)
            emit = EMITTERS[policy.schedule]
            for key, nbytes in peak_bytes(emit(each, always), sizes).items():
                assert nbytes <= most[key], key
        if len(set(several)) == 1 and not work.prompt_lens:
            assert most == run_peak_bytes(work, policy, layout)


def test_two_long_batches_may_follow_one_another_when_a_short_one_has_ended():
    work = Workload(
        num_decoder_layers=2,
        num_batches=4,
        prompt_len=512,
        prompt_lens=(512, 32, 512, 32),
        prefix_len=32,
        prefix_ends=(2, 4),
        gen_len=6,
    )
    policy = Policy(kv_cache=Placement(), batch_size=1, num_batches=4)
    sizes = RunFootprint(work=work, policy=policy, weights=weights(work), scores=False)
    caches, ops = (Tier.DEVICE, Kind.KV_CACHE), EMITTERS[policy.schedule]
    ended = peak_bytes(ops(work, until([6, 2, 6, 2])), sizes)[caches]
    assert ended > peak_bytes(ops(work, always), sizes)[caches]
    assert ended <= most_peak_bytes([work], policy, sizes.weights)[caches]
