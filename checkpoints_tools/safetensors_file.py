"""Reading safetensors files by rows, with every claim of the header checked first.

The safetensors package maps whole files, so that reading a model fills memory with it;
plain reads keep a conversion's memory bounded, and bfloat16 needs no torch.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from checkpoints_tools.source import SourceTensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def open_safetensors(path: pathlib.Path) -> dict[str, SourceTensor]:
    """The tensors of one file, still unread.

    Raises:
        ValueError: the file is truncated or its header is wrong; the message names it.
    """
    return {
        name: SourceTensor(
            shape=span.shape,
            dtype=span.dtype,
            file=path,
            read_rows=row_reader(path, span),
        )
        for name, span in read_header(path).items()
    }


def row_reader(path: pathlib.Path, span: Span) -> Callable[[int, int], np.ndarray]:
    """A function that reads rows of a tensor that lies in one piece in a file."""
    row_bytes = math.prod(span.shape[1:]) * span.dtype.itemsize

    def read_rows(first: int, last: int) -> np.ndarray:
        rows = np.empty((last - first, *span.shape[1:]), span.dtype)
        read_exactly(path, span.offset + first * row_bytes, rows)
        return rows

    return read_rows


def read_exactly(path: pathlib.Path, offset: int, out: np.ndarray) -> None:
    """Fills `out` from `offset` on.

    Raises:
        OSError: the file ends before.
    """
    into = out.reshape(-1).view(np.uint8)
    with open(path, "rb", buffering=0) as file:
        filled = 0
        while filled < into.nbytes:
            count = os.preadv(file.fileno(), [into[filled:]], offset + filled)
            if not count:
                raise OSError(f"{path} ended early; download it again")
            filled += count


def read_header(path: pathlib.Path) -> dict[str, Span]:
    """The table of tensors of a safetensors file, checked against the file's size.

    Raises:
        ValueError: the file is truncated or its header is wrong; the message names it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or is not a safetensors file: it has {size} "
                "bytes; download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes: refused")
        header = _parse(file.read(length), path)
    start = 8 + length
    spans = {
        name: _span(name, values, path)
        for name, values in header.items()
        if name != "__metadata__"
    }
    _check_coverage(spans, size - start, path)
    return {
        name: dataclasses.replace(span, offset=start + span.offset)
        for name, span in spans.items()
    }


def _parse(data: bytes, path: pathlib.Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name stands there twice")
        return values

    try:
        header = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} has a damaged header: {error}; download it again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a damaged header: not a table of tensors")
    return header


def _span(name: str, values: Any, path: pathlib.Path) -> Span:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path}: tensor {name!r} {what}; download it again")

    if not isinstance(values, dict):
        raise wrong("has no description")
    shape, offsets = values.get("shape"), values.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"has shape {shape!r} and offsets {offsets!r}, expected sizes")
    dtype = DTYPES.get(str(values.get("dtype")))
    if dtype is None:
        raise wrong(
            f"has dtype {values.get('dtype')!r}, supported are {', '.join(DTYPES)}"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise wrong(
            f"takes bytes {begin} to {end}, which {dtype.name}{shape} does not fill"
        )
    return Span(dtype=dtype, shape=tuple(shape), offset=begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        type(value) is int and value >= 0 for value in values
    )


def _check_coverage(
    spans: dict[str, Span], data_bytes: int, path: pathlib.Path
) -> None:
    """The tensors must fill the file without gap or overlap, as the format demands."""
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: item[1].offset):
        nbytes = math.prod(span.shape) * span.dtype.itemsize
        if span.offset != position and nbytes:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {span.offset}, expected "
                f"{position}: there is a gap or an overlap; download it again"
            )
        position += nbytes
        if position > data_bytes:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte {position} of its "
                f"data, which has {data_bytes}; download it again"
            )
    if position != data_bytes:
        raise ValueError(
            f"{path} has {data_bytes - position} bytes after its last tensor; download "
            "it again"
        )
