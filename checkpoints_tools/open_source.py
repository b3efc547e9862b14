"""Telling what kind of checkpoint a folder holds."""

import os
import pathlib

import numpy as np

from checkpoints_tools.hugging_face import open_hugging_face
from checkpoints_tools.orbax_checkpoint import find_orbax, open_orbax
from checkpoints_tools.source import Source, SourceTensor, make_source
from flexjax.checkpoint import WeightStore, is_store, open_store
from flexjax.store_format import MANIFEST


def open_source(folder: str | os.PathLike[str]) -> Source:
    """Opens a weight store, an Orbax checkpoint or a Hugging Face checkpoint.

    Raises:
        ValueError: `folder` holds none of them, or one that is not whole.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with a checkpoint")
    if is_store(folder):
        store = open_store(folder)
        if store.quantization is not None:
            raise ValueError(
                f"{folder} holds weights of {store.quantization.bits} bits, from which "
                "nothing else can be made; give what it was converted from"
            )
        return _store_source(store)
    if find_orbax(folder) is not None:
        return open_orbax(folder)
    return open_hugging_face(folder)


def _store_source(store: WeightStore) -> Source:
    tensors = {name: _stored_tensor(store, name) for name in store.tensors}
    return make_source(store.folder, store.config, tensors, [store.folder / MANIFEST])


def _stored_tensor(store: WeightStore, name: str) -> SourceTensor:
    entry = store.tensors[name]

    def read_rows(first: int, last: int) -> np.ndarray:
        rows = np.empty((last - first, *entry.shape[1:]), entry.dtype)
        store.read_rows(name, first, last, rows)
        return rows

    return SourceTensor(
        shape=entry.shape, dtype=entry.dtype, file=store.folder, read_rows=read_rows
    )
