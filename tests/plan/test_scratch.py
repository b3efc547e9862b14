"""A scratch file is as large as there is room for, holds what was written, and goes."""

import errno
import pathlib
import shutil

import pytest

from flexjax import extents
from flexjax.checkpoint import open_store
from flexjax.extents import read_extent
from flexjax.plan import scratch
from flexjax.plan.scratch import scratch_file
from tests.common import WatchedOs, files, flexjax_threads, in_time
from tests.plan.conftest import MOST_PARTS, assert_nothing_is_left

pytestmark = pytest.mark.usefixtures("small_scratch")


@pytest.mark.parametrize(
    ("free_parts", "parts"), [(2, 1), (5, 3), (8, 4), (1000, MOST_PARTS)]
)
def test_a_scratch_file_takes_about_half_of_what_is_free(
    tmp_path, monkeypatch, free_parts, parts
):
    def usage(path):
        del path
        return shutil._ntuple_diskusage(0, 0, free_parts * scratch.PART_BYTES)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with scratch_file(tmp_path):
        sizes = [path.stat().st_size for path in scratch_files(tmp_path)]
    assert sizes == parts * [scratch.PART_BYTES]
    assert_nothing_is_left(tmp_path)


def scratch_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in files(folder) if path.name.startswith("scratch-")]


def test_a_store_is_read_from_its_own_files(golden, monkeypatch):
    store = open_store(golden("opt-pre-ln").store)
    assert scratch.store_read_rate(store) > 0
    monkeypatch.setattr(scratch, "STORE_S", 0.0)
    assert scratch.store_read_rate(store) > 0
    assert not flexjax_threads()


def test_a_store_that_cannot_be_read_says_what_failed(golden, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(golden("opt-pre-ln").store, folder)
    store = open_store(folder)
    for chunk in (folder / "tensors" / "layers.1.fc1.weight").glob("c.*"):
        chunk.unlink()
    with pytest.raises(OSError, match=r"layers\.1\.fc1\.weight"):
        in_time(scratch.store_read_rate, store)
    assert not flexjax_threads()


def test_a_store_that_memory_has_taken_is_read_from_the_disk(golden, monkeypatch):
    store, left, read = open_store(golden("opt-pre-ln").store), set(), set()

    def read_and_keep(extent):
        read.add(extent.path)
        read_extent(extent)

    monkeypatch.setattr(scratch, "_leave_cache", left.add)
    monkeypatch.setattr(scratch, "read_extent", read_and_keep)
    store.direct_io = True
    assert scratch.store_read_rate(store) > 0
    assert not left
    store.direct_io = False
    assert scratch.store_read_rate(store) > 0
    assert left == read


def test_a_slow_disk_gets_a_smaller_file(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "FILL_S", 0.0)
    with scratch_file(tmp_path) as made:
        sizes = [path.stat().st_size for path in files(tmp_path)]
        assert max(sizes) == scratch.PART_BYTES
        assert made.write_rate() > 0
        assert made.read_rate() > 0


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_scratch_file_holds_what_was_written(tmp_path, monkeypatch, is_direct):
    if not is_direct:

        def watch(call, path, is_direct, nbytes):
            if is_direct:
                raise OSError(errno.EINVAL, "no direct I/O here")
            return nbytes or None

        monkeypatch.setattr(extents, "os", WatchedOs(watch))
    with scratch_file(tmp_path) as made:
        assert made.write_rate() > 0
        assert made.read_rate() > 0
        data = b"".join(path.read_bytes() for path in scratch_files(tmp_path))
    assert len(data) == scratch.SCRATCH_BYTES
    assert len(set(data)) > 200, "some disks are quick with zeros"
