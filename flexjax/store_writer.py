"""Writing a weight store: streamed, resumable, complete only with its manifest.

While a store is being written its folder holds a journal, one JSON line a finished
tensor. A killed conversion leaves the journal and no manifest; the next one with the
same source keeps every tensor that the journal names and that still has its checksum.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import tensorstore as ts
import xxhash

from flexjax.checkpoint import is_store, read_manifest
from flexjax.models.config import CONFIG_FILE, OPTConfig
from flexjax.quant import Quantization
from flexjax.safe_files import (
    ensure_space,
    lock_folder,
    sync_tree,
    unlock_folder,
    write_atomically,
)
from flexjax.store_format import (
    MANIFEST,
    TENSORS,
    Manifest,
    TensorEntry,
    array_spec,
    chunk_path,
    entry_from_json,
    entry_to_json,
    manifest_to_json,
    planned_entries,
    tensor_folder,
)

JOURNAL = "journal.jsonl"
MARGIN_BYTES = 1 << 20  # manifest, journal and the arrays' own metadata
BUFFERS = 3  # chunks under way: one filling, two on their way to the disk


class StoreWriter:
    """One conversion into `folder`; a context manager that holds the folder's lock.

    `complete` says that the folder already is the finished store of the same source.

    Raises:
        ValueError: the folder is in use, holds something else, such as another
            checkpoint, or cannot be written.
        OSError: not enough free disk space for what is still missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: OPTConfig,
        dtype: np.dtype,
        source: str,
        quantization: Quantization | None = None,
    ):
        self.folder = pathlib.Path(folder)
        self._manifest = Manifest(
            config=config,
            dtype=dtype,
            source=source,
            tensors={},
            quantization=quantization,
        )
        self.planned = planned_entries(config, dtype, quantization)
        self._done: dict[str, TensorEntry] = {}
        self._checked: set[str] = set()
        self._journal: int | None = None
        self._is_new = not self.folder.exists()
        self._lock = lock_folder(self.folder)
        try:
            self.complete = self._is_complete()
            if not self.complete:
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back; what is finished is kept for the next time."""
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        if self._lock is not None:
            unlock_folder(self.folder, self._lock)
            self._lock = None
            if self._is_new:
                with contextlib.suppress(OSError):  # it was refused, or is not empty
                    self.folder.rmdir()

    def has(self, name: str) -> bool:
        """Whether an earlier, interrupted conversion already wrote this tensor.

        Reads it once to be sure: a power cut can lose what the journal promises.
        """
        if self.complete:
            return True
        if name in self._done and name not in self._checked:
            if _checksum_matches(self.folder, name, self._done[name]):
                self._checked.add(name)
            else:
                del self._done[name]
        return name in self._done

    def write(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Writes one tensor, given as consecutive blocks of rows as they are stored.

        Raises:
            OSError: the disk is full or fails; the store stays unfinished.
        """
        entry = self.planned[name]
        shutil.rmtree(tensor_folder(self.folder, name), ignore_errors=True)
        checksum, chunks = _write_array(self.folder, name, entry, blocks)
        self._done[name] = dataclasses.replace(
            entry, checksum=checksum, chunk_checksums=chunks
        )
        self._checked.add(name)
        self._append({"name": name} | entry_to_json(self._done[name]))

    def finish(self) -> None:
        """Makes the store complete: everything reaches the disk, the manifest last."""
        if self.complete:
            return
        if missing := self.planned.keys() - self._done.keys():
            raise ValueError(
                f"{self.folder} cannot be finished: {len(missing)} tensors were never "
                f"written, such as {min(missing)!r}"
            )
        sync_tree(self.folder)
        tensors = {name: self._done[name] for name in self.planned}
        manifest = dataclasses.replace(self._manifest, tensors=tensors)
        text = json.dumps(manifest_to_json(manifest), indent=1)
        write_atomically(self.folder / MANIFEST, text.encode())
        (self.folder / JOURNAL).unlink()
        self.complete = True

    def _is_complete(self) -> bool:
        if not is_store(self.folder):
            return False
        there = dataclasses.replace(read_manifest(self.folder), tensors={})
        if manifest_to_json(there) != manifest_to_json(self._manifest):
            raise ValueError(
                f"{self.folder} already holds a weight store made from something else; "
                "delete it or choose another folder"
            )
        (self.folder / JOURNAL).unlink(missing_ok=True)
        return True

    def _start(self) -> None:
        path = self.folder / JOURNAL
        tensors = self.folder / TENSORS
        if (self.folder / CONFIG_FILE).exists():
            raise ValueError(
                f"{self.folder} already holds a checkpoint, with a {CONFIG_FILE}: a "
                "store beside it would hide it; choose another folder"
            )
        if tensors.exists() and not path.exists():
            raise ValueError(
                f"{self.folder} holds a folder {TENSORS!r} that no conversion left "
                "behind; choose another folder"
            )
        lines, length = _read_journal(path)
        if lines and lines[0] == self._identity():
            self._done = _kept(lines[1:], self.planned, str(path))
        else:
            length = 0  # nothing there, or the start of another conversion
        for child in tensors.iterdir() if tensors.exists() else ():
            if child.name not in self._done:
                shutil.rmtree(child)
        self._ensure_space()
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.truncate(self._journal, length)
        if not length:
            self._append(self._identity())

    def _identity(self) -> dict[str, Any]:
        values = manifest_to_json(self._manifest)
        del values["tensors"]
        return values

    def _append(self, values: dict[str, Any]) -> None:
        assert self._journal is not None, "the writer is closed or was complete"
        line = memoryview(json.dumps(values).encode() + b"\n")
        try:
            while line:  # a disk that fills up takes some of it first
                line = line[os.write(self._journal, line) :]
            os.fsync(self._journal)
        except OSError as error:
            raise _failed(self.folder / JOURNAL, error.strerror) from error

    def _ensure_space(self) -> None:
        missing = self.planned.keys() - self._done.keys()
        needed = sum(self.planned[name].stored_bytes for name in missing)
        ensure_space(self.folder, needed + MARGIN_BYTES)


