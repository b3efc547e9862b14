"""Orbax checkpoints of OPT tensors, read and written in their layout on disk.

That layout is zarr arrays, which tensorstore streams by rows, beside a few JSON files.
Orbax's own save and restore hold whole trees in memory, so they are not used here; the
tests restore with Orbax what is written, and read what Orbax writes.
"""

import json
import math
import pathlib
import shutil
import time
from typing import Any

import numpy as np
import tensorstore as ts

from checkpoints_tools.hugging_face import copy_tokenizer
from checkpoints_tools.source import BLOCK_BYTES, Source, SourceTensor, make_source
from checkpoints_tools.store_conversion import convert_to_store
from flexjax.models.config import read_config, tensor_shapes, to_hugging_face
from flexjax.safe_files import sync_tree
from flexjax.store_format import TENSORS
from flexjax.store_writer import tensorstore_message

METADATA = "_METADATA"
ARRAYS = ("np.ndarray", "jax.Array")  # Orbax's names for what holds a tensor
DICT_KEY = 2  # Orbax's number for the key of a dict
CONFIG = "config.json"


def find_orbax(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder with the arrays: `folder` itself, or the one item inside it."""
    places = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    found = [place for place in places if (place / METADATA).is_file()]
    return found[0] if found and (found[0] == folder or len(found) == 1) else None


def open_orbax(folder: pathlib.Path) -> Source:
    """The Orbax checkpoint in `folder`: a dict of OPT tensors, flat or nested.

    Its `config.json` lies in the folder or beside it.

    Raises:
        ValueError: no config, or not the tensors that it asks for.
    """
    root = find_orbax(folder)
    assert root is not None, folder
    places = [root, folder, folder.absolute().parent]
    config_folder = next((p for p in places if (p / CONFIG).is_file()), folder)
    config = read_config(config_folder)
    path = root / METADATA
    try:
        metadata = json.loads(path.read_bytes())
        leaves = _leaves(metadata["tree_metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; save it again") from error
    tensors = {
        name: _open_array(root, name, metadata)
        for name, kind in leaves.items()
        if kind in ARRAYS
    }
    files = [config_folder / CONFIG, path, *root.glob("manifest.ocdbt")]
    return make_source(config_folder, config, tensors, files)


def _leaves(tree: dict[str, Any]) -> dict[str, str]:
    """Kind of every leaf by its name: the keys that lead to it, with dots between."""
    return {
        ".".join(str(key["key"]) for key in leaf["key_metadata"]): str(
            leaf["value_metadata"]["value_type"]
        )
        for leaf in tree.values()
    }


def _open_array(
    root: pathlib.Path, name: str, metadata: dict[str, Any]
) -> SourceTensor:
    files = {"driver": "file", "path": f"{root.absolute()}/"}
    if metadata.get("use_ocdbt", (root / "manifest.ocdbt").exists()):
        kvstore: dict[str, Any] = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    else:
        kvstore = files | {"path": f"{root.absolute()}/{name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    spec = {"driver": driver, "kvstore": kvstore}

    def open_array(cache_bytes: int) -> ts.TensorStore:
        context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        return _result(root, name, ts.open(spec, context=context, open=True, read=True))

    array = open_array(0)
    # Orbax makes one compressed chunk of a tensor: decode it once, not once a block.
    chunk = array.chunk_layout.read_chunk.shape or array.shape
    itemsize = array.dtype.numpy_dtype.itemsize
    chunk_bytes = math.prod(size or 1 for size in chunk) * itemsize
    cached: list[ts.TensorStore] = []

    def read_rows(first: int, last: int) -> np.ndarray:
        if chunk_bytes <= BLOCK_BYTES:
            return _result(root, name, array[first:last].read())
        if not cached:
            cached.append(open_array(chunk_bytes + BLOCK_BYTES))
        rows = _result(root, name, cached[0][first:last].read())
        if last == array.shape[0]:
            cached.clear()
        return rows

    return SourceTensor(
        shape=tuple(array.shape),
        dtype=array.dtype.numpy_dtype,
        file=root,
        read_rows=read_rows,
    )


def _result(root: pathlib.Path, name: str, future: ts.Future) -> Any:
    try:
        return future.result()
    except ValueError as error:
        raise OSError(
            f"cannot read tensor {name!r} of {root}: {tensorstore_message(error)}; "
            "save the checkpoint again if the disk is well"
        ) from error


def write_orbax(
    source: Source, folder: pathlib.Path, dtype: np.dtype, label: str
) -> None:
    """Writes `source` as an Orbax checkpoint of a nested dict of arrays.

    The tensors are first gathered beside `folder`, as a weight store: a conversion that
    was stopped goes on, and `folder` appears when everything is there.

    Raises:
        ValueError: the source is damaged, or `folder` holds something else.
        OSError: reading or writing failed; `folder` is then not there.
    """
    partial = folder.absolute().with_name(f".{folder.name}.partial")
    metadata = _metadata(source, dtype)
    if not _is_written(folder, metadata):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"{folder} already holds something else; delete it or choose another "
                "folder"
            )
        convert_to_store(source, partial, dtype, label)
        arrays = partial / TENSORS
        copy_tokenizer(source.folder, arrays)
        _write(arrays / CONFIG, to_hugging_face(source.config, dtype.name))
        _write(arrays / METADATA, metadata)
        _write(arrays / "_CHECKPOINT_METADATA", _checkpoint_metadata())
        (arrays / "commit_success.txt").write_text("")
        sync_tree(arrays)
        arrays.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)


def _is_written(folder: pathlib.Path, metadata: dict[str, Any]) -> bool:
    path = folder / METADATA
    return path.is_file() and path.read_text() == json.dumps(metadata)


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


def _metadata(source: Source, dtype: np.dtype) -> dict[str, Any]:
    """What Orbax reads to know the tree and how its arrays are stored."""
    names = {name: name.split(".") for name in tensor_shapes(source.config)}
    leaf = {"value_type": ARRAYS[0], "skip_deserialize": False}
    return {
        "tree_metadata": {
            str(tuple(keys)): {
                "key_metadata": [{"key": key, "key_type": DICT_KEY} for key in keys],
                "value_metadata": leaf,
            }
            for keys in names.values()
        },
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": {"source": source.fingerprint, "dtype": dtype.name},
    }


def _checkpoint_metadata() -> dict[str, Any]:
    now = time.time_ns()
    return {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler."
        "StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
