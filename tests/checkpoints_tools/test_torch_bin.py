"""`.bin` files: read as torch would, and refused where they could do more than that."""

# The pickler in Python, which lets names be made up, has no types.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportIncompatibleMethodOverride=false

import builtins
import collections
import copyreg
import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints_tools import convert
from checkpoints_tools.torch_bin import open_bin
from tests.checkpoints_tools.conftest import (
    GOLDEN,
    assert_same,
    make_tensors,
    prefixed,
    read_store,
    write_config,
)
from tests.checkpoints_tools.torch_files import (
    STORAGE_NAMES,
    Call,
    Name,
    Storage,
    TorchPickler,
    View,
    save,
    torch_pickle,
    write_bin,
)

TorchPickler.dispatch[Storage] = TorchPickler.save_storage


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", STORAGE_NAMES, ids=str)
def test_views_of_storages_are_read(protocol, dtype, path):
    flat = np.arange(200).astype(dtype)
    state = {
        "plain": View("0", flat, (10, 20)),
        "part": View("0", flat, (3, 20), offset=40),
        "transposed": View("0", flat, (20, 10), (1, 20)),
        "strided": View("0", flat, (5, 4, 2), (40, 3, 2), 1),
        "repeated": View("0", flat, (3, 4), (0, 1), 6),
        "one column": View("0", flat, (7, 1), (1, 9)),
    }
    tensors = open_bin(save(path, state, protocol=protocol))
    assert list(tensors) == list(state)
    for name, view in state.items():
        steps = [step * dtype.itemsize for step in view.stride]
        expected = np.lib.stride_tricks.as_strided(
            flat[view.offset :], view.shape, steps
        )
        tensor = tensors[name]
        assert tensor.shape == view.shape
        assert tensor.dtype == dtype
        for first, last in ((0, view.shape[0]), (1, 2)):
            rows = tensor.read_rows(first, last)
            assert rows.tobytes() == expected[first:last].tobytes(), name


def test_parameters_and_ordered_dicts_are_tensors(path):
    flat = np.arange(6, dtype=np.float32)
    rebuild = Name("torch._utils", "_rebuild_parameter")
    view = View("0", flat, (2, 3))
    state = collections.OrderedDict(
        weight=Call(rebuild, view, True, collections.OrderedDict())
    )
    state._metadata = collections.OrderedDict(version=1)  # as a module's state_dict has
    data = torch_pickle(state)
    assert pickle.BUILD in data
    tensors = open_bin(write_bin(path, data, {"0": flat}))
    np.testing.assert_array_equal(
        tensors["weight"].read_rows(0, 2), view.flat.reshape(2, 3)
    )


def test_a_whole_model_converts(tmp_path):
    tensors = make_tensors(dtype=np.float16)
    state = {
        name: View(str(i), data.reshape(-1), data.shape)
        for i, (name, data) in enumerate(prefixed(tensors).items())
    }
    write_config(tmp_path)
    save(tmp_path / "pytorch_model.bin", state)
    assert convert.main([str(tmp_path), str(tmp_path / "store")]) == 0
    assert_same(read_store(tmp_path / "store"), tensors)


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class EvilState(Evil):
    def __reduce__(self):
        return (collections.OrderedDict, (), {"x": Evil(*self.call)})


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["alone", "nested", "as an argument", "as a state"])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (builtins.eval, "eval"),
        (getattr, "getattr"),
        (io.open, "open"),
    ],
)
def test_a_pickle_that_calls_is_refused_by_name(function, name, place, protocol, path):
    evil = Evil(function, "touch /tmp/flexjax-was-here")
    match place:
        case "nested":
            evil = {"a": [({"b": evil},)]}
        case "as an argument":
            evil = Evil(collections.OrderedDict, [("a", evil)])
        case "as a state":
            evil = EvilState(function, "touch /tmp/flexjax-was-here")
    write_bin(path, pickle.dumps(evil, protocol))
    with pytest.raises(ValueError, match=f"{path} asks for ") as caught:
        open_bin(path)
    # Protocols 0 and 1 have opcodes that torch never writes, which may come first.
    assert name in str(caught.value) or (
        protocol < 2 and "pickle opcode" in str(caught.value)
    )
    assert not pathlib.Path("/tmp/flexjax-was-here").exists()


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (b"\x80\x02cos\nsystem\n.", "os.system"),
        (b"(S'echo'\nios\nsystem\n.", "pickle opcode"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x02\x82\x01.", "pickle opcode EXT1 1"),
        (b"\x80\x02\x83\x01\x00.", "pickle opcode EXT2 1"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "pickle opcode EXT4 1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", "_rebuild_tensor"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
        (b"\x80\x02ccollections\nOrderedDict.update\n.", "OrderedDict.update"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "memo entry 2147483647"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "pickle opcode NEWOBJ"),
    ],
)
def test_a_crafted_pickle_is_refused_by_name(data, asked, path):
    write_bin(path, data)
    with pytest.raises(ValueError, match=f"{path} asks for ") as caught:
        open_bin(path)
    assert asked in str(caught.value)
    assert "refused" in str(caught.value)


