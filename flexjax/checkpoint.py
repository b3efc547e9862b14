"""Reading the weight store on disk, into the caller's buffers."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import xxhash

from flexjax.extents import Extent, as_bytes, read_extent, reads_direct
from flexjax.models.config import OPTConfig, to_hugging_face
from flexjax.quant import Quantization
from flexjax.store_format import (
    MANIFEST,
    Manifest,
    TensorEntry,
    chunk_path,
    manifest_from_json,
)

EMBEDDED_MODEL = pathlib.Path(__file__).parent / "embedded_model"  # comes along


def open_store(folder: str | os.PathLike[str]) -> "WeightStore":
    """Opens a finished weight store; finds missing and truncated files at once.

    Raises:
        ValueError: no store, another version, or one that is damaged.
    """
    folder = pathlib.Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest.tensors)
    return WeightStore(folder, manifest)


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a finished weight store (which may still be damaged)."""
    return pathlib.Path(folder, MANIFEST).is_file()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads `manifest.json` and checks it against itself, but no other file.

    Raises:
        ValueError: no manifest, or not one of a store that can be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a finished weight store: it has no {MANIFEST}; make one "
            f"with `python -m checkpoints_tools.convert CHECKPOINT {folder}`"
        )
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; convert again") from error
    return manifest_from_json(values, str(path))


def _check_files(folder: pathlib.Path, tensors: Mapping[str, TensorEntry]) -> None:
    for name, entry in tensors.items():
        for index in range(entry.num_chunks):
            path = chunk_path(folder, name, entry, index)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(
                    f"{path} of tensor {name!r} is missing ({error.strerror}); convert "
                    "the checkpoint again"
                ) from error
            if size != entry.chunk_bytes:
                raise ValueError(
                    f"{path} of tensor {name!r} has {size} bytes, expected "
                    f"{entry.chunk_bytes}; convert the checkpoint again"
                )


