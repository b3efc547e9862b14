"""The format of a weight store: what its manifest says and where its chunks lie.

A store is a folder with `manifest.json` and one zarr3 array a tensor in
`tensors/<name>/`. Arrays are uncompressed and cut along their first axis only, so a
chunk file holds consecutive rows as they lie in memory: row `i` of a tensor is at a
known offset of a known file. A quantized tensor is an array of bytes whose rows hold
their own scales and minima (`flexjax.quant`), so the same is true of it.
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
from flexjax.policy import BITS
from flexjax.quant import Quantization, wide_shape

FORMAT = "flexjax-store"
VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "tensors"
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
BYTES = np.dtype(np.uint8)  # of what is quantized
TABLE_BITS = 8  # of the tables of tokens, where weights are quantized
MIN_CHUNK_BYTES = 4 << 20  # below this a disk is slower (measured)
MAX_CHUNK_BYTES = 8 << 20  # above this a read of a few rows moves too much


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One row of the manifest's table of tensors."""

    shape: tuple[int, ...]  # as it is stored
    dtype: np.dtype  # likewise: uint8 where it is quantized
    chunk_rows: int
    checksum: str  # xxh3_64 of the bytes in C order, in hexadecimal
    chunk_checksums: tuple[str, ...]  # the same of each chunk's rows, without padding
    quantization: Quantization | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of everything at one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as it is stored."""
        return self.shape[0] * self.row_bytes

    @property
    def used_shape(self) -> tuple[int, ...]:
        """The shape in which a layer uses it."""
        if self.quantization is None:
            return self.shape
        return wide_shape(self.shape, self.quantization)

    @property
    def used_row_bytes(self) -> int:
        """Bytes of one row as a layer uses it."""
        how = self.quantization
        itemsize = self.dtype.itemsize if how is None else how.itemsize
        return math.prod(self.used_shape[1:]) * itemsize

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


def plan_entry(
    shape: tuple[int, ...],
    dtype: np.dtype,
    quantization: Quantization | None = None,
) -> TensorEntry:
    """The entry of a tensor that is still to be written, without its checksums.

    Among the chunk sizes that read well, takes those that keep every chunk's place in
    memory fit for direct I/O, and of them the one that pads the least.
    """
    if quantization is not None:
        shape, dtype = (*shape[:-1], quantization.width(shape[-1])), BYTES
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    most = min(shape[0], max(1, MAX_CHUNK_BYTES // row_bytes))
    least = min(most, math.ceil(MIN_CHUNK_BYTES / row_bytes))

    def cost(rows: int) -> tuple[bool, int]:
        num_chunks = math.ceil(shape[0] / rows)
        is_crooked = num_chunks > 1 and rows * row_bytes % BLOCK_BYTES != 0
        return is_crooked, num_chunks * rows

    chunk_rows = min(range(most, least - 1, -1), key=cost)
    return TensorEntry(
        shape=shape,
        dtype=dtype,
        chunk_rows=chunk_rows,
        checksum="",
        chunk_checksums=(),
        quantization=quantization,
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
            "fill_value": entry.dtype.type(0).item(),
        },
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` says."""

    config: OPTConfig
    dtype: np.dtype
    source: str  # fingerprint of what the store was made from
    tensors: Mapping[str, TensorEntry]
    quantization: Quantization | None = None  # of the decoder layers' matrices


def quantization_of(
    name: str, shape: tuple[int, ...], matrices: Quantization | None
) -> Quantization | None:
    """How a tensor of a store is quantized whose matrices are quantized in this way.

    The tables of tokens are kept at `TABLE_BITS`; vectors, positions and the narrow
    projections of 350m, which are small, stay as they are.
    """
    if matrices is None or len(shape) < 2:
        return None
    if name.startswith("layers."):
        return matrices
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return dataclasses.replace(matrices, bits=TABLE_BITS)
    return None


def planned_entries(
    config: OPTConfig, dtype: np.dtype, quantization: Quantization | None
) -> dict[str, TensorEntry]:
    """The entries of all tensors of a store that is still to be written.

    Raises:
        ValueError: groups do not divide the rows of a tensor, which is named.
    """
    planned: dict[str, TensorEntry] = {}
    for name, shape in tensor_shapes(config).items():
        try:
            how = quantization_of(name, shape, quantization)
            planned[name] = plan_entry(shape, dtype, how)
        except ValueError as error:
            raise ValueError(f"tensor {name!r} cannot be quantized: {error}") from error
    return planned


def entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    """An entry as the manifest and the journal write it."""
    how = entry.quantization
    return {
        **({} if how is None else {"quantization": dataclasses.asdict(how)}),
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
            dtype=(DTYPES | {BYTES.name: BYTES})[values["dtype"]],
            chunk_rows=int(values["chunk_rows"]),
            checksum=str(values["checksum"]),
            chunk_checksums=tuple(values["chunk_checksums"]),
            quantization=_quantization_from_json(values),
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


def _quantization_from_json(values: Any) -> Quantization | None:
    """Raises KeyError, TypeError or ValueError where it is none."""
    found = values.get("quantization")
    if found is None:
        return None
    how = Quantization(**found)
    if how.bits not in BITS or how.group_size < 1 or how.dtype not in DTYPES:
        raise ValueError(f"quantization {found}")
    return how


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The content of `manifest.json`."""
    how = manifest.quantization
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": manifest.dtype.name,
        "source": manifest.source,
        **({} if how is None else {"quantization": dataclasses.asdict(how)}),
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
    if str(values.get("dtype")) not in DTYPES:
        raise ValueError(
            f"{origin} has dtype {values.get('dtype')!r}, expected one of "
            f"{', '.join(DTYPES)}; convert again"
        )
    try:
        how = _quantization_from_json(values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{origin} is damaged ({error!r}); convert again") from error
    if how is not None and how.dtype != values["dtype"]:
        raise ValueError(
            f"{origin} is damaged: its dtype is {values['dtype']}, but it is quantized "
            f"from {how.dtype}; convert again"
        )
    manifest = Manifest(
        quantization=how,
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


def _kind(entry: TensorEntry) -> tuple[object, ...]:
    return entry.shape, entry.dtype, entry.quantization


def _check_table(manifest: Manifest, origin: str) -> None:
    planned = planned_entries(manifest.config, manifest.dtype, manifest.quantization)
    for name, plan in planned.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            raise ValueError(f"{origin} lacks tensor {name!r}; convert again")
        if _kind(entry) != _kind(plan):
            raise ValueError(
                f"{origin}: tensor {name!r} is {entry.dtype.name}{list(entry.shape)}, "
                f"but its config asks for {plan.dtype.name}{list(plan.shape)}; convert "
                "again"
            )
    if unknown := manifest.tensors.keys() - planned.keys():
        raise ValueError(
            f"{origin} has tensors that its config does not know: "
            f"{', '.join(sorted(unknown))}; convert again"
        )
