"""What a checkpoint offers to a converter: named tensors that are read by rows."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from flexjax.models.config import OPTConfig, tensor_shapes
from flexjax.store_format import DTYPES

BLOCK_BYTES = 16 << 20  # what a converter holds of a tensor at a time
# Buffers that old OPT checkpoints carry and that no model reads.
IGNORED = ("version",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of a checkpoint, still on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    read_rows: Callable[[int, int], np.ndarray]  # first row, row after the last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that was found complete: `tensors` are those of `config`."""

    folder: pathlib.Path
    config: OPTConfig
    tensors: Mapping[str, SourceTensor]
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """The checkpoint's own dtype: its token table's, or the nearest in a store."""
        dtype = self.tensors["embed_tokens.weight"].dtype
        return dtype if dtype in DTYPES.values() else DTYPES["float32"]


def make_source(
    folder: pathlib.Path,
    config: OPTConfig,
    tensors: Mapping[str, SourceTensor],
    files: Iterable[pathlib.Path],
) -> Source:
    """Names the tensors as a store does and checks them against `config`.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or kind.
    """
    named: dict[str, SourceTensor] = {}
    for original, tensor in tensors.items():
        name = canonical_name(original)
        if name in IGNORED or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if name in named:
            raise ValueError(
                f"{folder} has tensor {name!r} twice, in {named[name].file.name} and "
                f"as {original!r} in {tensor.file.name}; remove one"
            )
        named[name] = tensor
    _check_tensors(folder, config, named)
    return Source(
        folder=folder,
        config=config,
        tensors=named,
        fingerprint=fingerprint(folder, files),
    )


def canonical_name(name: str) -> str:
    """A tensor's name in a store: Hugging Face's without what stands before a layer."""
    name = name.removeprefix("model.").removeprefix("decoder.")
    # The final norm's name in checkpoints older than transformers 4.20.
    if name.startswith("layer_norm."):
        return f"final_{name}"
    return name


def _check_tensors(
    folder: pathlib.Path, config: OPTConfig, tensors: Mapping[str, SourceTensor]
) -> None:
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(
                f"{folder} lacks tensor {name!r} of shape {list(shape)}; download the "
                "checkpoint again, or correct its config.json"
            )
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"tensor {name!r} in {tensor.file} has shape {list(tensor.shape)}, but "
                f"config.json asks for {list(shape)}; give the config.json that "
                "belongs to these weights"
            )
        if tensor.dtype not in DTYPES.values() and tensor.dtype != np.float64:
            raise ValueError(
                f"tensor {name!r} in {tensor.file} is {tensor.dtype.name}, expected "
                f"one of {', '.join(DTYPES)}; save the checkpoint in one of these"
            )
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise ValueError(
            f"{folder} has tensors that an OPT model with its config.json does not "
            f"know: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}; give "
            "the config.json that belongs to these weights"
        )


def fingerprint(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """Tells one state of a checkpoint from another, without reading its weights."""
    facts = [str(folder.resolve())]
    for path in sorted(files):
        stat = path.stat()
        facts += [path.name, str(stat.st_size), str(stat.st_mtime_ns)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def row_blocks(
    name: str, tensor: SourceTensor, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tensor's rows in order, in `dtype`, a bounded amount at a time.

    Raises:
        ValueError: a finite value does not fit into `dtype`.
    """
    row_bytes = math.prod(tensor.shape[1:]) * max(tensor.dtype.itemsize, dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, tensor.shape[0], step):
        block = tensor.read_rows(first, min(first + step, tensor.shape[0]))
        yield _cast(name, tensor, block, dtype)


def _cast(
    name: str, tensor: SourceTensor, block: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """`block` in `dtype`, rounded to the nearest number, ties to even.

    What has 64 bits is rounded to 32 first.
    """
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        wide = block.astype(np.float32)
        cast = wide.astype(dtype)
    overflowed = np.isinf(cast) & ~np.isinf(block)
    if overflowed.any():
        worst = np.abs(block[overflowed].astype(np.float64)).max()
        raise ValueError(
            f"tensor {name!r} in {tensor.file} holds {worst:g}, which does not fit "
            f"into {dtype.name}; convert with --dtype bfloat16 or float32"
        )
    return cast
