"""Ranges of bytes: what was written is read, however they lie; errors name files."""

import errno
import os
import pathlib
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import extents
from flexjax.extents import (
    BLOCK_BYTES,
    Extent,
    as_bytes,
    cut,
    read_extent,
    reads_direct,
    write_extent,
)
from flexjax.memory.buffers import page_aligned
from tests.common import WatchedOs

BLOCK = BLOCK_BYTES


def near_blocks(most: int) -> st.SearchStrategy[int]:
    """Numbers at, just before and just after whole blocks, and any others."""
    boundaries = st.builds(
        lambda blocks, more: max(0, blocks * BLOCK + more),
        st.integers(0, most),
        st.sampled_from([-1, 0, 1]),
    )
    return boundaries | st.integers(0, most * BLOCK)


def memory_of(nbytes: int, shift: int = 0) -> np.ndarray:
    """Memory that begins `shift` bytes behind a page."""
    return page_aligned(nbytes + shift)[shift:]


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


RANGES = st.tuples(near_blocks(3), near_blocks(3), st.sampled_from([0, 1, 64, 4095]))
WHOLE = 0, 2 * BLOCK, 0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file whose file system is the one of most temporary folders."""
    return tmp_path_factory.mktemp("extents") / "file"


@pytest.fixture
def watch(monkeypatch):
    """Hands every call on a file to a function, until the test ends."""

    def start(function) -> None:
        monkeypatch.setattr(extents, "os", WatchedOs(function))

    return start


@pytest.fixture
def calls(watch):
    """All calls on files: their name, whether they are direct, and their bytes."""
    seen: list[tuple[str, bool, int]] = []
    watch(lambda call, path, is_direct, nbytes: seen.append((call, is_direct, nbytes)))
    return seen


@pytest.mark.parametrize("direct", [True, False])
@given(writes=st.lists(RANGES, min_size=1, max_size=4), read=RANGES)
@example(writes=[WHOLE], read=WHOLE)
def test_what_was_written_is_read_however_it_lies(path, direct, writes, read):
    with pytest.MonkeyPatch.context() as patch:
        if not direct:
            patch.delattr(os, "O_DIRECT")
        path.unlink(missing_ok=True)
        model = bytearray()
        for seed, (offset, nbytes, shift) in enumerate(writes):
            memory = memory_of(nbytes, shift)
            memory[:] = random_bytes(nbytes, seed)
            write_extent(Extent(path, offset, memory))
            if nbytes:
                model.extend(bytes(max(0, offset + nbytes - len(model))))
                model[offset : offset + nbytes] = memory.tobytes()
        if model:
            assert path.read_bytes() == model
        offset, nbytes, shift = read
        memory = memory_of(nbytes, shift)
        memory[:] = 0xAA
        if offset + nbytes <= len(model):
            read_extent(Extent(path, offset, memory))
            assert memory.tobytes() == model[offset : offset + nbytes]
        elif nbytes:
            path.touch()
            with pytest.raises(OSError, match=f"{path} ended early"):
                read_extent(Extent(path, offset, memory))


@given(
    sizes=st.lists(st.integers(0, 30), max_size=4),
    offset=st.integers(0, 100),
    most=st.integers(1, 12),
)
def test_pieces_are_the_ranges_in_order(sizes, offset, most):
    whole = [
        Extent(pathlib.Path(f"{i}"), offset, random_bytes(size))
        for i, size in enumerate(sizes)
    ]
    pieces = cut(whole, most)
    assert all(0 < piece.memory.nbytes <= most for piece in pieces)
    for extent in whole:
        own = [piece for piece in pieces if piece.path == extent.path]
        assert b"".join(p.memory.tobytes() for p in own) == extent.memory.tobytes()
        at = offset
        for piece in own:
            assert piece.offset == at
            assert np.shares_memory(piece.memory, extent.memory)
            at += piece.memory.nbytes


def test_the_bytes_of_an_array_are_its_memory():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    as_bytes(array)[:4] = 0xFF
    assert np.isnan(array[0, 0])
    assert as_bytes(array).shape == (24,)


@pytest.mark.parametrize("move", [read_extent, write_extent])
def test_what_is_aligned_goes_past_the_page_cache(move, path, calls):
    path.write_bytes(bytes(3 * BLOCK + 5))
    if not reads_direct(path):
        pytest.skip("this file system knows no direct I/O")
    calls.clear()
    move(Extent(path, BLOCK, memory_of(2 * BLOCK + 5)))
    transfers = [call for call in calls if call[0] in ("preadv", "pwritev")]
    assert [call[1:] for call in transfers] == [(True, 2 * BLOCK), (False, 5)]
    assert [call[0] for call in calls].count("close") == 2


@pytest.mark.parametrize(("offset", "shift"), [(1, 0), (0, 1), (BLOCK, 64)])
def test_what_is_not_aligned_is_not_tried(path, calls, offset, shift):
    path.write_bytes(bytes(4 * BLOCK))
    read_extent(Extent(path, offset, memory_of(2 * BLOCK, shift)))
    assert not any(is_direct for _, is_direct, _ in calls)


# A file system may refuse direct I/O when a file is opened, or only when it is used.
REFUSALS = [
    (call, error)
    for call in ("open", "preadv", "pwritev")
    for error in (errno.EINVAL, errno.EOPNOTSUPP)
]


@pytest.mark.parametrize(("refused", "error"), REFUSALS)
def test_a_file_system_without_direct_io_uses_the_page_cache(
    path, watch, refused, error
):
    def refuse(call, path, is_direct, nbytes):
        if call == refused and is_direct:
            raise OSError(error, os.strerror(error))

    watch(refuse)
    data = random_bytes(2 * BLOCK)
    memory = memory_of(data.nbytes)
    memory[:] = data
    write_extent(Extent(path, 0, memory))
    memory[:] = 0
    read_extent(Extent(path, 0, memory))
    assert memory.tobytes() == data.tobytes()
    if refused != "pwritev":
        assert not reads_direct(path)


def test_a_system_without_direct_io_reads_through_the_page_cache(path, monkeypatch):
    path.write_bytes(bytes(BLOCK))
    monkeypatch.delattr(os, "O_DIRECT")
    assert not reads_direct(path)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("move", [read_extent, write_extent])
def test_a_transfer_that_stops_in_the_middle_goes_on(path, watch, move, aligned):
    data = random_bytes(3 * BLOCK)
    path.write_bytes(data if move is read_extent else bytes(data.nbytes))
    seen = []

    def shorten(call, path, is_direct, nbytes):
        if call in ("preadv", "pwritev"):
            seen.append(nbytes)
            return BLOCK if is_direct else 1000
        return None

    watch(shorten)
    memory = memory_of(data.nbytes, not aligned)
    memory[:] = 0 if move is read_extent else data
    move(Extent(path, 0, memory))
    assert len(seen) > 3
    assert memory.tobytes() == data.tobytes() == path.read_bytes()


@pytest.mark.parametrize("there", [0, 10, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("shift", [0, 1])
def test_a_file_that_is_too_short_says_how_much_there_was(path, there, shift):
    path.write_bytes(bytes(there))
    nbytes = 2 * BLOCK + 2
    with pytest.raises(OSError, match=f"{path} ended early: {there} of {nbytes} bytes"):
        read_extent(Extent(path, 0, memory_of(nbytes, shift)))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_missing_file_is_named(tmp_path, shift):
    path = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"No such file.*{path}"):
        read_extent(Extent(path, 0, memory_of(BLOCK, shift)))
    assert not path.exists()


def test_a_file_that_is_written_is_made_for_its_owner_alone(tmp_path):
    path = tmp_path / "new"
    write_extent(Extent(path, BLOCK, memory_of(BLOCK)))
    assert path.stat().st_size == 2 * BLOCK
    assert path.stat().st_mode & 0o077 == 0


FAILURES = [
    (read_extent, "open", errno.EACCES),
    (read_extent, "preadv", errno.EIO),
    (read_extent, "close", errno.EIO),
    (write_extent, "open", errno.ENOSPC),
    (write_extent, "pwritev", errno.EIO),
    (write_extent, "pwritev", errno.ENOSPC),
    (write_extent, "close", errno.EIO),
    (write_extent, "close", errno.ENOSPC),
]


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize(("move", "failing", "error"), FAILURES)
def test_a_failure_names_the_file_and_closes_it(
    path, watch, move, failing, error, is_direct
):
    path.write_bytes(bytes(BLOCK + 1))
    if is_direct and not reads_direct(path):
        pytest.skip("this file system knows no direct I/O")
    opened = []

    def fail(call, path, is_direct_call, nbytes):
        if call == failing and is_direct_call == is_direct:
            named = [str(path)] if call == "open" else []  # as the system does
            raise OSError(error, os.strerror(error), *named)
        opened.append({"open": 1, "close": -1}.get(call, 0))

    watch(fail)
    with pytest.raises(OSError, match=re.escape(str(path))) as caught:
        move(Extent(path, 0, memory_of(BLOCK + 1)))
    assert caught.value.errno == error
    assert sum(opened) == (1 if failing == "close" else 0)
