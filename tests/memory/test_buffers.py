import mmap
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory.buffers import BufferPool, page_aligned, typed
from flexjax.memory.ledger import Ledger
from flexjax.policy import Kind, Tier
from tests.common import held_on

PLACE = (Tier.HOST, Kind.KV_CACHE)


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 3 << 20])
def test_a_buffer_begins_at_a_page(nbytes):
    buffer = page_aligned(nbytes)
    assert buffer.nbytes == nbytes
    assert buffer.ctypes.data % mmap.PAGESIZE == 0
    buffer[:] = 7
    assert buffer.min() == 7


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_typed_looks_at_the_same_bytes(dtype):
    dtype = np.dtype(dtype)
    buffer = page_aligned(6 * dtype.itemsize)
    array = typed(buffer, (2, 3), dtype)
    array[:] = np.arange(6).reshape(2, 3)
    assert np.array_equal(buffer.view(dtype), np.arange(6).astype(dtype))


@given(st.data())
def test_a_pool_never_holds_more_than_was_lent_at_once(data):
    ledger = Ledger()
    pool = BufferPool(ledger, *PLACE)
    lent: dict[int, np.ndarray] = {}
    most = 0
    for mark in range(1, data.draw(st.integers(1, 40), label="calls")):
        if lent and data.draw(st.booleans(), label="give"):
            chosen = data.draw(st.sampled_from(sorted(lent)), label="which")
            buffer = lent.pop(chosen)
            assert np.all(buffer == chosen), "somebody else wrote into a lent buffer"
            pool.give(buffer)
        elif data.draw(st.integers(0, 5), label="clear") == 0:
            pool.clear()
            most = sum(buffer.nbytes for buffer in lent.values())
            assert ledger.held(*PLACE) == most
        else:
            nbytes = data.draw(st.sampled_from([1, 1000, 4096, 10000]), label="bytes")
            lent[mark] = pool.take(nbytes)
            assert lent[mark].nbytes == nbytes
            lent[mark][:] = mark
        now = sum(buffer.nbytes for buffer in lent.values())
        most = max(most, now)
        assert now <= ledger.held(*PLACE) <= most
    for buffer in lent.values():
        pool.give(buffer)
    pool.clear()
    assert held_on(ledger, Tier.HOST) == 0


def test_a_buffer_is_used_again():
    pool = BufferPool(Ledger(), *PLACE)
    first = pool.take(5000)
    pool.give(first)
    assert pool.take(5000).ctypes.data == first.ctypes.data


def test_large_memory_is_private_and_asks_for_huge_pages():
    """Shared memory gets none, and without them a disk reads half as fast."""
    buffer = page_aligned(4 << 20)
    buffer[:] = 1
    address = buffer.__array_interface__["data"][0]
    smaps = pathlib.Path("/proc/self/smaps")
    if not smaps.exists() or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("only Linux tells")
    maps = smaps.read_text().splitlines()
    inside = False
    for line in maps:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line):
            first, last = (int(found[n], 16) for n in (1, 2))
            inside = first <= address < last
            assert not inside or found[3] == "rw-p"
        elif inside and line.startswith("VmFlags:"):
            assert "hg" in line.split()
            return
    pytest.fail("no mapping holds the buffer")


def test_without_memory_nothing_is_counted(monkeypatch):
    ledger = Ledger()
    pool = BufferPool(ledger, *PLACE)

    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(MemoryError, match="no 5000 bytes of memory left: Cannot"):
            pool.take(5000)
    assert held_on(ledger, Tier.HOST) == 0
    pool.give(pool.take(5000))
    pool.clear()
    assert held_on(ledger, Tier.HOST) == 0


def test_a_part_of_a_larger_buffer_saves_making_one():
    ledger = Ledger()
    pool = BufferPool(ledger, *PLACE)
    large, larger = pool.take(5000), pool.take(8000)
    for buffer in (large, larger):
        pool.give(buffer)
    part = pool.take(4500, most_bytes=8000)
    assert part.nbytes == 4500
    assert part.ctypes.data == large.ctypes.data  # the smallest that will do
    assert pool.take(4500, most_bytes=7999).ctypes.data != larger.ctypes.data
    pool.give(part)
    assert pool.take(5000).ctypes.data == large.ctypes.data
    assert ledger.held(*PLACE) == 5000 + 4500  # 8000 more would be more than ever lent
