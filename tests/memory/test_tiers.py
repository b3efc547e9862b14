"""One law for the three stores: what was stored is what a load brings."""

import itertools
import pathlib
import tempfile
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.extents import BLOCK_BYTES, Extent, write_extent
from flexjax.memory import disk
from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore, passing_bytes, tail_slots
from flexjax.memory.disk_queue import DiskQueue
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Timeline
from flexjax.memory.ledger import Ledger
from flexjax.memory.tier import TierStore
from flexjax.policy import Kind, Tier
from flexjax.workload import bucket
from tests.common import (
    LINKS,
    ApartLink,
    assert_nothing_held,
    files,
    in_time,
    poison_buffers,
)

DEVICE = jax.devices()[0]
KIND = Kind.KV_CACHE
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SMALL_BYTES = 800  # splits the few rows of these tests into several pieces
BATCH, WIDTH = 5, 4

STORES = {
    f"{tier.value}, {link.__name__}": (tier, link)
    for tier, link in itertools.product(Tier, LINKS)
    if tier is not Tier.DEVICE or link is LINKS[0]  # that one uses no link
}


@pytest.fixture(scope="module")
def queue():
    """The threads that every disk store of this module uses."""
    queue = DiskQueue(Timeline())
    yield queue
    in_time(queue.close)


def make_store(tier: Tier, link_type, queue, folder) -> tuple[TierStore, Ledger]:
    ledger = Ledger()
    link = link_type(DEVICE, ledger)
    if tier is Tier.DEVICE:
        return DeviceStore(ledger, KIND), ledger
    if tier is Tier.HOST:
        return HostStore(ledger, KIND, link), ledger
    return DiskStore(ledger, KIND, link, queue, folder), ledger


class Begin(NamedTuple):
    key: int
    groups: int
    seq: int
    spare: int  # slots beyond the bucket
    whole: bool  # exactly as many slots as there are values


class Append(NamedTuple):
    key: int
    count: int


class Load(NamedTuple):
    key: int


class Free(NamedTuple):
    key: int


KEYS = st.integers(0, 1)
CALLS = st.lists(
    st.builds(
        Begin,
        KEYS,
        groups=st.integers(1, 2),
        seq=st.sampled_from([1, 31, 32, 33, 64]),
        spare=st.sampled_from([0, 32]),
        whole=st.booleans(),
    )
    | st.builds(Append, KEYS, count=st.sampled_from([1, 2, 31, 40]))
    | st.builds(Load, KEYS)
    | st.builds(Free, KEYS),
    max_size=12,
)


class Model:
    """What a store should hold; makes the values that go in."""

    def __init__(self, store: TierStore, dtype: np.dtype, rows: slice) -> None:
        self.store, self.dtype, self.rows = store, dtype, rows
        self.random = np.random.default_rng(0)
        self.held: dict[int, np.ndarray] = {}
        self.slots: dict[int, int] = {}

    def values(self, groups: int, seq: int) -> np.ndarray:
        shape = (BATCH, groups, seq, WIDTH)
        return self.random.standard_normal(shape, np.float32).astype(self.dtype)

    def begin(self, call: Begin) -> None:
        value = self.values(call.groups, call.seq)
        slots = call.seq if call.whole else bucket(call.seq + 1) + call.spare
        self.write(call.key, value, 0, slots)
        self.held[call.key] = value[self.rows]

    def append(self, call: Append) -> None:
        for _ in range(call.count):
            old = self.held[call.key]
            value = self.values(old.shape[1], 1)
            used = old.shape[2]
            slots = max(self.slots[call.key], bucket(used + 1))
            self.write(call.key, value, used, slots)
            self.held[call.key] = np.concatenate([old, value[self.rows]], axis=2)

    def write(self, key: int, value: np.ndarray, at: int, slots: int) -> None:
        array = jax.device_put(value.copy(), DEVICE)
        self.store.store(key, array, self.rows, at=at, slots=slots)
        self.slots[key] = slots

    def check(self, call: Load) -> None:
        loans, expected = self.store.load(call.key)(), self.held[call.key]
        found = np.concatenate([np.asarray(loan.array) for loan in loans], axis=2)
        used = expected.shape[2]
        assert found.dtype == self.dtype
        assert found.shape == (*expected.shape[:2], self.slots[call.key], WIDTH)
        assert found[:, :, :used].tobytes() == expected.tobytes()
        assert np.isfinite(found[:, :, used:].astype(np.float32)).all()
        for loan in loans:
            loan.release()

    def free(self, call: Free) -> None:
        self.store.free(call.key)
        self.held.pop(call.key, None)

    def run(self, call) -> None:
        if isinstance(call, Begin):
            self.begin(call)
        elif isinstance(call, Free):
            self.free(call)
        elif call.key in self.held:
            (self.append if isinstance(call, Append) else self.check)(call)


