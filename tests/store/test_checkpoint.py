"""The weight store on disk, read through its public doors."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import store_format
from flexjax.checkpoint import open_store
from flexjax.extents import read_extent
from flexjax.store_format import DTYPES, plan_entry
from tests.small_store import BIG, CONFIG, aligned, big_chunk, weights, write


@pytest.mark.parametrize(
    ("dtype", "rows"), list(zip(DTYPES.values(), [1, 5, 1000], strict=True)), ids=str
)
def test_what_was_written_is_read(dtype, rows, tmp_path):
    tensors = weights(dtype)
    write(tmp_path, tensors, rows)
    store = open_store(tmp_path)
    assert store.config == CONFIG
    assert store.dtype == dtype
    assert store.tensors.keys() == tensors.keys()
    for name, data in tensors.items():
        out = aligned(data.shape, dtype)
        store.read(name, out)
        assert out.tobytes() == data.tobytes()
        store.verify(name, out)


@given(data=st.data())
def test_rows_are_the_tensors_rows(data, whole_store):
    tensors = weights(DTYPES["bfloat16"])
    store = open_store(whole_store)
    name = data.draw(st.sampled_from([BIG, "layers.1.fc1.weight", "layers.0.fc2.bias"]))
    length = len(tensors[name])
    first = data.draw(st.integers(0, length - 1))
    last = data.draw(st.integers(first + 1, length))
    out = np.empty_like(tensors[name][first:last])
    store.read_rows(name, first, last, out)
    np.testing.assert_array_equal(out, tensors[name][first:last])

    again = np.zeros_like(out)
    extents = store.extents(name, first, last, again)
    assert sum(extent.memory.nbytes for extent in extents) == again.nbytes
    assert len({extent.path for extent in extents}) == len(extents), "a chunk once"
    for path, offset, memory in reversed(extents):
        memory[:] = np.frombuffer(path.read_bytes(), np.uint8)[offset:][: memory.nbytes]
    np.testing.assert_array_equal(again, tensors[name][first:last])

    ids = np.array(data.draw(st.lists(st.integers(0, length - 1))), np.int32)
    out = np.empty_like(tensors[name], shape=(len(ids), *tensors[name].shape[1:]))
    store.gather_rows(name, ids, out)
    np.testing.assert_array_equal(out, tensors[name][ids])


def test_gathering_reads_each_row_once(store_folder, monkeypatch):
    store, data = open_store(store_folder), weights(DTYPES["bfloat16"])[BIG]
    counts, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(1) or preadv(*a))
    ids = np.array([66, 3, 3, 0, 66, 3])
    out = np.empty((6, 16), data.dtype)
    store.gather_rows(BIG, ids, out)
    np.testing.assert_array_equal(out, data[ids])
    assert len(counts) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.read("fc9", np.empty(3)), "has no tensor 'fc9'"),
        (lambda s: s.read(BIG, np.empty((67, 16))), "buffer for tensor.*float64"),
        (
            lambda s: s.read(BIG, np.empty((16, 67), s.dtype).T),
            r"non-contiguous bfloat16\[67, 16\]",
        ),
        (
            lambda s: s.read_rows(BIG, 60, 68, np.empty((8, 16), s.dtype)),
            "rows 60:68 are not in tensor",
        ),
        (
            lambda s: s.extents(BIG, 3, 3, np.empty((0, 16), s.dtype)),
            "rows 3:3 are not in tensor",
        ),
        (
            lambda s: s.extents(BIG, 3, 5, np.empty((3, 16), s.dtype)),
            r"bfloat16\[3, 16\], expected contiguous bfloat16\[2, 16\]",
        ),
        (
            lambda s: s.verify(BIG, np.empty((8, 16), s.dtype), 60),
            "rows 60:68 are not in tensor",
        ),
        (
            lambda s: s.gather_rows(BIG, np.array([67]), np.empty((1, 16), s.dtype)),
            "which has 67 rows",
        ),
        (
            lambda s: s.gather_rows(BIG, np.array([0.0]), np.empty((1, 16), s.dtype)),
            "float64, not integers",
        ),
    ],
)
def test_a_wrong_request_is_refused(call, message, store_folder):
    with pytest.raises(ValueError, match=message):
        call(open_store(store_folder))


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "folder"])
def test_a_harmed_file_is_found_at_open(harm, store_folder):
    path = big_chunk(store_folder)
    data = path.read_bytes()
    path.unlink()
    match harm:
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"x")
        case "folder":
            path.mkdir()
    with pytest.raises(ValueError, match=f"{path}.*{BIG}.*convert the checkpoint"):
        open_store(store_folder)


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_file_harmed_later_is_an_error_that_names_it(harm, store_folder):
    store = open_store(store_folder)
    path = big_chunk(store_folder)
    data = path.read_bytes()
    path.unlink()
    if harm == "truncated":
        path.write_bytes(data[:16])
    out = aligned((67, 16), store.dtype)
    message = f"tensor '{BIG}' of {store_folder}: .*{path}"
    with pytest.raises(OSError, match=message) as caught:
        store.read(BIG, out)
    assert "\n" not in str(caught.value)
    (broken,) = [e for e in store.extents(BIG, 0, 67, out) if e.path == path]
    with pytest.raises(OSError, match=f"{path}") as cause:
        read_extent(broken)
    assert str(store.failure(BIG, cause.value)) == str(caught.value)
    with pytest.raises(OSError, match=path.name):
        store.gather_rows(BIG, np.arange(67), out)


def test_a_lost_array_is_an_error_that_names_it(store_folder):
    store = open_store(store_folder)
    shutil.rmtree(store_folder / "tensors" / BIG)
    with pytest.raises(OSError, match=f"tensor '{BIG}' of {store_folder}: "):
        store.read(BIG, aligned((67, 16), store.dtype))


def test_an_altered_byte_is_caught(store_folder):
    path = big_chunk(store_folder)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    store = open_store(store_folder)
    out = aligned((67, 16), store.dtype)
    store.read(BIG, out)
    checksum = store.tensors[BIG].chunk_checksums[1]
    message = f"{BIG}.*altered.*chunk 1 is .*{checksum}.*convert"
    with pytest.raises(ValueError, match=message):
        store.verify(BIG, out)
    rows = store.tensors[BIG].chunk_rows
    store.verify(BIG, out[:rows])
    store.verify(BIG, out[2 * rows :], 2 * rows)
    for part in (slice(0, rows + 1), slice(rows, 2 * rows), slice(rows + 1, 67)):
        with pytest.raises(ValueError, match=message):
            store.verify(BIG, out[part], part.start)


@given(data=st.data())
def test_any_rows_are_verified(data, whole_store):
    store, tensor = open_store(whole_store), weights(DTYPES["bfloat16"])[BIG].copy()
    first = data.draw(st.integers(0, 66))
    last = data.draw(st.integers(first + 1, 67))
    store.verify(BIG, tensor[first:last], first)
    row = data.draw(st.integers(first, last - 1))
    tensor.view(np.uint16)[row, data.draw(st.integers(0, 15))] ^= 1
    with pytest.raises(ValueError, match=f"{BIG}.*altered"):
        store.verify(BIG, tensor[first:last], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2.*convert the checkpoint again"),
        ({"format": "other"}, "not the manifest of a weight store"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": []}, r"dtype \[\], expected"),
        (
            {"quantization": {"bits": 4, "group_size": 8, "dtype": "float16"}},
            "its dtype is bfloat16, but it is quantized from float16",
        ),
        ({"config": None}, "no config"),
        ({"config": {"model_type": "llama"}}, "only 'opt' is supported"),
        ({"tensors": {}}, "lacks tensor 'embed_tokens.weight'"),
        ({"tensors": {BIG: {}}}, f"'{BIG}' is damaged"),
        ({"tensors": {BIG: 3}}, f"'{BIG}' is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused(change, message, store_folder):
    path = store_folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        open_store(store_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [67, 8]}, "disagree"),
        (
            {"shape": [16, 67], "chunk_rows": 2, "chunk_checksums": ["0"] * 8},
            r"bfloat16\[16, 67\], but its config .*\[67, 16\]",
        ),
        ({"shape": [67, 8], "dtype": "float32"}, r"float32\[67, 8\], but"),
        ({"chunk_rows": 0}, "damaged"),
        ({"chunk_rows": 1}, "disagree"),
        ({"chunk_checksums": ["00"]}, "disagree"),
        ({"dtype": "int8"}, "damaged"),
    ],
)
def test_a_wrong_table_is_refused(change, message, store_folder):
    path = store_folder / "manifest.json"
    values = json.loads(path.read_text())
    values["tensors"][BIG] |= change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{BIG}.*{message}"):
        open_store(store_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(text, store_folder):
    (store_folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is"):
        open_store(store_folder)


def test_an_unknown_tensor_in_the_table_is_refused(store_folder):
    path = store_folder / "manifest.json"
    values = json.loads(path.read_text())
    values["tensors"]["extra"] = values["tensors"][BIG]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="does not know: extra"):
        open_store(store_folder)


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    with pytest.raises(ValueError, match=r"not a finished weight store.*convert"):
        open_store(tmp_path)


def test_other_file_systems_are_read_through_the_page_cache(store_folder, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    store = open_store(store_folder)
    assert not store.direct_io
    out = aligned((67, 16), store.dtype)
    store.read(BIG, out)
    store.verify(BIG, out)


@given(
    rows=st.integers(1, 300_000),
    columns=st.integers(1, 20_000),
    dtype=st.sampled_from(list(DTYPES.values())),
)
def test_chunks_read_well_and_pad_little(rows, columns, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "MIN_CHUNK_BYTES", 4 << 20)
        patch.setattr(store_format, "MAX_CHUNK_BYTES", 8 << 20)
        entry = plan_entry((rows, columns), dtype)
    assert entry.chunk_bytes <= 8 << 20
    assert entry.chunk_bytes >= min(entry.nbytes, (4 << 20) - entry.row_bytes)
    assert 0 <= entry.stored_bytes - entry.nbytes < entry.chunk_bytes
    assert [i for i, _, _ in entry.chunks()] == list(range(entry.num_chunks))
    assert sum(last - first for _, first, last in entry.chunks()) == rows
