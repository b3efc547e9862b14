"""Law 1: all pairs of placement, schedule and batch shape give the same tokens.

With FLEXJAX_ALL_CELLS=1 every cell.
"""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax import blocks, store_format
from flexjax.blocks import Row
from flexjax.checkpoint import open_store
from flexjax.engine import Engine
from flexjax.memory import disk, disk_queue
from flexjax.policy import Placement, Policy, Schedule, Tier, validate
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier
from flexjax.stopping import StopChecker
from tests.cells import RUNS_ALL, covering
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

    def record(self, logits):
        for row, values in zip(self.rows, np.asarray(logits), strict=False):
            if not row.checker.token_ids:
                found[row.index] = values
        return sample(self, logits)

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


CELLS = covering(itertools.product(PLACEMENTS, Schedule, SHAPES))


@pytest.mark.parametrize(
    ("placement", "schedule", "shape"), [in_group(cell[-1], *cell) for cell in CELLS]
)
def test_cells_give_hugging_faces_answers(
    placement, schedule, shape, golden, tmp_path, first_logits
):
    policy = policy_of(PLACEMENTS[placement], schedule, shape)
    check_golden(golden("opt-pre-ln"), policy, tmp_path, first_logits)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [*itertools.product(Schedule, [(4, 1), (2, 2)])]
    if RUNS_ALL
    else [*zip(Schedule, [(4, 1), (2, 2), (2, 2)], strict=True)],
)
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


# The other checkpoints go through one placement each, none through the same.
SOME_CELLS = [
    in_group(name, name, placement, list(Schedule)[i // 2], SHAPES[(i + j) % 4])
    for j, name in enumerate(name for name in GOLDEN_NAMES if name != "opt-pre-ln")
    for i, placement in enumerate(PLACEMENTS)
    if RUNS_ALL or (i + j) % 6 == 0
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


random_cells = given(
    st.tuples(placements(), placements(), placements()),
    st.sampled_from(list(Schedule)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
)


@settings(max_examples=5)
@random_cells
def test_random_cells_give_hugging_faces_answers(
    golden, tmp_path_factory, drawn, schedule, shape
):
    with pytest.MonkeyPatch.context() as patch:
        recorder = record_first_logits(patch)
        policy = policy_of(drawn, schedule, shape)
        folder = tmp_path_factory.mktemp("spill")
        check_golden(golden("opt-pre-ln"), policy, folder, recorder)
