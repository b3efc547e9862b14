"""What holds of every run, whatever its tokens are."""

import dataclasses
import threading
import time
from collections import Counter

import numpy as np
import pytest

from flexjax import steps, trace
from flexjax.checkpoint import open_store
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.memory.device import DeviceStore
from flexjax.memory.lanes import Lane
from flexjax.policy import Kind, Schedule, Tier
from flexjax.runner import BlockRunner
from flexjax.schedule.footprint import by_tier
from flexjax.schedule.ops import Cache, Hidden
from flexjax.stopping import StopChecker
from flexjax.workload import Workload, bucket
from tests.cells import RUNS_ALL
from tests.test_engine import GREEDY, PLACEMENTS, make_engine, make_rows, policy_of


def test_compilations_do_not_grow_with_layers_tokens_or_prompts(golden, tmp_path):
    def compiled() -> int:
        names = ("embed_step", "prefill_step", "decode_step", "final_step", "head_step")
        return sum(getattr(steps, name)._cache_size() for name in names)

    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (2, 2))
    prompts = golden("opt-pre-ln").prompts
    counts = []
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    for repeat, max_tokens in ((1, 6), (1, 8), (5, 8)):
        params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
        engine.generate(make_rows(prompts[:4] * repeat, params))
        counts.append(compiled())
    engine.close()
    assert counts[0] == counts[1] == counts[2]


def test_a_cache_that_a_kernel_attends_to_never_grows(golden, tmp_path, monkeypatch):
    if not DECODE_ATTENTION.is_there():
        pytest.skip("no kernel for this processor, or no compiler")
    rooms = []
    store = DeviceStore.store

    def seen(self, key, value, rows, *, at, slots):
        buffer, _ = key
        if isinstance(buffer, Cache):
            rooms.append((at, slots))
        store(self, key, value, rows, at=at, slots=slots)

    monkeypatch.setattr(DeviceStore, "store", seen)
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (2, 1))
    engine = make_engine(open_store(golden("opt-bf16").store), policy, tmp_path)
    params = dataclasses.replace(GREEDY, max_tokens=80)
    engine.generate(make_rows(golden("opt-bf16").prompts[:2], params))
    engine.close()
    ends = [at for at, _ in rooms]
    assert max(ends) > min(ends) + 64
    assert {slots for _, slots in rooms} == {bucket(max(ends) + 1)}


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_block_ends_when_its_rows_have_ended(golden, tmp_path, schedule):
    checkpoint = golden("opt-pre-ln")
    seen = []
    policy = policy_of(PLACEMENTS["device"], schedule, (3, 2))
    engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
    params = dataclasses.replace(GREEDY, max_tokens=100)
    rows = make_rows(checkpoint.prompts, params)
    for index, row in enumerate(rows):
        stop = checkpoint.greedy_ids[index][2]
        row.params = dataclasses.replace(params, stop_token_ids=(stop,))
        row.checker = StopChecker(row.params, eos_token_id=2)
    take = engine.generate
    take(rows, on_tokens=seen.append)
    engine.close()
    ends = [row.checker.token_ids.index(row.params.stop_token_ids[0]) for row in rows]
    assert [len(row.checker.token_ids) for row in rows] == [end + 1 for end in ends]
    assert sum(seen) == sum(len(row.checker.token_ids) for row in rows)
    assert max(ends) < 99
    times = engine.times
    assert len(times.step_s) == max(ends), "a step for each token but the first"
    assert min(times.step_s) >= 0
    assert sum(times.step_s) == pytest.approx(times.decode.seconds)


@pytest.mark.parametrize("schedule", list(Schedule) if RUNS_ALL else [Schedule.ZIGZAG])
def test_any_number_of_prompts_of_any_length_in_any_shape(golden, tmp_path, schedule):
    checkpoint = golden("opt-bf16")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(4, 515, n).tolist() for n in (1, 70, 33, 2, 64, 9, 31)]
    answers = []
    for shape in ((7, 1), (2, 2), (3, 1), (1, 3)):
        policy = policy_of(PLACEMENTS["mixed activations"], schedule, shape)
        engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
        rows = make_rows(prompts)
        engine.generate(rows)
        engine.close()
        answers.append([row.checker.token_ids for row in rows])
    assert all(answer == answers[0] for answer in answers)


def test_what_does_not_fit_is_refused_before_anything_is_read(
    golden, tmp_path, monkeypatch
):
    free = dict.fromkeys(Tier, 10_000)
    monkeypatch.setattr("flexjax.memory.room.free_bytes", lambda *_: free)
    store = open_store(golden("opt-pre-ln").store)
    monkeypatch.setattr(type(store), "read_rows", None)
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (1, 1))
    with pytest.raises(ValueError, match="the policy needs .* on device and host"):
        make_engine(store, policy, tmp_path)


def test_what_was_freed_is_given_back_before_a_call_is_refused(
    golden, tmp_path, monkeypatch
):
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (2, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    free = dict.fromkeys(Tier, 0)
    monkeypatch.setattr("flexjax.memory.room.free_bytes", lambda *_: free)

    def give_back():
        free.update(dict.fromkeys(Tier, 1 << 40))

    monkeypatch.setattr("flexjax.memory.room.give_back_freed", give_back)
    rows = make_rows(golden("opt-pre-ln").prompts[:2])
    engine.generate(rows)
    assert all(row.has_ended for row in rows)
    engine.close()


def test_a_run_that_does_not_fit_names_the_tier_and_the_kind(
    golden, tmp_path, monkeypatch
):
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (3, 2))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    free = {Tier.DEVICE: 1 << 40, Tier.HOST: 1 << 40, Tier.DISK: 1000}
    monkeypatch.setattr("flexjax.memory.room.free_bytes", lambda *_: free)
    with pytest.raises(ValueError, match="on disk.*kv_cache.*offload_dir"):
        engine.generate(make_rows(golden("opt-pre-ln").prompts))
    engine.close()


