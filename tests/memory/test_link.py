import time
from unittest import mock

import jax
import numpy as np
import pytest

from flexjax.memory.buffers import page_aligned, typed
from flexjax.memory.lanes import Lane, Timeline
from flexjax.memory.ledger import Ledger
from flexjax.memory.link import DeviceLink, Source, is_shared
from flexjax.policy import Kind, Tier
from tests.common import LINKS, ApartLink, assert_nothing_held

DEVICE = jax.devices()[0]
ONLY_SHARED = pytest.mark.skipif(
    DEVICE.platform != "cpu", reason="the device has memory of its own"
)


def aligned(count: int = 1000) -> np.ndarray:
    array = typed(page_aligned(4 * count), (count,), np.dtype(np.float32))
    array[:] = np.arange(count)
    return array


def test_only_a_cpu_computes_in_the_host_s_memory():
    assert is_shared(jax.devices("cpu")[0])
    gpu = mock.Mock(jax.Device, platform="gpu")
    assert not is_shared(gpu)
    assert DeviceLink(gpu, Ledger()).stage_tier is Tier.HOST
    assert DeviceLink(jax.devices("cpu")[0], Ledger()).stage_tier is Tier.DEVICE


@ONLY_SHARED
def test_shared_memory_is_used_in_place():
    ledger, given = Ledger(), []
    array = aligned()
    loan = DeviceLink(DEVICE, ledger).lend(array, Kind.WEIGHTS, lambda: given.append(1))
    assert loan.array.unsafe_buffer_pointer() == array.ctypes.data
    assert ledger.moved() == {}
    assert_nothing_held(ledger)
    assert given == []
    loan.release()
    assert given == [1]


@ONLY_SHARED
@pytest.mark.parametrize("count", [10, 1 << 20])
def test_a_step_that_is_donated_a_loan_does_not_write_into_it(count):
    array = aligned(count)
    before = array.copy()
    loan = DeviceLink(DEVICE, Ledger()).lend(array, Kind.WEIGHTS)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(loan.array)
    assert np.array_equal(result, before + 1)
    assert np.array_equal(array, before)


def test_memory_apart_is_copied_counted_and_given_back_once_copied():
    ledger, timeline, given = Ledger(), Timeline(keeps_spans=True), []
    array = aligned()
    before = array.copy()
    link = ApartLink(DEVICE, ledger, timeline)
    loan = link.lend(array, Kind.WEIGHTS, lambda: given.append(1))
    link.close()
    assert given == [1]
    (span,) = timeline.spans
    assert (span.lane, span.name) == (Lane.TO_DEVICE, "weights")
    assert span.nbytes == array.nbytes
    array[:] = -1
    assert np.array_equal(loan.array, before)
    assert ledger.held(Tier.DEVICE, Kind.WEIGHTS) == array.nbytes
    assert ledger.moved() == {(Tier.HOST, Tier.DEVICE): array.nbytes}
    loan.release()
    assert_nothing_held(ledger)
    assert given == [1]


@pytest.mark.parametrize("link_type", LINKS)
def test_an_array_that_lies_anyhow_is_lent_all_the_same(link_type):
    array = aligned()[3:700]
    loan = link_type(DEVICE, Ledger()).lend(array, Kind.WEIGHTS)
    assert np.array_equal(loan.array, array)


@pytest.mark.parametrize("link_type", LINKS)
def test_a_loan_that_fails_gives_back_and_counts_nothing(link_type, monkeypatch):
    ledger, given = Ledger(), []

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jax, "device_put", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"):
        link_type(DEVICE, ledger).lend(aligned(), Kind.WEIGHTS, lambda: given.append(1))
    assert given == [1]
    assert ledger.moved() == {}
    assert_nothing_held(ledger)


@pytest.mark.parametrize(
    ("link_type", "moved"),
    [
        pytest.param(DeviceLink, {}, marks=ONLY_SHARED),
        (ApartLink, {(Tier.DEVICE, Tier.HOST): 3996}),
    ],
)
def test_a_download_waits_for_the_array(link_type, moved):
    ledger = Ledger()
    array = jax.jit(lambda x: x * 2)(np.arange(1000, dtype=np.float32))
    found = link_type(DEVICE, ledger).download(array, slice(1, None))
    assert np.array_equal(found, np.arange(1, 1000) * 2)
    assert ledger.moved() == moved


class _Client:
    """What knows which memory it may read by itself."""

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}

    def dma_map(self, address: int, nbytes: int) -> None:
        self.mapped[address] = nbytes

    def dma_unmap(self, address: int) -> None:
        del self.mapped[address]


def test_a_device_apart_is_told_of_host_memory_for_as_long_as_it_is_there():
    gpu = mock.Mock(jax.Device, platform="gpu", client=_Client())
    memory = DeviceLink(gpu, Ledger()).host_memory(3 << 20)
    assert gpu.client.mapped == {memory.ctypes.data: 3 << 20}
    part = memory[1:]
    del memory
    assert gpu.client.mapped
    del part
    assert not gpu.client.mapped


@pytest.mark.parametrize(
    ("platform", "nbytes"), [("gpu", 1 << 10), ("cpu", 3 << 20)], ids=["small", "a CPU"]
)
def test_other_memory_is_not_mapped(platform, nbytes):
    device = mock.Mock(jax.Device, platform=platform, client=_Client())
    memory = DeviceLink(device, Ledger()).host_memory(nbytes)
    assert memory.nbytes == nbytes
    assert not device.client.mapped


def test_memory_that_cannot_be_mapped_is_used_all_the_same():
    client = mock.Mock()
    client.dma_map.side_effect = jax.errors.JaxRuntimeError("UNIMPLEMENTED")
    gpu = mock.Mock(jax.Device, platform="gpu", client=client)
    assert DeviceLink(gpu, Ledger()).host_memory(3 << 20).nbytes == 3 << 20
    client.dma_unmap.assert_not_called()


def test_buffers_are_given_back_before_a_release_returns():
    """So the next load finds them free, however late the thread that follows is."""
    given = []
    link = ApartLink(DEVICE, Ledger())

    def give_back_late() -> None:
        time.sleep(0.05)
        given.append(1)

    link.lend(aligned(), Kind.WEIGHTS, give_back_late).release()
    assert given == [1]


def test_several_arrays_are_followed_as_one_and_none_not_at_all():
    ledger, timeline, given = Ledger(), Timeline(keeps_spans=True), []
    link = ApartLink(DEVICE, ledger, timeline)
    assert link.lend_all([], Kind.WEIGHTS) == []
    sources = [Source(aligned(count), lambda: given.append(1)) for count in (10, 20)]
    loans = link.lend_all(sources, Kind.WEIGHTS)
    assert [loan.array.size for loan in loans] == [10, 20]
    loans[0].release()
    assert given == [1, 1]
    assert ledger.held(Tier.DEVICE, Kind.WEIGHTS) == 80
    loans[1].release()
    assert_nothing_held(ledger)
    (span,) = timeline.spans
    assert span.nbytes == 120