def test_extension_codes_are_not_even_looked_up(path):
    copyreg.add_extension("os", "system", 240)
    try:
        write_bin(path, pickle.dumps(os.system, 2).replace(b"cposix", b"cos"))
        write_bin(path, b"\x80\x02\x82\xf0X\x01\x00\x00\x00a\x85R.")
        with pytest.raises(ValueError, match="pickle opcode EXT1 240"):
            open_bin(path)
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({}, 2), "holds a _Dict|holds a dict"),
        (pickle.dumps([1], 2), "holds a list"),
        (pickle.dumps({"epoch": 3}, 2), "holds 'epoch', a int.*state_dict"),
        (
            torch_pickle({1: View("0", np.ones(2, np.float32), (2,))}),
            "holds 1, a Tensor",
        ),
        (b"", "damaged pickle"),
        (b"\x80\x02}", "damaged pickle"),
        (b"\x80\x02)R.", "damaged pickle"),
        (b"\x80\x02K\x01Q.", "damaged pickle"),
        # A state given to a storage's name and to a tensor, where there is none.
        (b"\x80\x02ctorch\nHalfStorage\n}b.", "damaged pickle"),
        (
            torch_pickle(View("0", np.ones(2, np.float32), (2,)))[:-1]
            + b"}X\1\0\0\0aK\1sb.",
            "damaged pickle",
        ),
    ],
)
def test_what_is_not_named_tensors_is_refused(data, message, path):
    write_bin(path, data, {"0": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=f"{path} has a |{path} holds a?") as caught:
        open_bin(path)
    assert caught.match(message)


FLAT = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (View("0", FLAT, (3, 5)), "reaches past the end of its storage of 12"),
        (View("0", FLAT, (3, 4), offset=1), "reaches past the end"),
        (View("0", FLAT, (2, 2), (11, 1)), "reaches past the end"),
        (View("0", FLAT, (3, 4), offset=-1), "damaged description"),
        (View("0", FLAT, (3, -4), (4, 1)), "damaged description"),
        (View("0", FLAT, (3, 4), (-4, 1)), "damaged description"),
        (View("0", FLAT, (3,), (4, 1)), "damaged description"),
        (View("0", FLAT, (3.0,), (1,)), "damaged description"),
        (View("1", FLAT, (3,)), "lacks its member 'archive/data/1'"),
        (View("../data.pkl", FLAT, (3,)), "lacks its member"),
        (View("short", FLAT, (3,)), "has 4 bytes, expected 48"),
    ],
)
def test_a_view_stays_inside_its_storage(view, message, path):
    storages = {"0": FLAT, "short": FLAT[:1]}
    write_bin(path, torch_pickle({"w": view}), storages)
    with pytest.raises(ValueError, match=message) as caught:
        open_bin(path)
    assert str(path) in str(caught.value)


def test_torchs_old_format_is_refused_with_advice(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(ValueError, match=f"{path} is not in torch's zip.*safetensors"):
        open_bin(path)


def test_a_compressed_archive_is_refused(path):
    data = torch_pickle({"w": View("0", FLAT, (12,))})
    write_bin(path, data, {"0": FLAT}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"{path} is compressed"):
        open_bin(path)


def test_another_zip_file_is_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(ValueError, match=f"{path} is a zip file, but not one that"):
        open_bin(path)


def test_other_byte_orders_are_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", torch_pickle({}))
        archive.writestr("a/byteorder", "big")
    with pytest.raises(ValueError, match="byte order b'big'"):
        open_bin(path)


SHARD = (GOLDEN / "opt-sharded-bin-f16/pytorch_model-00001-of-00002.bin").read_bytes()


@given(data=st.data())
def test_a_harmed_file_is_read_or_refused_but_nothing_else(data, tmp_path_factory):
    harmed = bytearray(SHARD)
    for _ in range(data.draw(st.integers(1, 4))):
        # The descriptions stand at both ends; what is between are numbers.
        near = data.draw(st.integers(0, 6000))
        harmed[data.draw(st.sampled_from([near, -near - 1]))] = data.draw(
            st.integers(0, 255)
        )
    path = tmp_path_factory.getbasetemp() / "harmed.bin"
    path.write_bytes(harmed)
    refusal = str(path)
    try:
        for tensor in open_bin(path).values():
            tensor.read_rows(0, tensor.shape[0])
    except (ValueError, OSError) as error:
        refusal = str(error)
    assert str(path) in refusal
