"""Orbax restores what is written here, and what it writes is read."""

import json
import os
import pathlib
import shutil
import warnings

import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools import convert
from checkpoints_tools.open_source import open_source
from checkpoints_tools.orbax_checkpoint import find_orbax
from tests.checkpoints_tools.conftest import (
    assert_same,
    make_tensors,
    prefixed,
    read_store,
    write_checkpoint,
    write_config,
)

# Orbax warns about its own future.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def ocp():
    with warnings.catch_warnings(action="ignore"):
        import orbax.checkpoint

    return orbax.checkpoint


def nested(tensors):
    tree = {}
    for name, data in tensors.items():
        *keys, last = name.split(".")
        branch = tree
        for key in keys:
            branch = branch.setdefault(key, {})
        branch[last] = data
    return tree


def flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): np.asarray(tree)}
    tensors = {}
    for key, branch in tree.items():
        tensors |= flat(branch, f"{prefix}{key}.")
    return tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_orbax_restores_what_is_written(dtype, tmp_path, ocp):
    tensors = make_tensors(dtype=dtype)
    source = write_checkpoint(tmp_path / "source", prefixed(tensors))
    out = tmp_path / "orbax"
    assert convert.main([str(source), str(out), "--to", "orbax"]) == 0
    assert_same(flat(ocp.StandardCheckpointer().restore(out)), tensors)
    assert_same(flat(ocp.PyTreeCheckpointer().restore(out)), tensors)
    like = nested(tensors)
    assert_same(flat(ocp.StandardCheckpointer().restore(out, like)), tensors)
    assert convert.main([str(out), str(tmp_path / "store")]) == 0
    assert_same(read_store(tmp_path / "store"), tensors)
    assert sorted(os.listdir(tmp_path)) == ["orbax", "source", "store"]


@pytest.mark.parametrize("shape", [nested, dict], ids=["nested", "flat"])
@pytest.mark.parametrize("kind", ["standard", "zarr3", "zarr", "item", "v1"])
def test_what_orbax_writes_is_read(kind, shape, tmp_path, ocp):
    tensors = make_tensors(dtype=ml_dtypes.bfloat16)
    tree, folder = shape(prefixed(tensors)), tmp_path / "orbax"
    match kind:
        case "standard":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder, tree)
        case "item":
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder / "default", tree)
        case "v1":
            from orbax.checkpoint import v1

            v1.save(folder, tree)
        case _:
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False, use_zarr3=kind == "zarr3"
            )
            ocp.Checkpointer(handler).save(folder, tree)
    write_config(folder)
    assert convert.main([str(folder), str(tmp_path / "store")]) == 0
    assert_same(read_store(tmp_path / "store"), tensors)


def test_the_config_may_lie_beside_the_checkpoint(tmp_path):
    source = write_checkpoint(tmp_path / "source", prefixed(make_tensors()))
    out = tmp_path / "parent" / "orbax"
    assert convert.main([str(source), str(out), "--to", "orbax"]) == 0
    (out / "config.json").rename(out.parent / "config.json")
    assert_same(
        {n: t.read_rows(0, t.shape[0]) for n, t in open_source(out).tensors.items()},
        make_tensors(),
    )
    (out.parent / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json"):
        open_source(out)


@pytest.fixture
def written(checkpoint, tmp_path) -> pathlib.Path:
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--to", "orbax"]) == 0
    return tmp_path / "out"


def test_writing_again_does_nothing(written, checkpoint):
    before = (written / "_METADATA").stat().st_mtime_ns
    assert convert.main([str(checkpoint), str(written), "--to", "orbax"]) == 0
    assert (written / "_METADATA").stat().st_mtime_ns == before


def test_something_else_is_never_overwritten(written, checkpoint, tmp_path, capsys):
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    (tmp_path / "file").touch()
    for out in (written, tmp_path / "file"):
        assert convert.main([str(checkpoint), str(out), "--to", "orbax"]) == 2
        assert f"{out} already holds something else" in capsys.readouterr().err


def test_a_conversion_stopped_at_the_very_end_goes_on(checkpoint, tmp_path):
    partial = tmp_path / ".out.partial"
    assert convert.main([str(checkpoint), str(partial)]) == 0
    assert convert.main([str(checkpoint), str(tmp_path / "out"), "--to", "orbax"]) == 0
    assert find_orbax(tmp_path / "out") == tmp_path / "out"
    assert not partial.exists()


@pytest.mark.parametrize("text", ["", "{", "{}", '{"tree_metadata": {"a": 3}}'])
def test_damaged_metadata_is_refused(text, written, tmp_path, capsys):
    (written / "_METADATA").write_text(text)
    assert convert.main([str(written), str(tmp_path / "store")]) == 2
    assert f"{written / '_METADATA'} is damaged" in capsys.readouterr().err


def test_missing_and_lost_arrays_are_named(written, tmp_path, capsys):
    name = "layers.0.fc1.weight"
    shutil.rmtree(written / name)
    assert convert.main([str(written), str(tmp_path / "store")]) == 2
    message = capsys.readouterr().err
    assert f"cannot read tensor '{name}' of {written}" in message
    assert message.count("\n") == 1
    metadata = json.loads((written / "_METADATA").read_text())
    del metadata["tree_metadata"][str(tuple(name.split(".")))]
    (written / "_METADATA").write_text(json.dumps(metadata))
    assert convert.main([str(written), str(tmp_path / "store")]) == 2
    assert f"lacks tensor '{name}'" in capsys.readouterr().err
