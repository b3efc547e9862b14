"""Checkpoints for the converters' tests."""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexjax.checkpoint import open_store
from flexjax.models.config import OPTConfig, tensor_shapes, to_hugging_face
from tests.small_store import CONFIG

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
Tensors = dict[str, np.ndarray]
MakeCheckpoint = Callable[..., pathlib.Path]


def make_tensors(config: OPTConfig = CONFIG, dtype: type = np.float32) -> Tensors:
    """Random tensors by their names in a store."""
    random = np.random.default_rng(0)
    return {
        name: random.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in tensor_shapes(config).items()
    }


def write_config(folder: pathlib.Path, config: OPTConfig = CONFIG) -> None:
    values = to_hugging_face(config, "float32")
    (folder / "config.json").write_text(json.dumps(values))


def write_checkpoint(
    folder: pathlib.Path, tensors: Tensors, config: OPTConfig = CONFIG
) -> pathlib.Path:
    """One safetensors file with `tensors`, whose names are Hugging Face's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    save_file(tensors, folder / "model.safetensors")
    return folder


def prefixed(tensors: Tensors, prefix: str = "model.decoder.") -> Tensors:
    return {f"{prefix}{name}": data for name, data in tensors.items()}


def read_store(folder: pathlib.Path) -> Tensors:
    """Every tensor of a store, verified."""
    store = open_store(folder)
    tensors = {
        name: np.empty(entry.shape, entry.dtype)
        for name, entry in store.tensors.items()
    }
    for name, data in tensors.items():
        store.read(name, data)
        store.verify(name, data)
    return tensors


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert found[name].dtype == data.dtype, name
        assert found[name].shape == data.shape, name
        assert found[name].tobytes() == data.tobytes(), name


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    """A small float32 checkpoint, whole."""
    return write_checkpoint(tmp_path / "checkpoint", prefixed(make_tensors()))
