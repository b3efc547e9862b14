"""A weight store is written whole, or goes on where it stopped."""

import dataclasses
import os
import shutil
import subprocess
import types

import numpy as np
import pytest

from flexjax import store_format, store_writer
from flexjax.checkpoint import open_store
from flexjax.store_format import DTYPES
from flexjax.store_writer import JOURNAL, StoreWriter
from tests.small_store import BIG, CONFIG, big_chunk, weights, writer


def test_an_interrupted_writer_goes_on(tmp_path):
    tensors = weights(DTYPES["bfloat16"])
    names = list(tensors)
    with writer(tmp_path) as out:
        for name in names[:3]:
            out.write(name, [tensors[name]])
    with pytest.raises(ValueError, match="not a finished weight store"):
        open_store(tmp_path)
    with writer(tmp_path) as out:
        assert [name for name in names if out.has(name)] == names[:3]
        with pytest.raises(ValueError, match="cannot be finished.*never written"):
            out.finish()
        for name in names[3:]:
            out.write(name, [tensors[name]])
        out.finish()
    store = open_store(tmp_path)
    for name, data in tensors.items():
        store.verify(name, data)
    assert not (tmp_path / JOURNAL).exists()
    with writer(tmp_path) as out:
        assert out.complete


@pytest.mark.parametrize("harm", ["altered", "truncated", "missing"])
def test_what_the_journal_promises_is_checked(harm, tmp_path):
    tensors = weights(DTYPES["bfloat16"])
    with writer(tmp_path) as out:
        out.write(BIG, [tensors[BIG]])
    path = big_chunk(tmp_path)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data if harm == "altered" else data[:7])
    if harm == "missing":
        path.unlink()
    with writer(tmp_path) as out:
        assert not out.has(BIG)
        out.write(BIG, [tensors[BIG]])
        assert out.has(BIG)


@pytest.mark.parametrize("torn", [1, 20])
def test_a_torn_journal_line_is_left_out(torn, tmp_path):
    tensors = weights(DTYPES["bfloat16"])
    first, second = list(tensors)[:2]
    with writer(tmp_path) as out:
        out.write(first, [tensors[first]])
        out.write(second, [tensors[second]])
    os.truncate(tmp_path / JOURNAL, (tmp_path / JOURNAL).stat().st_size - torn)
    for _ in range(2):  # the second time reads what the first appended
        with writer(tmp_path) as out:
            assert out.has(first)
            if not out.has(second):
                out.write(second, [tensors[second]])
    with writer(tmp_path) as out:
        assert out.has(second)


def test_a_journal_line_is_written_whole_however_little_a_write_takes(
    tmp_path, monkeypatch
):
    class SlowOs:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, file, data):
            return os.write(file, data[:7])

    monkeypatch.setattr(store_writer, "os", SlowOs())
    with writer(tmp_path) as out:
        out.write(BIG, [weights(DTYPES["bfloat16"])[BIG]])
    with writer(tmp_path) as out:
        assert out.has(BIG)


def test_a_failed_write_waits_for_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(store_format, "MAX_CHUNK_BYTES", 1 << 9)
    waited = []

    class Fails:
        def __init__(self):
            self.commit = self
            waited.append(False)
            self.index = len(waited) - 1

        def result(self):
            waited[self.index] = True
            raise ValueError(f"write {self.index} failed")

    class Array:
        def __getitem__(self, rows):
            return types.SimpleNamespace(write=lambda chunk: Fails())

    with writer(tmp_path) as out:
        opened = types.SimpleNamespace(result=Array)
        monkeypatch.setattr(store_writer.ts, "open", lambda *args, **kwargs: opened)
        with pytest.raises(OSError, match="write . failed"):
            out.write(BIG, [weights(DTYPES["bfloat16"])[BIG]])
    assert waited == [True] * store_writer.BUFFERS


@pytest.mark.parametrize(
    "other", [{"source": "other"}, {"dtype": DTYPES["float16"]}], ids=str
)
def test_another_source_starts_over(other, tmp_path):
    with writer(tmp_path) as out:
        out.write(BIG, [weights(DTYPES["bfloat16"])[BIG]])
    with writer(tmp_path, **other) as out:
        assert not out.has(BIG)
        assert not any((tmp_path / "tensors").iterdir())


def test_a_finished_store_of_another_source_is_kept(store_folder):
    with pytest.raises(ValueError, match="already holds a weight store.*delete it"):
        writer(store_folder, source="other")
    open_store(store_folder)


def test_another_config_is_another_source(store_folder):
    config = dataclasses.replace(CONFIG, bos_token_id=0)
    with pytest.raises(ValueError, match="already holds a weight store"):
        StoreWriter(
            store_folder, config=config, dtype=DTYPES["bfloat16"], source="test"
        )


def test_a_strange_folder_is_left_alone(tmp_path):
    (tmp_path / "tensors").mkdir()
    (tmp_path / "tensors" / "mine").touch()
    with pytest.raises(ValueError, match="no conversion left behind"):
        writer(tmp_path)
    assert (tmp_path / "tensors" / "mine").exists()


def test_another_checkpoint_is_not_hidden(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a checkpoint, with a config.json"):
        writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_refusal_leaves_no_folder_but_one_that_was_there(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(OSError, match="not enough space"):
            writer(folder)
    assert not any(tmp_path.iterdir())


def test_one_conversion_a_folder(tmp_path):
    with (
        writer(tmp_path),
        pytest.raises(ValueError, match=f"written by process {os.getpid()};"),
    ):
        writer(tmp_path)
    writer(tmp_path).close()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("rows", [66, 68])
def test_a_wrong_number_of_rows_is_refused(rows, tmp_path):
    with (
        writer(tmp_path) as out,
        pytest.raises(ValueError, match=f"'{BIG}' has (fewer|more) rows"),
    ):
        out.write(BIG, [np.zeros((rows, 16), out.planned[BIG].dtype)])


def test_space_is_checked_before_the_first_byte(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=f"not enough space in {tmp_path}.*1000 bytes"):
        writer(tmp_path)
    assert not any(tmp_path.iterdir())


def test_only_what_is_missing_needs_space(tmp_path, monkeypatch):
    tensors = weights(DTYPES["bfloat16"])
    with writer(tmp_path) as out:
        needed = sum(entry.stored_bytes for entry in out.planned.values())
        out.write(BIG, [tensors[BIG]])
        there = out.planned[BIG].stored_bytes
    usage = shutil.disk_usage(tmp_path)
    free = needed - there + (1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    writer(tmp_path).close()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free - 1))
    with pytest.raises(OSError, match="not enough space"):
        writer(tmp_path)


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_an_unwritable_folder_is_named(place, tmp_path):
    folder = tmp_path / "taken"
    folder.touch()
    if place == "below a file":
        folder /= "store"
    with pytest.raises(ValueError, match=f"cannot write into {folder}: "):
        writer(folder)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system that is full after 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting needs rights that these tests do not have")
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_no_store(tiny_disk, monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=20_000)
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(store_format, "MAX_CHUNK_BYTES", 1 << 16)
    out = StoreWriter(
        tiny_disk / "store", config=config, dtype=DTYPES["float32"], source="test"
    )
    rows = np.ones((20_000, 16), np.float32)
    with out, pytest.raises(OSError, match="tensor.*No space left.*goes on") as caught:
        out.write(BIG, [rows])
    assert str(tiny_disk / "store") in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a finished weight store"):
        open_store(tiny_disk / "store")
