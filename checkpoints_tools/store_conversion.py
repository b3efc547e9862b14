"""From any checkpoint to a weight store."""

import os
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from checkpoints_tools.hugging_face import copy_tokenizer
from checkpoints_tools.progress import progress_bar
from checkpoints_tools.source import Source, row_blocks
from flexjax.memory.link import host_device
from flexjax.quant import Quantization, quantize
from flexjax.store_writer import StoreWriter


def convert_to_store(
    source: Source,
    folder: str | os.PathLike[str],
    dtype: np.dtype,
    label: str,
    quantization: Quantization | None = None,
) -> None:
    """Writes `source` as a weight store, going on where an earlier try was stopped.

    Args:
        source: what to convert.
        folder: of the store.
        dtype: of the weights, or of what they are quantized from.
        label: of the progress bar.
        quantization: of the decoder layers' matrices.

    Raises:
        ValueError: the source is damaged, groups do not divide a tensor or it is not
            finite, or `folder` cannot take a store.
        OSError: reading or writing failed; the folder then holds no complete store.
    """
    with StoreWriter(
        folder,
        config=source.config,
        dtype=dtype,
        source=source.fingerprint,
        quantization=quantization,
    ) as writer:
        if writer.complete:
            return
        total_bytes = sum(entry.nbytes for entry in writer.planned.values())
        with progress_bar(total_bytes, label) as bar:
            for name, entry in writer.planned.items():
                if not writer.has(name):
                    blocks = row_blocks(name, source.tensors[name], dtype)
                    if entry.quantization is not None:
                        blocks = _quantized(name, blocks, entry.quantization)
                    writer.write(name, blocks)
                bar.update(entry.nbytes)
        copy_tokenizer(source.folder, writer.folder)
        writer.finish()


def _quantized(
    name: str, blocks: Iterable[np.ndarray], quantization: Quantization
) -> Iterator[np.ndarray]:
    """The bytes of each block.

    They are made on a CPU, whatever else there is: so every machine makes the same.
    """
    cpu = host_device("quantizing weights")
    for block in blocks:
        if not np.isfinite(block.astype(np.float32)).all():
            raise ValueError(
                f"tensor {name!r} holds infinities or not-a-numbers, which cannot be "
                "quantized; convert without --weight-bits, or mend the checkpoint"
            )
        yield np.asarray(_quantize(jax.device_put(block, cpu), quantization))


_quantize = jax.jit(quantize, static_argnames="quantization")