def _read_journal(path: pathlib.Path) -> tuple[list[Any], int]:
    """The journal's whole lines and their length; a torn last line is left out."""
    data = path.read_bytes() if path.exists() else b""
    lines, length = [], 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        length += len(line)
    return lines, length


def _kept(
    lines: list[Any], plan: dict[str, TensorEntry], origin: str
) -> dict[str, TensorEntry]:
    """The journal's tensors that this version would write the very same way."""
    kept = {}
    for line in lines:
        entry = entry_from_json(line, origin)
        name = line.get("name")
        bare = dataclasses.replace(entry, checksum="", chunk_checksums=())
        if name in plan and bare == plan[name]:
            kept[name] = entry
    return kept


def _write_array(
    folder: pathlib.Path, name: str, entry: TensorEntry, blocks: Iterable[np.ndarray]
) -> tuple[str, tuple[str, ...]]:
    """Streams `blocks` into a new zarr3 array; returns its checksum and its chunks'."""
    opening = ts.open(
        array_spec(folder, name, entry) | {"store_data_equal_to_fill_value": True},
        context=ts.Context({"file_io_sync": False}),  # `finish` syncs all at once
        create=True,
    )
    handle = _wait(opening, name, folder)
    checksum, chunk_checksums = xxhash.xxh3_64(), []
    rows = _Rows(blocks)
    buffers = [
        np.empty((entry.chunk_rows, *entry.shape[1:]), entry.dtype)
        for _ in range(min(BUFFERS, entry.num_chunks))
    ]
    writing: list[ts.Future | None] = [None] * len(buffers)
    try:
        for index, first, last in entry.chunks():
            slot = index % len(buffers)
            _wait(writing[slot], name, folder)
            chunk = buffers[slot][: last - first]
            rows.fill(chunk, name)
            checksum.update(chunk.view(np.uint8))
            chunk_checksums.append(xxhash.xxh3_64_hexdigest(chunk.view(np.uint8)))
            writing[slot] = handle[first:last].write(chunk).commit
        rows.ensure_empty(name)
    finally:  # also after an error nothing may go on writing behind our back
        with contextlib.ExitStack() as waits:  # for each, whatever others raise
            for future in writing:
                waits.callback(_wait, future, name, folder)
    return checksum.hexdigest(), tuple(chunk_checksums)


def _wait(future: ts.Future | None, name: str, folder: pathlib.Path) -> Any:
    """The result of a tensorstore operation; its failure as an OSError."""
    try:
        return None if future is None else future.result()
    except ValueError as error:
        what = f"tensor {name!r} of {folder}"
        raise _failed(what, tensorstore_message(error)) from error


def tensorstore_message(error: BaseException) -> str:
    """What tensorstore says, without the machine-readable tail."""
    text = re.sub(
        r"\s*\[(tensorstore_spec|os_error_code|source locations)=?.*",
        "",
        str(error),
        flags=re.DOTALL,
    )
    return re.sub(r"^[A-Z_]+: ", "", text.replace("\0", "/"))


def _failed(what: object, why: str | None) -> OSError:
    return OSError(
        f"cannot write {what}: {why}; free some space or repair the disk, then run the "
        "same command again: it goes on where it stopped"
    )


def _checksum_matches(folder: pathlib.Path, name: str, entry: TensorEntry) -> bool:
    """Whether the tensor's files are whole and hold what was once written."""
    checksum = xxhash.xxh3_64()
    for index, first, last in entry.chunks():
        try:
            data = chunk_path(folder, name, entry, index).read_bytes()
        except OSError:
            return False
        if len(data) != entry.chunk_bytes:
            return False
        checksum.update(memoryview(data)[: (last - first) * entry.row_bytes])
    return checksum.hexdigest() == entry.checksum


class _Rows:
    """Rows of a stream of blocks, taken in amounts of the taker's choice."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self._blocks = iter(blocks)
        self._rest: np.ndarray | None = None

    def fill(self, out: np.ndarray, name: str) -> None:
        filled = 0
        while filled < len(out):
            block = self._next() if self._rest is None else self._rest
            if block is None:
                raise ValueError(f"tensor {name!r} has fewer rows than its shape says")
            count = min(len(block), len(out) - filled)
            out[filled : filled + count] = block[:count]
            self._rest = block[count:] if count < len(block) else None
            filled += count

    def ensure_empty(self, name: str) -> None:
        if self._rest is not None or self._next() is not None:
            raise ValueError(f"tensor {name!r} has more rows than its shape says")

    def _next(self) -> np.ndarray | None:
        return next(self._blocks, None)
