"""Law 1: every cell of placement, schedule and batch shape gives the same tokens."""

import dataclasses
import itertools
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax import blocks, steps, store_format, trace
from flexjax.blocks import Row
from flexjax.checkpoint import open_store
from flexjax.engine import Engine
from flexjax.memory import disk, disk_queue
from flexjax.memory.lanes import Lane
from flexjax.policy import Kind, Placement, Policy, Schedule, Tier, validate
from flexjax.runner import BlockRunner
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from flexjax.schedule.ops import Cache, Hidden
from flexjax.stopping import StopChecker
from flexjax.workload import Workload
from tests.golden_checkpoints import GOLDEN_NAMES, Golden, load_golden

DEVICE, HOST, DISK = Placement(device=1.0), Placement(host=1.0), Placement()
WEIGHTS, CACHE = Placement(device=0.3, host=0.4), Placement(device=0.5, host=0.25)
CACHE_ON_DISK = Placement(device=0.25)
PLACEMENTS = {
    "device": (DEVICE, DEVICE, DEVICE),
    "host": (HOST, HOST, HOST),
    "disk": (DISK, DISK, DISK),
    "mixed, activations on host": (WEIGHTS, CACHE, HOST),
    "mixed, activations on disk": (WEIGHTS, CACHE, DISK),
    "mixed activations": (HOST, CACHE, Placement(device=0.4, host=0.3)),
}
SHAPES = [(1, 1), (2, 3), (5, 1), (3, 2)]
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)


def policy_of(placements, schedule, shape) -> Policy:
    weights, cache, activations = placements
    batch_size, num_batches = shape
    return validate(
        Policy(
            weights=weights,
            kv_cache=cache,
            activations=activations,
            batch_size=batch_size,
            num_batches=num_batches,
            schedule=schedule,
        )
    )


def make_engine(store, policy, folder, **options) -> Engine:
    return Engine(store, policy, offload_dir=folder, device=jax.devices()[0], **options)


def make_rows(prompts, params=GREEDY) -> list[Row]:
    return [
        Row(i, prompt, params, StopChecker(params, eos_token_id=2))
        for i, prompt in enumerate(prompts)
    ]


def record_first_logits(monkeypatch) -> dict[int, np.ndarray]:
    """The logits of every prompt's last position, by the prompt's index."""
    found = {}
    sample = blocks._BatchSampler.sample

    def record(self, logits, step):
        if step == 0:
            for row, values in zip(self.rows, np.asarray(logits), strict=False):
                found[row.index] = values
        return sample(self, logits, step)

    monkeypatch.setattr(blocks._BatchSampler, "sample", record)
    return found


@pytest.fixture
def first_logits(monkeypatch):
    return record_first_logits(monkeypatch)


def check_golden(golden: Golden, policy: Policy, folder, first_logits) -> None:
    engine = make_engine(open_store(golden.store), policy, folder)
    try:
        rows = make_rows(golden.prompts)
        engine.generate(rows)
        for index, row in enumerate(rows):
            assert row.checker.token_ids == golden.greedy_ids[index], index
            np.testing.assert_allclose(
                first_logits[index], golden.prefill_logits[index], atol=2e-4, rtol=0
            )
        needed = by_tier(engine.times.predicted_peak)
        for tier in Tier:
            assert engine.ledger.peak(tier) <= needed[tier], tier
        scores = engine.score(golden.score_ids)
        for found, expected in zip(scores, golden.score_logprobs, strict=True):
            np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
        # Decode equals prefill: what was seen while generating is what scoring says.
        whole = [[*row.prompt, *row.checker.token_ids] for row in rows]
        for row, scored in zip(rows, engine.score(whole), strict=True):
            pairs = zip(row.logprobs, row.checker.token_ids, strict=True)
            seen = [table[token].logprob for table, token in pairs]
            np.testing.assert_allclose(seen, scored[len(row.prompt) - 1 :], atol=2e-4)
    finally:
        engine.close()
    assert list(folder.iterdir()) == []


def in_group(group, *values):
    """Parameters of a test that shares its compilations with its group."""
    return pytest.param(*values, marks=pytest.mark.xdist_group(str(group)))


CELLS = [
    in_group(shape, placement, schedule, shape)
    for placement, schedule, shape in itertools.product(PLACEMENTS, Schedule, SHAPES)
]