class WeightStore:
    """A finished weight store that is open for reading, from any thread."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest):
        self.folder = folder
        self.config: OPTConfig = manifest.config
        self.dtype: np.dtype = manifest.dtype
        self.source: str = manifest.source
        self.quantization: Quantization | None = manifest.quantization
        self.tensors: Mapping[str, TensorEntry] = manifest.tensors
        name, entry = next(iter(self.tensors.items()))
        self.direct_io = reads_direct(chunk_path(folder, name, entry, 0))
        # Made once: a decode asks for all of them in every step.
        self._paths: dict[str, list[pathlib.Path]] = {}

    @functools.cached_property
    def checksum(self) -> str:
        """xxh3_128 of configuration and tensors, wherever they came from."""
        config = to_hugging_face(self.config, self.dtype.name)
        tensors = {name: entry.checksum for name, entry in self.tensors.items()}
        content = json.dumps([config, tensors], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(content.encode())

    def read(self, name: str, out: np.ndarray) -> None:
        """Fills `out` with a tensor.

        Raises:
            ValueError: no such tensor, or `out` does not fit it.
            OSError: a file could not be read; the message names it and the tensor.
        """
        self.read_rows(name, 0, self._entry(name).shape[0], out)

    def read_rows(self, name: str, first: int, last: int, out: np.ndarray) -> None:
        """Like `read`, for rows `first` to `last - 1` only."""
        try:
            for extent in self.extents(name, first, last, out):
                read_extent(extent)
        except OSError as error:
            raise self.failure(name, error) from error

    def extents(
        self, name: str, first: int, last: int, out: np.ndarray
    ) -> list[Extent]:
        """Where rows `first` to `last - 1` of a tensor lie, and their places in `out`.

        Raises:
            ValueError: no such tensor or rows, or `out` does not fit them.
        """
        entry = self._entry(name)
        if not 0 <= first < last <= entry.shape[0]:
            raise ValueError(
                f"rows {first}:{last} are not in tensor {name!r} of {entry.shape[0]}"
            )
        _check_buffer(name, entry, last - first, out)
        memory, found, paths = as_bytes(out), [], self.chunk_paths(name)
        for index in range(first // entry.chunk_rows, entry.num_chunks):
            chunk_first = index * entry.chunk_rows
            begin = max(first, chunk_first)
            end = min(last, chunk_first + entry.chunk_rows)
            if begin >= end:
                break
            into = slice(
                (begin - first) * entry.row_bytes, (end - first) * entry.row_bytes
            )
            found.append(
                Extent(
                    paths[index],
                    (begin - chunk_first) * entry.row_bytes,
                    memory[into],
                )
            )
        return found

    def failure(self, name: str, error: OSError) -> OSError:
        """What to raise where reading the extents of a tensor raised `error`."""
        return OSError(
            f"cannot read tensor {name!r} of {self.folder}: {error}; convert the "
            "checkpoint again if the disk is well"
        )

    def gather_rows(self, name: str, ids: np.ndarray, out: np.ndarray) -> None:
        """Fills `out[i]` with row `ids[i]`, reading each distinct row once.

        Goes through the page cache: rows are small, and popular ones come again.

        Raises:
            ValueError: no such tensor, an id outside it, or `out` does not fit.
            OSError: a file could not be read; the message names it.
        """
        entry = self._entry(name)
        ids = np.asarray(ids).reshape(-1)
        _check_buffer(name, entry, len(ids), out)
        if not len(ids):
            return
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"ids of rows of {name!r} are {ids.dtype}, not integers")
        rows, where, inverse = np.unique(ids, return_index=True, return_inverse=True)
        if rows[0] < 0 or rows[-1] >= entry.shape[0]:
            raise ValueError(
                f"rows {rows[0]}..{rows[-1]} are not all in tensor {name!r}, which has "
                f"{entry.shape[0]} rows"
            )
        into = as_bytes(out).reshape(len(ids), -1)
        chunks = rows // entry.chunk_rows
        for index in np.unique(chunks):
            inside = chunks == index
            self._read_from_chunk(
                self.chunk_paths(name)[index],
                (rows[inside] - index * entry.chunk_rows) * entry.row_bytes,
                [into[target] for target in where[inside]],
            )
        source = where[inverse]
        again = source != np.arange(len(ids))
        out[again] = out[source[again]]

    def verify(self, name: str, data: np.ndarray, first_row: int = 0) -> None:
        """Checks that `data` holds the rows from `first_row` on as they were converted.

        A chunk that `data` covers in part only is read once more, for its checksum.

        Raises:
            ValueError: a byte differs; the message names the tensor and the checksums.
            OSError: a file could not be read.
        """
        entry = self._entry(name)
        last_row = first_row + len(data)
        if not 0 <= first_row < last_row <= entry.shape[0]:
            raise ValueError(
                f"rows {first_row}:{last_row} are not in tensor {name!r} of "
                f"{entry.shape[0]}"
            )
        for index, first, last in entry.chunks():
            begin, end = max(first, first_row), min(last, last_row)
            if begin < end:
                rows = as_bytes(data[begin - first_row : end - first_row])
                skipped_bytes = (begin - first) * entry.row_bytes
                chunk_bytes = (last - first) * entry.row_bytes
                self._verify_chunk(name, index, rows, skipped_bytes, chunk_bytes)

    def _verify_chunk(
        self, name: str, index: int, rows: np.ndarray, offset: int, chunk_bytes: int
    ) -> None:
        entry, chunk = self.tensors[name], rows
        if rows.size < chunk_bytes:
            path = self.chunk_paths(name)[index]
            chunk = np.empty(chunk_bytes, np.uint8)
            self._read_from_chunk(path, np.zeros(1, int), [chunk])
        found, expected = _checksum(chunk), entry.chunk_checksums[index]
        if found == expected and chunk is not rows:
            # The file is well: what is left is that the rows are the file's.
            inside = chunk[offset : offset + rows.size]
            found, expected = _checksum(rows), _checksum(inside)
        if found != expected:
            raise ValueError(
                f"tensor {name!r} of {self.folder} was altered: the checksum of its "
                f"chunk {index} is {found}, expected {expected}; convert the "
                "checkpoint again"
            )

    def _read_from_chunk(
        self, path: pathlib.Path, offsets: np.ndarray, buffers: list[np.ndarray]
    ) -> None:
        try:
            with open(path, "rb", buffering=0) as file:
                counts = [
                    os.preadv(file.fileno(), [buffer], offset)
                    for offset, buffer in zip(offsets.tolist(), buffers, strict=True)
                ]
        except OSError as error:
            raise OSError(
                f"cannot read {path}: {error.strerror}; convert the checkpoint again "
                "if the disk is well"
            ) from error
        for count, buffer in zip(counts, buffers, strict=True):
            if count != buffer.nbytes:
                raise OSError(
                    f"{path} ended early: {count} of {buffer.nbytes} bytes of a row; "
                    "convert the checkpoint again"
                )

    def chunk_paths(self, name: str) -> list[pathlib.Path]:
        """The files of a tensor's chunks."""
        if name not in self._paths:
            entry = self.tensors[name]
            self._paths[name] = [
                chunk_path(self.folder, name, entry, index)
                for index in range(entry.num_chunks)
            ]
        return self._paths[name]

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise ValueError(f"{self.folder} has no tensor {name!r}")
        return self.tensors[name]


def _checksum(data: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _check_buffer(name: str, entry: TensorEntry, rows: int, out: np.ndarray) -> None:
    shape = (rows, *entry.shape[1:])
    if out.shape != shape or out.dtype != entry.dtype or not out.flags.c_contiguous:
        layout = "" if out.flags.c_contiguous else "non-contiguous "
        raise ValueError(
            f"buffer for tensor {name!r} is {layout}{out.dtype.name}{list(out.shape)}, "
            f"expected contiguous {entry.dtype.name}{list(shape)}"
        )
