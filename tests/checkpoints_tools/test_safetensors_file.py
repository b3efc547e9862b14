"""The header of a safetensors file is believed only where the file bears it out."""

import json
import math
import pathlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from checkpoints_tools.safetensors_file import DTYPES, open_safetensors


def write(path: pathlib.Path, header, data_bytes: int) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def entry(begin: int, end: int, *shape: int, dtype: str = "F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, bool]
)
def test_rows_are_the_files_rows(dtype, tmp_path):
    tensors = {
        "a": np.arange(60).reshape(10, 6).astype(dtype),
        "b": np.arange(5).astype(dtype),
        "c": np.arange(24).reshape(2, 3, 4).astype(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = open_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, data in tensors.items():
        assert found[name].shape == data.shape
        assert found[name].dtype == data.dtype
        for first, last in ((0, len(data)), (1, 2)):
            rows = found[name].read_rows(first, last)
            assert rows.tobytes() == data[first:last].tobytes()


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        ({"a": entry(0, 16, 2, 2)}, 15, "truncated: tensor 'a' ends at byte 16"),
        ({"a": entry(0, 16, 2, 2)}, 17, "1 bytes after its last tensor"),
        ({"a": entry(0, 16, 2, 3)}, 16, "'a' takes bytes 0 to 16, which"),
        ({"a": entry(0, 16, 2, 2), "b": entry(8, 24, 4)}, 24, "'b' begins at byte 8"),
        ({"a": entry(8, 24, 4)}, 24, "'a' begins at byte 8, expected 0"),
        ({"a": entry(0, 16, 4), "b": entry(20, 36, 4)}, 36, "gap or an overlap"),
        ({"a": entry(16, 0, 4)}, 16, "takes bytes 16 to 0"),
        ({"a": entry(0, 2**80, 2**78)}, 16, "truncated"),
        ({"a": entry(0, 0, 0), "b": entry(0, 8, 2)}, 8, None),
        ({"a": entry(0, 4, -1, -1)}, 4, "expected sizes"),
        ({"a": entry(0, 4, True)}, 4, "expected sizes"),
        ({"a": entry(0, 4, 1.0)}, 4, "expected sizes"),
        ({"a": entry(0, 4, 4, dtype="F8_E4M3")}, 4, "has dtype 'F8_E4M3', supported"),
        ({"a": {}}, 4, "'a' has shape None"),
        ({"a": 3}, 4, "'a' has no description"),
        (b"[]", 0, "damaged header"),
        (b"{", 0, "damaged header"),
        (b"\xff", 0, "damaged header"),
        (b"[" * 100_000, 0, "damaged header"),
        (b'{"a": 1, "a": 2}', 0, "damaged header: a name stands there twice"),
    ],
)
def test_a_wrong_header_is_refused(header, data_bytes, message, tmp_path):
    path = write(tmp_path / "x.safetensors", header, data_bytes)
    if message is None:
        open_safetensors(path)
        return
    with pytest.raises(ValueError, match=f"{path}") as caught:
        open_safetensors(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, b"\x10" + b"\0" * 7])
def test_a_file_too_short_for_its_header_is_refused(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} is truncated"):
        open_safetensors(path)


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)
    with pytest.raises(ValueError, match="header of 1073741824 bytes: refused"):
        open_safetensors(path)


def test_a_file_that_shrinks_later_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path)
    tensor = open_safetensors(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"{path} ended early"):
        tensor.read_rows(0, 100)


sizes = st.integers(-1, 40)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F7"]),
        "shape": st.lists(st.integers(0, 4), max_size=3),
        "data_offsets": st.lists(sizes, min_size=2, max_size=2),
    }
)


@st.composite
def nearly_right(draw) -> dict:
    """A right header, and sometimes a number of it moved."""
    header, position = {}, 0
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True)):
        values = draw(entries)
        size = (
            math.prod(values["shape"])
            * DTYPES.get(values["dtype"], DTYPES["I8"]).itemsize
        )
        values["data_offsets"] = [position, position + size]
        position += size
        header[name] = values
    if header and draw(st.booleans()):
        name = draw(st.sampled_from(sorted(header)))
        header[name]["data_offsets"][draw(st.integers(0, 1))] += draw(
            st.integers(-3, 3)
        )
    return header


@given(header=nearly_right() | st.dictionaries(st.text(), entries), data=st.data())
def test_what_is_accepted_is_what_safetensors_accepts(header, data, tmp_path_factory):
    ends = [values["data_offsets"][1] for values in header.values()]
    length = max(0, max(ends, default=0) + data.draw(st.sampled_from([0, 0, 0, -1, 1])))
    path = write(tmp_path_factory.getbasetemp() / "f.safetensors", header, length)
    try:
        with safe_open(path, "numpy") as file:
            known = set(file.keys())
    except SafetensorError:
        known = None
    if known is None or any(
        values["dtype"] not in DTYPES for values in header.values()
    ):
        with pytest.raises(ValueError, match=r"f.safetensors"):
            open_safetensors(path)
        return
    tensors = open_safetensors(path)
    assert tensors.keys() == known
    for name, tensor in tensors.items():
        if tensor.shape and tensor.shape[0]:
            rows = tensor.read_rows(0, tensor.shape[0])
            assert list(rows.shape) == header[name]["shape"]


@given(data=st.binary(max_size=200))
def test_noise_is_refused(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"noise.safetensors"):
        open_safetensors(path)