@pytest.mark.parametrize("piece_bytes", [disk.PASSING_BYTES, SMALL_BYTES])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", STORES)
@settings(max_examples=12)
@given(calls=CALLS, rows=st.sampled_from([slice(0, BATCH), slice(1, 4)]))
def test_a_load_brings_exactly_what_was_stored(
    queue, name, dtype, piece_bytes, calls, rows
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cut_small(patch, piece_bytes)
        poison_buffers(patch)
        store, ledger = make_store(*STORES[name], queue, pathlib.Path(folder))
        model = Model(store, dtype, rows)
        for call in calls:
            model.run(call)
        for key in list(model.held):
            model.check(Load(key))
            model.free(Free(key))
        store.clear()
        assert_nothing_held(ledger)
        assert list(files(pathlib.Path(folder))) == []


def cut_small(patch: pytest.MonkeyPatch, nbytes: int) -> None:
    patch.setattr(disk, "PASSING_BYTES", nbytes)
    patch.setattr(disk, "TAIL_BYTES", nbytes)


@pytest.fixture
def written(monkeypatch):
    """Everything that is written to disk, in pieces that are small."""
    cut_small(monkeypatch, SMALL_BYTES)
    found: list[Extent] = []

    def write(extent: Extent) -> None:
        write_extent(extent)
        found.append(extent._replace(memory=extent.memory.copy()))

    monkeypatch.setattr(disk, "write_extent", write)
    return found


def test_a_stripe_on_disk_is_written_once(queue, tmp_path, written):
    """Nothing is written again, and a token costs disk only when the tail is full."""
    store, ledger = make_store(Tier.DISK, LINKS[0], queue, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    slot_bytes = model.values(2, 1).nbytes
    tail, prompt_len = tail_slots(slot_bytes), 35
    model.begin(Begin(0, groups=2, seq=prompt_len, spare=0, whole=False))
    for used in range(prompt_len, 120):
        flushed = prompt_len + (used - prompt_len) // tail * tail
        assert ledger.held(Tier.DISK, KIND) == flushed * slot_bytes
        assert ledger.moved().get((Tier.HOST, Tier.DISK), 0) == flushed * slot_bytes
        assert sum(extent.memory.nbytes for extent in written) == flushed * slot_bytes
        model.append(Append(0, count=1))
    (path,) = files(tmp_path)
    end = 0
    for extent in sorted(written, key=lambda extent: extent.offset):
        assert extent.path == path
        assert extent.offset >= end, "two writes meet"
        end = extent.offset + extent.memory.nbytes
        found = path.read_bytes()[extent.offset : end]
        assert found == extent.memory.tobytes()
    model.check(Load(0))


def test_a_prefill_is_one_stripe_in_passages_of_whole_rows(queue, tmp_path, written):
    store, _ = make_store(Tier.DISK, LINKS[0], queue, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    model.begin(Begin(0, groups=1, seq=20, spare=0, whole=False))
    row_bytes = 20 * WIDTH * 4
    in_order = sorted(written, key=lambda extent: extent.offset)
    rows = [extent.memory.nbytes / row_bytes for extent in in_order]
    assert rows == [2, 2, 1]
    assert [extent.offset // row_bytes for extent in in_order] == [0, 2, 4]


def test_every_stripe_begins_at_a_block(queue, tmp_path, written):
    """So that direct I/O can move it."""
    store, _ = make_store(Tier.DISK, LINKS[0], queue, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    model.begin(Begin(0, groups=1, seq=33, spare=0, whole=False))
    firsts = {min(extent.offset for extent in written)}
    for _ in range(5):
        written.clear()
        model.append(Append(0, count=8 if len(firsts) > 1 else 32))
        firsts |= {min((e.offset for e in written), default=0)}
    assert len(firsts) > 2
    assert all(first % BLOCK_BYTES == 0 for first in firsts)


@settings(max_examples=60)
@given(
    rows=st.integers(1, BATCH),
    seq=st.sampled_from([1, 32, 64, 70]),
    appended=st.sampled_from([0, 1, 32, 96]),
    piece_bytes=st.sampled_from([100, 700, 1500, 5000, disk.PASSING_BYTES]),
)
def test_what_passes_through_buffers_is_never_more_than_was_said(
    queue, tmp_path_factory, rows, seq, appended, piece_bytes
):
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch, piece_bytes)
        folder = tmp_path_factory.mktemp("spill")
        store, ledger = make_store(Tier.DISK, LINKS[0], queue, folder)
        model = Model(store, FLOAT32, slice(0, rows))
        model.begin(Begin(0, groups=1, seq=seq, spare=0, whole=False))
        model.append(Append(0, count=appended))
        model.check(Load(0))
        row_slot_bytes = WIDTH * 4
        tail = tail_slots(rows * row_slot_bytes) * rows * row_slot_bytes
        longest = max(seq, disk.MAX_TAIL_SLOTS) * row_slot_bytes
        most = disk.MOST_PASSING if appended else 1
        passing = passing_bytes(rows, longest, stripes=most)
        assert ledger.peak(Tier.HOST) <= passing + (tail if appended else 0)
        store.free(0)
        store.clear()
        assert_nothing_held(ledger)


def test_no_tail_is_large_and_few_are_small():
    for slot_bytes in (1, 1000, 300_000, 1 << 20, 1 << 30):
        slots = tail_slots(slot_bytes)
        assert disk.MIN_TAIL_SLOTS <= slots <= disk.MAX_TAIL_SLOTS
        assert 32 % slots == 0, "a bucket of slots is whole tails"
        if slots > disk.MIN_TAIL_SLOTS:
            assert slots * slot_bytes <= disk.TAIL_BYTES


@pytest.mark.parametrize("link_type", LINKS)
def test_a_read_that_fails_names_the_array_and_gives_its_buffer_back(
    queue, link_type, tmp_path
):
    store, ledger = make_store(Tier.DISK, link_type, queue, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    model.begin(Begin(0, groups=1, seq=40, spare=0, whole=False))
    model.begin(Begin(1, groups=1, seq=40, spare=0, whole=False))
    (tmp_path / f"{KIND.value}-1").unlink()
    with pytest.raises(OSError, match=f"^0 could not be read in {tmp_path}: .*disk"):
        store.load(0)()
    model.check(Load(1))
    store.free(0)
    store.free(1)
    store.clear()
    assert_nothing_held(ledger)


def test_a_write_that_fails_names_the_array_and_counts_nothing(queue, tmp_path):
    store, ledger = make_store(Tier.DISK, LINKS[0], queue, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    (tmp_path / f"{KIND.value}-1").mkdir()  # in the way
    with pytest.raises(OSError, match=f"^0 could not be written in {tmp_path}: .*disk"):
        model.begin(Begin(0, groups=1, seq=40, spare=0, whole=False))
    (tmp_path / f"{KIND.value}-1").rmdir()
    store.free(0)
    store.clear()
    assert_nothing_held(ledger)


def test_device_memory_apart_is_counted_while_a_loan_lasts(queue, tmp_path):
    store, ledger = make_store(Tier.HOST, ApartLink, queue, tmp_path)
    Model(store, FLOAT32, slice(0, BATCH)).begin(Begin(0, 1, 32, 0, whole=True))
    nbytes = ledger.held(Tier.HOST, KIND)
    assert nbytes == BATCH * 32 * WIDTH * 4
    (loan,) = store.load(0)()
    assert ledger.held(Tier.DEVICE, KIND) == nbytes
    loan.release()
    assert ledger.held(Tier.DEVICE, KIND) == 0


@pytest.mark.parametrize("link", LINKS)
@given(seed=st.integers(0, 999), chosen=st.integers(1, 9), dtype=st.sampled_from("fB"))
def test_the_host_brings_the_slots_that_are_chosen(link, seed, chosen, dtype):
    random, ledger = np.random.default_rng(seed), Ledger()
    store = HostStore(ledger, KIND, link(DEVICE, ledger))
    value = random.integers(0, 200, (BATCH, 3, 9, WIDTH)).astype(dtype)
    store.store("key", jax.numpy.asarray(value), slice(1, 4), at=0, slots=16)
    slots = random.integers(0, 9, (3, 3, chosen)).astype(np.int32)
    loan = store.gather("key", slots)
    expected = np.take_along_axis(value[1:4], slots[..., None], axis=2)
    np.testing.assert_array_equal(loan.array, expected)
    loan.release()
    store.free("key")
    store.clear()
    assert_nothing_held(ledger)