def test_memory_is_flat_over_blocks(golden, tmp_path):
    """Nothing grows with the number of prompts: the second block needs no more."""
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (1, 2))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    prompts = golden("opt-pre-ln").prompts
    engine.generate(make_rows(prompts[:2]))
    needed = engine.times.predicted_peak
    engine.generate(make_rows(prompts[:2] * 4))
    assert engine.times.predicted_peak == needed
    for tier, most in by_tier(needed).items():
        assert engine.ledger.peak(tier) <= most
    for kind in (Kind.KV_CACHE, Kind.ACTIVATIONS):
        assert engine.ledger.held(Tier.DISK, kind) == 0
    engine.close()


def watch_works(monkeypatch) -> list[Workload]:
    """The works that engines run from now on."""
    found, run = [], BlockRunner.run

    def watch(self, work, *args):
        found.append(work)
        run(self, work, *args)

    monkeypatch.setattr(BlockRunner, "run", watch)
    return found


def test_weights_are_asked_for_as_far_ahead_as_memory_allows(
    golden, tmp_path, monkeypatch
):
    checkpoint = golden("opt-pre-ln")
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (2, 2))
    engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
    works = watch_works(monkeypatch)
    predicted, answers = {}, []
    plenty = dict.fromkeys(Tier, 1 << 40)
    device = plenty
    for ahead in (2, 1, 0):
        monkeypatch.setattr(
            "flexjax.memory.room.free_bytes", lambda *_, free=device: free
        )
        rows, before = make_rows(checkpoint.prompts[:4]), len(works)
        if ahead == 0:
            with pytest.raises(ValueError, match="the policy needs .* on device and"):
                engine.generate(rows)
            assert len(works) == before
            continue
        engine.generate(rows)
        assert {work.layers_ahead for work in works[before:]} == {ahead}
        answers.append([row.checker.token_ids for row in rows])
        peak = by_tier(engine.times.predicted_peak)
        predicted[ahead] = peak[Tier.DEVICE] + peak[Tier.HOST]
        assert engine.ledger.peak(Tier.DEVICE) <= peak[Tier.DEVICE]
        device = plenty | dict.fromkeys((Tier.DEVICE, Tier.HOST), predicted[ahead] - 1)
    engine.close()
    assert predicted[1] < predicted[2]
    assert answers[0] == answers[1] == checkpoint.greedy_ids[:4]


def test_a_run_is_one_timeline(golden, tmp_path):
    """Every lane that worked has spans, which add up to what was counted."""
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (2, 2))
    store = open_store(golden("opt-pre-ln").store)
    engine = make_engine(store, policy, tmp_path, keeps_spans=True)
    begin_s = time.perf_counter()
    engine.generate(make_rows(golden("opt-pre-ln").prompts))
    end_s = time.perf_counter()
    spans, busy_s = engine.timeline.spans, engine.timeline.busy_s
    # No device has memory of its own here, and nothing is quantized.
    apart = {Lane.PROJECT, Lane.ATTENTION, Lane.TO_DEVICE, Lane.WIDEN}
    assert {span.lane for span in spans} == {*Lane} - apart
    for lane in Lane:
        times = [(span.begin_s, span.end_s) for span in spans if span.lane is lane]
        assert all(begin_s <= first_s <= last_s <= end_s for first_s, last_s in times)
        union_s = trace.busy_s(times, begin_s, end_s)
        assert busy_s[lane] == pytest.approx(union_s)
        if lane is not Lane.DISK:
            together_s = sum(last_s - first_s for first_s, last_s in times)
            assert together_s == pytest.approx(union_s), "one thing at a time"
    moved = sum(
        nbytes for link, nbytes in engine.ledger.moved().items() if Tier.DISK in link
    )
    rows = sum(span.nbytes for span in spans if span.lane is Lane.DISK)
    assert 0 < rows <= moved  # token rows are read without the queue
    names = {span.name for span in spans if span.lane is Lane.DISK}
    assert names >= {"layers.0.fc1.weight", f"({Cache(0, 0)}, 0)", f"({Hidden(1)}, 0)"}
    phases = engine.times.prefill, engine.times.decode
    for lane, seconds in busy_s.items():
        counted = sum(phase.busy_s[lane] for phase in phases)
        assert counted <= seconds + 1e-9
    assert sum((phase.moved for phase in phases), Counter()) == engine.ledger.moved()
    engine.generate(make_rows(golden("opt-pre-ln").prompts[:1]))
    assert min(span.begin_s for span in engine.timeline.spans) > end_s
    engine.close()


def test_close_ends_every_thread(golden, tmp_path):
    policy = policy_of(PLACEMENTS["device"], Schedule.SERIAL, (1, 1))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    engine.generate(make_rows(golden("opt-pre-ln").prompts[:1]))
    engine.close()
    engine.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("flexjax")]