@pytest.mark.parametrize(("placement", "schedule", "shape"), CELLS)
def test_every_cell_gives_hugging_faces_answers(
    placement, schedule, shape, golden, tmp_path, first_logits
):
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    check_golden(golden("opt-pre-ln"), policy, tmp_path, first_logits)


@pytest.mark.parametrize("schedule", Schedule)
@pytest.mark.parametrize("shape", [(4, 1), (2, 2)])
def test_a_head_that_travels_in_blocks_gives_the_same_answers(
    schedule, shape, golden, tmp_path, first_logits
):
    with pytest.MonkeyPatch.context() as patch:  # chunks of a few rows
        patch.setattr(store_format, "MIN_CHUNK_BYTES", 4096)
        patch.setattr(store_format, "MAX_CHUNK_BYTES", 8192)
        checkpoint = load_golden("opt-pre-ln", tmp_path / "store")
    policy = policy_of(PLACEMENTS["disk"], schedule, shape)
    engine = make_engine(open_store(checkpoint.store), policy, tmp_path)
    assert engine.weights.layout.head.num_blocks > 2
    engine.close()
    folder = tmp_path / "spill"
    folder.mkdir()
    check_golden(checkpoint, policy, folder, first_logits)


# The other checkpoints go through every placement, schedule and shape, if not through
# every combination.
SOME_CELLS = [
    in_group(name, name, placement, list(Schedule)[i % 3], SHAPES[(i + j) % 4])
    for j, name in enumerate(name for name in GOLDEN_NAMES if name != "opt-pre-ln")
    for i, placement in enumerate(PLACEMENTS)
]


@pytest.mark.parametrize(("name", "placement", "schedule", "shape"), SOME_CELLS)
def test_every_variant_gives_hugging_faces_answers(
    name, placement, schedule, shape, golden, tmp_path, first_logits
):
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    check_golden(golden(name), policy, tmp_path, first_logits)


@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_cache_of_many_segments_and_pieces_gives_the_same_answers(
    golden, tmp_path, first_logits, monkeypatch, schedule
):
    monkeypatch.setattr(disk, "MIN_TAIL_SLOTS", 2)
    monkeypatch.setattr(disk, "MAX_TAIL_SLOTS", 2)
    monkeypatch.setattr(disk, "PASSING_BYTES", 9000)
    monkeypatch.setattr(disk_queue, "REQUEST_BYTES", 5000)
    policy = policy_of((HOST, CACHE_ON_DISK, DISK), schedule, (3, 2))
    check_golden(golden("opt-pre-ln"), policy, tmp_path, first_logits)


@st.composite
def placements(draw) -> Placement:
    device = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1))
    host = draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)) * (1 - device)
    return Placement(device=device, host=host)


@settings(max_examples=8)
@given(
    st.tuples(placements(), placements(), placements()),
    st.sampled_from(list(Schedule)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_random_cells_give_hugging_faces_answers(
    golden, tmp_path_factory, drawn, schedule, shape
):
    with pytest.MonkeyPatch.context() as patch:
        recorder = record_first_logits(patch)
        policy = policy_of(drawn, schedule, shape)
        folder = tmp_path_factory.mktemp("spill")
        check_golden(golden("opt-pre-ln"), policy, folder, recorder)


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


@pytest.mark.parametrize("schedule", list(Schedule))
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
    monkeypatch.setattr("flexjax.engine.free_bytes", lambda *_: free)
    store = open_store(golden("opt-pre-ln").store)
    monkeypatch.setattr(type(store), "read_rows", None)
    policy = policy_of(PLACEMENTS["device"], Schedule.ZIGZAG, (1, 1))
    with pytest.raises(ValueError, match="the policy needs .* on device and host"):
        make_engine(store, policy, tmp_path)


def test_a_run_that_does_not_fit_names_the_tier_and_the_kind(
    golden, tmp_path, monkeypatch
):
    policy = policy_of(PLACEMENTS["disk"], Schedule.ZIGZAG, (3, 2))
    engine = make_engine(open_store(golden("opt-pre-ln").store), policy, tmp_path)
    free = {Tier.DEVICE: 1 << 40, Tier.HOST: 1 << 40, Tier.DISK: 1000}
    monkeypatch.setattr("flexjax.engine.free_bytes", lambda *_: free)
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
        monkeypatch.setattr("flexjax.engine.free_bytes", lambda *_, free=device: free)
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
