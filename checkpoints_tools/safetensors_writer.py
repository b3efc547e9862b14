"""Writing a Hugging Face checkpoint in safetensors shards, streamed."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from checkpoints_tools.safetensors_file import DTYPES
from flexjax.models.config import OPTConfig, tensor_shapes, to_hugging_face
from flexjax.safe_files import (
    ensure_space,
    lock_folder,
    unlock_folder,
    write_atomically,
)

MAX_SHARD_BYTES = 2 << 30
Blocks = Callable[[str], Iterable[np.ndarray]]  # a tensor's rows, in order


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file that is to be written: its header, and the tensors that follow."""

    header: bytes
    names: tuple[str, ...]
    data_bytes: int

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + self.data_bytes


def write_hugging_face(
    folder: pathlib.Path,
    config: OPTConfig,
    dtype: np.dtype,
    *,
    source: str,
    blocks: Blocks,
    progress: Callable[[int], Any],
) -> None:
    """Writes shards, their index and at the very end `config.json`.

    Whole shards of an earlier, interrupted try with the same `source` are kept.

    Raises:
        ValueError: the folder is in use, holds another checkpoint or cannot be written.
        OSError: the disk is full, or fails.
    """
    shards = plan_shards(config, dtype, source)
    lock = lock_folder(folder)
    try:
        missing = {
            name: shard
            for name, shard in shards.items()
            if not _is_whole(folder / name, shard)
        }
        if (folder / "config.json").exists():
            if not missing:
                return
            raise ValueError(
                f"{folder} already holds another checkpoint; delete it or choose "
                "another folder"
            )
        ensure_space(folder, sum(shard.nbytes for shard in missing.values()))
        for name, shard in shards.items():
            if name in missing:
                _write_shard(folder / name, shard, blocks, progress)
            else:
                progress(shard.data_bytes)
        _write_json(folder / "model.safetensors.index.json", _index(shards))
        _write_json(folder / "config.json", to_hugging_face(config, dtype.name))
    finally:
        unlock_folder(folder, lock)


def plan_shards(config: OPTConfig, dtype: np.dtype, source: str) -> dict[str, Shard]:
    """The files of a checkpoint by name, none much larger than `MAX_SHARD_BYTES`."""
    groups: list[list[str]] = [[]]
    shapes, filled = tensor_shapes(config), 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > MAX_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += nbytes
    return {
        f"model-{i + 1:05}-of-{len(groups):05}.safetensors": _plan_shard(
            {name: shapes[name] for name in group}, dtype, source
        )
        for i, group in enumerate(groups)
    }


def hugging_face_name(name: str) -> str:
    """The name that OPTForCausalLM gives to a store's tensor."""
    return name if name == "lm_head.weight" else f"model.decoder.{name}"


def _plan_shard(
    shapes: dict[str, tuple[int, ...]], dtype: np.dtype, source: str
) -> Shard:
    code = next(code for code, known in DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "source": source}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[hugging_face_name(name)] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return Shard(len(text).to_bytes(8, "little") + text, tuple(shapes), position)


def _is_whole(path: pathlib.Path, shard: Shard) -> bool:
    """Whether `path` is this shard: only whole ones ever get their final name."""
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with open(path, "rb") as file:
        return file.read(len(shard.header)) == shard.header


def _write_shard(
    path: pathlib.Path, shard: Shard, blocks: Blocks, progress: Callable[[int], Any]
) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(shard.header)
            for name in shard.names:
                for block in blocks(name):
                    file.write(block.reshape(-1).view(np.uint8))
                    progress(block.nbytes)
            file.flush()
            os.fsync(file.fileno())
        assert partial.stat().st_size == shard.nbytes, path
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error.strerror}; free some space or choose a "
            "folder on another disk, then run the same command again"
        ) from error


def _index(shards: dict[str, Shard]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards.values())},
        "weight_map": {
            hugging_face_name(name): file
            for file, shard in shards.items()
            for name in shard.names
        },
    }


def _write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2).encode())
