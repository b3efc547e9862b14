"""Reading the pickle inside `pytorch_model.bin` without running it.

A pickle is a program, so nothing of it is obeyed but what a tensor needs: opcodes and
names that are not on the lists below are refused by name.
"""

import collections
import io
import pathlib
import pickle
import pickletools
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# What torch writes for a dict of tensors, in pickle protocols 2 to 5.
OPCODES = frozenset(
    {
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "EMPTY_DICT",
        "EMPTY_TUPLE",
        "EMPTY_LIST",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "MEMOIZE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "GLOBAL",
        "STACK_GLOBAL",
        "BINPERSID",
        "REDUCE",
        "BUILD",
    }
)


class Storage(NamedTuple):
    """A member of the archive, as the pickle refers to it."""

    dtype: np.dtype
    key: str
    size: int  # elements


class Tensor(NamedTuple):
    """A view of a storage, as the pickle describes it: not checked yet."""

    storage: Any
    offset: Any  # elements
    shape: Any
    stride: Any  # elements


def read_pickle(data: bytes, path: pathlib.Path) -> Any:
    """What `torch.save` described: usually a dict of `Tensor`.

    Raises:
        ValueError: the pickle is damaged or asks for anything but tensors; the message
            begins with `path`.
    """
    try:
        _check_opcodes(data, path)
        return _Unpickler(data, path).load()
    except _Refused as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a crafted pickle can make its reader raise anything
        raise ValueError(f"{path} has a damaged pickle: {error!r}") from error


class _Refused(Exception):
    """The pickle asks for something that is not part of a tensor."""


def _refuse(path: pathlib.Path, what: str) -> NoReturn:
    raise _Refused(
        f"{path} asks for {what}, which a checkpoint has no need of and which could "
        "run code: refused; use a safetensors version of the model"
    )


def _check_opcodes(data: bytes, path: pathlib.Path) -> None:
    """Refuses what builds objects in other ways, and absurd memo indices."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            _find(module, name, path)
        if opcode.name not in OPCODES:
            code = "" if argument is None else f" {argument!r}"
            _refuse(path, f"pickle opcode {opcode.name}{code}")
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(data):
            _refuse(path, f"memo entry {argument}")


def _find(module: str, name: str, path: pathlib.Path) -> Any:
    """What stands for a name that the pickle asks for."""
    match module, name:
        case "torch._utils", "_rebuild_tensor_v2":
            return _rebuild_tensor
        case "torch._utils", "_rebuild_parameter":
            return _rebuild_parameter
        case "collections", "OrderedDict":
            return _Dict
        case "torch", storage if storage in STORAGES:
            return storage
    _refuse(path, f"{module}.{name}")


class _Unpickler(pickle.Unpickler):
    """Knows storages, the two functions that make tensors of them, and OrderedDict."""

    def __init__(self, data: bytes, path: pathlib.Path):
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        return _find(module, name, self._path)

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _device, size = pid
        if kind != "storage" or type(key) is not str or type(size) is not int:
            raise ValueError(f"a storage is described as {pid!r}")
        return Storage(STORAGES[storage], key, size)


class _Dict(collections.OrderedDict):
    """A state dict; what torch attaches to it beside its items is left out."""

    def __init__(self, *args: Any):
        super().__init__(*args)

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(*args: Any) -> Tensor:
    storage, offset, shape, stride = args[:4]
    return Tensor(storage, offset, shape, stride)


def _rebuild_parameter(*args: Any) -> Any:
    return args[0]
