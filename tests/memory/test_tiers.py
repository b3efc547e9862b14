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

from flexjax.memory import disk
from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore, chunk_slots
from flexjax.memory.host import HostStore
from flexjax.memory.ledger import Ledger
from flexjax.memory.tier import TierStore
from flexjax.policy import Kind, Tier
from flexjax.workload import bucket
from tests.common import LINKS, ApartLink, assert_nothing_held, files, poison_buffers

DEVICE = jax.devices()[0]
KIND = Kind.KV_CACHE
FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SMALL_CHUNK_BYTES = 800  # splits the few rows of these tests into several files
BATCH, WIDTH = 5, 4

STORES = {
    f"{tier.value}, {link.__name__}": (tier, link)
    for tier, link in itertools.product(Tier, LINKS)
    if tier is not Tier.DEVICE or link is LINKS[0]  # that one uses no link
}


def make_store(tier: Tier, link_type, folder) -> tuple[TierStore, Ledger]:
    ledger = Ledger()
    link = link_type(DEVICE, ledger)
    if tier is Tier.DEVICE:
        return DeviceStore(ledger, KIND), ledger
    if tier is Tier.HOST:
        return HostStore(ledger, KIND, link), ledger
    return DiskStore(ledger, KIND, link, folder), ledger


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
        loan, expected = self.store.load(call.key), self.held[call.key]
        found = np.asarray(loan.array)
        used = expected.shape[2]
        assert found.dtype == self.dtype
        assert found.shape == (*expected.shape[:2], self.slots[call.key], WIDTH)
        assert found[:, :, :used].tobytes() == expected.tobytes()
        assert np.isfinite(found[:, :, used:].astype(np.float32)).all()
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


@pytest.mark.parametrize("chunk_bytes", [disk.CHUNK_BYTES, SMALL_CHUNK_BYTES])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", STORES)
@settings(max_examples=12)
@given(calls=CALLS, rows=st.sampled_from([slice(0, BATCH), slice(1, 4)]))
def test_a_load_brings_exactly_what_was_stored(name, dtype, chunk_bytes, calls, rows):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "CHUNK_BYTES", chunk_bytes)
        poison_buffers(patch)
        store, ledger = make_store(*STORES[name], pathlib.Path(folder))
        model = Model(store, dtype, rows)
        for call in calls:
            model.run(call)
        for key in list(model.held):
            model.check(Load(key))
            model.free(Free(key))
        store.clear()
        assert_nothing_held(ledger)
        assert list(files(pathlib.Path(folder))) == []


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(disk, "CHUNK_BYTES", SMALL_CHUNK_BYTES)


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_on_disk_is_written_once(tmp_path):
    """No file is touched again, and a token costs disk only when its chunk is full."""
    store, ledger = make_store(Tier.DISK, LINKS[0], tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    chunk = chunk_slots(model.values(2, 1).nbytes)
    model.begin(Begin(0, groups=2, seq=35, spare=0, whole=False))
    seen: dict[pathlib.Path, tuple[int, int]] = {}
    for used in range(35, 120):
        now = {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in files(tmp_path)
        }
        assert seen.items() <= now.items()
        seen = now
        on_disk = used // chunk * chunk * model.values(2, 1).nbytes
        assert ledger.held(Tier.DISK, KIND) == on_disk
        assert ledger.moved().get((Tier.HOST, Tier.DISK), 0) == on_disk
        model.append(Append(0, count=1))
    chunks = [path for path in seen if path.name != "zarr.json"]
    pieces = -(-model.values(2, chunk).nbytes // SMALL_CHUNK_BYTES)
    assert len(chunks) == pieces * (119 // chunk)
    assert pieces > 1
    model.check(Load(0))


def test_no_chunk_is_large_and_few_are_small():
    for slot_bytes in (1, 1000, 300_000, 1 << 20, 1 << 30):
        slots = chunk_slots(slot_bytes)
        assert disk.MIN_CHUNK_SLOTS <= slots <= disk.MAX_CHUNK_SLOTS
        assert 32 % slots == 0, "a bucket of slots is whole chunks"
        if slots > disk.MIN_CHUNK_SLOTS:
            assert slots * slot_bytes <= disk.CHUNK_BYTES


@pytest.mark.parametrize("link_type", LINKS)
def test_a_read_that_fails_names_the_array_and_gives_its_buffer_back(
    link_type, tmp_path
):
    store, ledger = make_store(Tier.DISK, link_type, tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    model.begin(Begin(0, groups=1, seq=40, spare=0, whole=False))
    model.begin(Begin(1, groups=1, seq=40, spare=0, whole=False))
    (broken,) = {
        path for path in files(tmp_path / f"{KIND.value}-1") if path.name == "0"
    }
    broken.unlink()
    with pytest.raises(OSError, match=f"^0 could not be read in {tmp_path}: .*disk"):
        store.load(0)
    model.check(Load(1))
    store.free(0)
    store.free(1)
    store.clear()
    assert_nothing_held(ledger)


def test_a_write_that_fails_names_the_array_and_counts_nothing(tmp_path):
    store, ledger = make_store(Tier.DISK, LINKS[0], tmp_path)
    model = Model(store, FLOAT32, slice(0, BATCH))
    (tmp_path / f"{KIND.value}-1").write_text("in the way")
    with pytest.raises(OSError, match=f"^0 could not be written in {tmp_path}: .*disk"):
        model.begin(Begin(0, groups=1, seq=40, spare=0, whole=False))
    store.clear()
    assert_nothing_held(ledger)


def test_device_memory_apart_is_counted_while_a_loan_lasts(tmp_path):
    store, ledger = make_store(Tier.HOST, ApartLink, tmp_path)
    Model(store, FLOAT32, slice(0, BATCH)).begin(Begin(0, 1, 32, 0, whole=True))
    nbytes = ledger.held(Tier.HOST, KIND)
    assert nbytes == BATCH * 32 * WIDTH * 4
    loan = store.load(0)
    assert ledger.held(Tier.DEVICE, KIND) == nbytes
    loan.release()
    assert ledger.held(Tier.DEVICE, KIND) == 0
