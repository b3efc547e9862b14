"""The format of a weight store: what its manifest says and where its chunks lie.

A store is a folder with `manifest.json` and one zarr3 array a tensor in
`tensors/<name>/`. Arrays are uncompressed and cut along their first axis only, so a
chunk file holds consecutive rows as they lie in memory: row `i` of a tensor is at a
known offset of a known file.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flexjax.extents import BLOCK_BYTES
from flexjax.models.config import (
    OPTConfig,
    parse_config,
    tensor_shapes,
    to_hugging_face,
)

FORMAT = "flexjax-store"
VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "tensors"
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
MIN_CHUNK_BYTES = 4 << 20  # below this a disk is slower (measured)
MAX_CHUNK_BYTES = 8 << 20  # above this a read of a few rows moves too much


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One row of the manifest's table of tensors."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_rows: int
    checksum: str  # xxh3_64 of the bytes in C order, in hexadecimal
    chunk_checksums: tuple[str, ...]  # the same of each chunk's rows, without padding

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of everything at one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory."""
        return self.shape[0] * self.row_bytes

    @property
    def num_chunks(self) -> int:
        """Number of chunk files."""
        return math.ceil(self.shape[0] / self.chunk_rows)

    @property
    def chunk_bytes(self) -> int:
        """Size of every chunk file: zarr pads the last one."""
        return self.chunk_rows * self.row_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunk files."""
        return self.num_chunks * self.chunk_bytes

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(index, first row, row after the last) of every chunk."""
        for index in range(self.num_chunks):
            first = index * self.chunk_rows
            yield index, first, min(first + self.chunk_rows, self.shape[0])


def plan_entry(shape: tuple[int, ...], dtype: np.dtype) -> TensorEntry:
    """The entry of a tensor that is still to be written, without its checksums.

    Among the chunk sizes that read well, takes those that keep every chunk's place in
    memory fit for direct I/O, and of them the one that pads the least.
    """
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    most = min(shape[0], max(1, MAX_CHUNK_BYTES // row_bytes))
    least = min(most, math.ceil(MIN_CHUNK_BYTES / row_bytes))

    def cost(rows: int) -> tuple[bool, int]:
        num_chunks = math.ceil(shape[0] / rows)
        is_crooked = num_chunks > 1 and rows * row_bytes % BLOCK_BYTES != 0
        return is_crooked, num_chunks * rows

    chunk_rows = min(range(most, least - 1, -1), key=cost)
    return TensorEntry(
        shape=shape, dtype=dtype, chunk_rows=chunk_rows, checksum="", chunk_checksums=()
    )


def tensor_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The folder of one tensor's zarr3 array."""
    return folder / TENSORS / name


def chunk_path(
    folder: pathlib.Path, name: str, entry: TensorEntry, index: int
) -> pathlib.Path:
    """The file that holds chunk `index` of a tensor."""
    tail = ".0" * (len(entry.shape) - 1)
    return tensor_folder(folder, name) / f"c.{index}{tail}"


def array_spec(folder: pathlib.Path, name: str, entry: TensorEntry) -> dict[str, Any]:
    """The tensorstore spec of one tensor's zarr3 array."""
    grid = {"chunk_shape": [entry.chunk_rows, *entry.shape[1:]]}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{tensor_folder(folder, name)}/"},
        "metadata": {
            "shape": list(entry.shape),
            "data_type": entry.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "chunk_key_encoding": {
                "name": "default",
                "configuration": {"separator": "."},
            },
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0.0,
        },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says."""

    config: OPTConfig
    dtype: np.dtype
    source: str  # fingerprint of what the store was made from
    tensors: Mapping[str, TensorEntry]


def entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    """An entry as the manifest and the journal write it."""
    return {
        "shape": list(entry.shape),
        "dtype": entry.dtype.name,
        "bytes": entry.nbytes,
        "chunk_rows": entry.chunk_rows,
        "checksum": entry.checksum,
        "chunk_checksums": entry.chunk_checksums,
    }


def entry_from_json(values: Any, origin: str) -> TensorEntry:
    """Reads back what `entry_to_json` wrote.

    Raises:
        ValueError: the values are not a tensor's; the message begins with `origin`.
    """
    try:
        entry = TensorEntry(
            shape=tuple(int(size) for size in values["shape"]),
            dtype=DTYPES[values["dtype"]],
            chunk_rows=int(values["chunk_rows"]),
            checksum=str(values["checksum"]),
            chunk_checksums=tuple(values["chunk_checksums"]),
        )
        consistent = (values["bytes"], len(entry.chunk_checksums)) == (
            entry.nbytes,
            entry.num_chunks,
        )
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{origin} is damaged ({error!r}); convert again") from error
    if not consistent or entry.chunk_rows < 1 or min(entry.shape, default=0) < 1:
        raise ValueError(
            f"{origin} is damaged: its shape, bytes and chunks disagree; convert again"
        )
    return entry


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The content of `manifest.json`."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": manifest.dtype.name,
        "source": manifest.source,
        "config": to_hugging_face(manifest.config, manifest.dtype.name),
        "tensors": {
            name: entry_to_json(entry) for name, entry in manifest.tensors.items()
        },
    }


def manifest_from_json(values: Any, origin: str) -> Manifest:
    """Reads back what `manifest_to_json` wrote.

    Raises:
        ValueError: another format or version, or a table that does not fit the config;
            the message begins with `origin`.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{origin} is not the manifest of a weight store")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{origin} has format version {values.get('version')!r}, this flexjax "
            f"reads version {VERSION}; convert the checkpoint again with this flexjax"
        )
    config, table = values.get("config"), values.get("tensors")
    if not isinstance(config, dict) or not isinstance(table, dict):
        raise ValueError(f"{origin} has no config or no tensors; convert again")
    if values.get("dtype") not in DTYPES:
        raise ValueError(
            f"{origin} has dtype {values.get('dtype')!r}, expected one of "
            f"{', '.join(DTYPES)}; convert again"
        )
    manifest = Manifest(
        config=parse_config(config, origin),
        dtype=DTYPES[values["dtype"]],
        source=str(values.get("source")),
        tensors={
            name: entry_from_json(entry, f"{origin}: tensor {name!r}")
            for name, entry in table.items()
        },
    )
    _check_table(manifest, origin)
    return manifest


def _check_table(manifest: Manifest, origin: str) -> None:
    shapes = tensor_shapes(manifest.config)
    for name, shape in shapes.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            raise ValueError(f"{origin} lacks tensor {name!r}; convert again")
        if entry.shape != shape or entry.dtype != manifest.dtype:
            raise ValueError(
                f"{origin}: tensor {name!r} is {entry.dtype.name}{list(entry.shape)}, "
                f"but its config asks for {manifest.dtype.name}{list(shape)}; convert "
                "again"
            )
    if unknown := manifest.tensors.keys() - shapes.keys():
        raise ValueError(
            f"{origin} has tensors that its config does not know: "
            f"{', '.join(sorted(unknown))}; convert again"
        )
