import contextlib
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.memory.device import DeviceStore
from flexjax.memory.disk import DiskStore
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Lane
from flexjax.memory.placed import PlacedArrays
from flexjax.memory.placement import Rows
from flexjax.policy import Kind, Tier
from tests.common import (
    LINKS,
    ApartLink,
    assert_nothing_held,
    in_time,
    make_transport,
)

DEVICE = jax.devices()[0]
KIND = Kind.KV_CACHE


class Home:
    """All three tiers, with `rows` of every key on each."""

    def __init__(self, rows: Rows, folder, link_type=LINKS[0]) -> None:
        self.transport = make_transport(link_type)
        self.ledger, self.lanes = self.transport.ledger, self.transport.lanes
        link, queue = self.transport.link, self.transport.disk
        self.stores = {
            Tier.DEVICE: DeviceStore(self.ledger, KIND),
            Tier.HOST: HostStore(self.ledger, KIND, link),
            Tier.DISK: DiskStore(self.ledger, KIND, link, queue, folder),
        }
        self.arrays = PlacedArrays(
            self.stores,
            self.lanes,
            load_lane=Lane.CACHE_IN,
            store_lane=Lane.CACHE_OUT,
            rows_of=lambda key: rows,
        )

    def close(self) -> None:
        """Ends everything; nothing is held any more, whatever happened before."""
        in_time(self.lanes.drain)
        self.arrays.clear()
        for store in self.stores.values():
            store.clear()
        in_time(self.transport.close)
        assert_nothing_held(self.ledger)


@pytest.fixture
def home(tmp_path):
    home = Home(Rows(1, 2, 1), tmp_path)
    yield home
    home.close()


def pair(batch: int, seq: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (batch, 2, seq, 4)
    return (
        random.standard_normal(shape, np.float32),
        random.standard_normal(shape, np.float32),
    )


def on_device(arrays):
    return tuple(jax.device_put(array.copy(), DEVICE) for array in arrays)


def loaded(home: Home, key="key") -> list[np.ndarray]:
    """Key and value, the segments of all tiers put together."""
    loan = in_time(home.arrays.load(key).result)
    whole = [
        np.concatenate([np.concatenate(pieces, axis=2) for pieces in parts])
        for parts in zip(*loan.segments, strict=True)
    ]
    loan.release()
    return whole


@pytest.mark.parametrize("link_type", LINKS)
@settings(max_examples=10)
@given(rows=st.builds(Rows, *[st.integers(0, 2)] * 3).filter(any))
def test_rows_of_all_tiers_come_back_in_order(tmp_path_factory, link_type, rows):
    home = Home(rows, tmp_path_factory.mktemp("spill"), link_type)
    prompt, token = pair(sum(rows), 33), pair(sum(rows), 1, seed=1)
    stored = home.arrays.store("key", lambda: on_device(prompt), slots=64)
    home.arrays.store("key", lambda: on_device(token), at=33, slots=64)
    found = loaded(home)
    for array, first, second in zip(found, prompt, token, strict=True):
        assert np.array_equal(array[:, :, :33], first)
        assert np.array_equal(array[:, :, 33:34], second)
    assert stored.result() == 2
    home.close()


def test_both_return_at_once_and_a_load_waits_for_the_store_before_it(home):
    go, arrays = threading.Event(), pair(4, 8)

    def values():
        assert go.wait(60)
        return on_device(arrays)

    stored = home.arrays.store("key", values)
    load = home.arrays.load("key")
    assert not stored.done()
    assert not load.done()
    go.set()
    loan = in_time(load.result)
    assert stored.done()
    assert [len(segment[0][0]) for segment in loan.segments] == [1, 2, 1]
    loan.release()


def test_a_load_that_was_issued_before_a_store_may_wait_for_the_one_before(home):
    first, second = pair(4, 8), pair(4, 8, seed=1)
    home.arrays.store("key", lambda: on_device(first))
    assert np.array_equal(loaded(home)[0], first[0])
    home.arrays.store("key", lambda: on_device(second))
    assert np.array_equal(loaded(home)[0], second[0])


def test_a_released_loan_holds_no_array(home):
    home.arrays.store("key", lambda: on_device(pair(4, 8)))
    loan = in_time(home.arrays.load("key").result)
    loan.release()
    loan.release()
    assert loan.segments == ()


def test_what_makes_a_store_fail_makes_its_loads_fail(home):
    def values():
        raise RuntimeError("nothing was computed")

    stored = home.arrays.store("key", values)
    load = home.arrays.load("key")
    assert in_time(load.exception) is in_time(stored.exception)
    with pytest.raises(RuntimeError, match="nothing was computed"):
        load.result()
    home.arrays.store("other", lambda: on_device(pair(4, 8)))
    assert len(loaded(home, "other")) == 2


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("verb", ["store", "load"])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("link_type", LINKS)
def test_a_tier_that_fails_leaves_nothing_behind(
    tmp_path, monkeypatch, tier, verb, call, link_type
):
    home, calls = Home(Rows(1, 2, 1), tmp_path, link_type), []
    original = getattr(home.stores[tier], verb)

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise OSError(f"{tier.value} is gone")
        return original(*args, **kwargs)

    monkeypatch.setattr(home.stores[tier], verb, fail)
    home.arrays.store("key", lambda: on_device(pair(4, 8)))
    error = in_time(home.arrays.load("key").exception)
    assert isinstance(error, OSError)
    assert str(error) == f"{tier.value} is gone"
    home.close()


def test_a_key_without_a_store_is_our_own_mistake(home):
    with pytest.raises(KeyError):
        home.arrays.load("never stored")


def test_device_memory_apart_is_given_back_when_a_later_tier_fails(tmp_path):
    home = Home(Rows(0, 2, 2), tmp_path, ApartLink)
    home.arrays.store("key", lambda: on_device(pair(4, 8)))
    in_time(home.lanes.drain)
    home.stores[Tier.DISK].free(("key", 1))
    with contextlib.suppress(KeyError):
        in_time(home.arrays.load("key").result)
    assert home.ledger.held(Tier.DEVICE, KIND) == 0
    home.close()
