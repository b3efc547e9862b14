"""Reading `pytorch_model.bin` without torch and without running what it contains.

Such a file is a zip archive: a pickle that describes tensors, and one uncompressed
member for each storage, which is read in place.
"""

import math
import pathlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np

from checkpoints_tools.safetensors_file import Span, row_reader
from checkpoints_tools.source import SourceTensor
from checkpoints_tools.tensor_pickle import Storage, Tensor, read_pickle

MAX_PICKLE_BYTES = 64 << 20  # a description of tensors is far smaller


def open_bin(path: pathlib.Path) -> dict[str, SourceTensor]:
    """The tensors of one file, still unread.

    Raises:
        ValueError: truncated, in torch's old format, or holding anything but tensors;
            the message names the file and what was found.
    """
    with _open_zip(path) as archive:
        return _open_archive(path, archive)


def _open_zip(path: pathlib.Path) -> zipfile.ZipFile:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        raise ValueError(
            f"{path} is not in torch's zip format (of torch 1.6 and later); save the "
            "model as safetensors: `model.save_pretrained(folder)` does it"
        )
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # a damaged file can make zipfile raise anything
        raise ValueError(
            f"{path} is truncated or damaged: {error}; download it again"
        ) from error


def _open_archive(
    path: pathlib.Path, archive: zipfile.ZipFile
) -> dict[str, SourceTensor]:
    descriptions = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(descriptions) != 1:
        raise ValueError(f"{path} is a zip file, but not one that torch.save wrote")
    root = descriptions[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist():
        order = _read_member(path, archive, f"{root}byteorder")
        if order != b"little":
            raise ValueError(f"{path} has byte order {order!r}, expected b'little'")
    state = read_pickle(_read_member(path, archive, descriptions[0]), path)
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{path} holds a {type(state).__name__}, expected named tensors"
        )
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} holds {name!r}, a {type(tensor).__name__.lstrip('_')}, where "
                "only tensors are expected; save the model's `state_dict()` alone"
            )
        tensors[name] = _resolve(path, archive, root, name, tensor)
    return tensors


def _read_member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    _check_stored(path, info)
    if info.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"{path}: {name!r} has {info.file_size} bytes: refused")
    try:
        return archive.read(info)
    except Exception as error:  # a damaged file can make zipfile raise anything
        raise ValueError(
            f"{path} is damaged in {name!r}: {error}; download it again"
        ) from error


def _resolve(
    path: pathlib.Path,
    archive: zipfile.ZipFile,
    root: str,
    name: str,
    tensor: Tensor,
) -> SourceTensor:
    """Checks that a view lies inside its storage and the storage inside the file."""
    storage, shape, stride = tensor.storage, tensor.shape, tensor.stride
    if (
        not isinstance(storage, Storage)
        or not _are_sizes(shape)
        or not _are_sizes(stride)
        or not _are_sizes((tensor.offset,))
        or len(shape) != len(stride)
    ):
        raise ValueError(f"{path}: tensor {name!r} has a damaged description")
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and tensor.offset + reach >= storage.size:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(shape)} reaches past the end of "
            f"its storage of {storage.size} elements; download it again"
        )
    start = _storage_start(path, archive, f"{root}data/{storage.key}", storage)
    span = Span(storage.dtype, shape, start + tensor.offset * storage.dtype.itemsize)
    contiguous = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    steps = zip(shape, stride, contiguous, strict=True)
    if all(size == 1 or step == wanted for size, step, wanted in steps):
        read_rows = row_reader(path, span)
    else:
        read_rows = _strided_reader(path, span, stride, reach + 1)
    return SourceTensor(
        shape=shape, dtype=storage.dtype, file=path, read_rows=read_rows
    )


def _are_sizes(values: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(
        type(value) is int and value >= 0 for value in values
    )


def _check_stored(path: pathlib.Path, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(
            f"{path} is compressed or encrypted, which torch.save does not do; save "
            "the model as safetensors"
        )


def _storage_start(
    path: pathlib.Path, archive: zipfile.ZipFile, member: str, storage: Storage
) -> int:
    """Offset in the file of a storage's first byte."""
    if member not in archive.namelist():
        raise ValueError(f"{path} lacks its member {member!r}; download it again")
    info = archive.getinfo(member)
    nbytes = storage.size * storage.dtype.itemsize
    _check_stored(path, info)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30).ljust(30, b"\0")
    magic, name_length, extra_length = struct.unpack("<4s22xHH", header)
    start = info.header_offset + 30 + name_length + extra_length
    if magic != b"PK\x03\x04" or start + nbytes > path.stat().st_size:
        raise ValueError(f"{path} is truncated in {member!r}; download it again")
    if info.file_size != nbytes:
        raise ValueError(
            f"{path}: {member!r} has {info.file_size} bytes, expected {nbytes}; "
            "download it again"
        )
    return start


def _strided_reader(
    path: pathlib.Path, span: Span, stride: tuple[int, ...], elements: int
) -> Callable[[int, int], np.ndarray]:
    """A function that reads rows of a tensor whose elements are spread in the file."""
    strides = [step * span.dtype.itemsize for step in stride]

    def read_rows(first: int, last: int) -> np.ndarray:
        # Mapped anew each time, so that what was read can leave memory again.
        flat = np.memmap(path, span.dtype, "r", span.offset, (elements,))
        view = np.lib.stride_tricks.as_strided(flat, span.shape, strides)
        return np.array(view[first:last])

    return read_rows
