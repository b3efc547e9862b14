"""From any checkpoint to a weight store."""

import os

import numpy as np

from checkpoints_tools.hugging_face import copy_tokenizer
from checkpoints_tools.progress import progress_bar
from checkpoints_tools.source import Source, row_blocks
from flexjax.store_writer import StoreWriter


def convert_to_store(
    source: Source, folder: str | os.PathLike[str], dtype: np.dtype, label: str
) -> None:
    """Writes `source` as a weight store, going on where an earlier try was stopped.

    Raises:
        ValueError: the source is damaged, or `folder` cannot take a store.
        OSError: reading or writing failed; the folder then holds no complete store.
    """
    with StoreWriter(
        folder, config=source.config, dtype=dtype, source=source.fingerprint
    ) as writer:
        if writer.complete:
            return
        total_bytes = sum(entry.nbytes for entry in writer.planned.values())
        with progress_bar(total_bytes, label) as bar:
            for name, entry in writer.planned.items():
                if not writer.has(name):
                    writer.write(name, row_blocks(name, source.tensors[name], dtype))
                bar.update(entry.nbytes)
        copy_tokenizer(source.folder, writer.folder)
        writer.finish()
