import logging
import os
import pathlib
import shutil

import huggingface_hub.constants
import ml_dtypes
import numpy as np
import pytest

from checkpoints_tools import convert
from checkpoints_tools.resolve import resolve_model
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import open_store
from flexjax.quant import Quantization
from tests.checkpoints_tools.conftest import (
    GOLDEN,
    assert_same,
    make_tensors,
    prefixed,
    read_store,
    write_checkpoint,
)


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    return tmp_path / "cache"


def in_dtype(dtype) -> dict[str, np.ndarray]:
    return {name: data.astype(dtype) for name, data in make_tensors().items()}


def test_a_folder_is_converted_once(checkpoint, cache):
    store = resolve_model(checkpoint, cache_dir=cache)
    assert store.parent == cache
    assert_same(read_store(store), make_tensors())
    before = (store / "manifest.json").stat().st_mtime_ns
    assert resolve_model(str(checkpoint), cache_dir=cache) == store
    assert (store / "manifest.json").stat().st_mtime_ns == before
    other = resolve_model(checkpoint, "bfloat16", cache)
    assert other != store
    assert_same(read_store(other), in_dtype(ml_dtypes.bfloat16))


def test_a_changed_folder_is_converted_anew(checkpoint, cache):
    store = resolve_model(checkpoint, cache_dir=cache)
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert resolve_model(checkpoint, cache_dir=cache) != store


def test_another_tokenizer_is_taken_and_nothing_is_converted_for_it(checkpoint, cache):
    (checkpoint / "vocab.json").write_text("{}")
    store = resolve_model(checkpoint, cache_dir=cache)
    before = (store / "manifest.json").stat().st_mtime_ns
    (checkpoint / "vocab.json").unlink()
    (checkpoint / "tokenizer.json").write_text("first")
    assert resolve_model(checkpoint, cache_dir=cache) == store
    assert not (store / "vocab.json").exists()
    assert (store / "tokenizer.json").read_text() == "first"
    (checkpoint / "tokenizer.json").write_text("other")
    assert resolve_model(checkpoint, cache_dir=cache) == store
    assert (store / "tokenizer.json").read_text() == "other"
    assert (store / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("own", "platform", "wanted"),
    [
        ("float16", "cpu", "bfloat16"),
        ("float16", "gpu", "float16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "cpu", "float32"),
        ("float64", "cpu", "float32"),
    ],
)
def test_the_dtype_is_the_checkpoints_own(own, platform, wanted, tmp_path, cache):
    tensors = prefixed(make_tensors(dtype=np.dtype(own).type))
    source = write_checkpoint(tmp_path / "checkpoint", tensors)
    store = resolve_model(source, "auto", cache, platform=platform)
    assert read_store(store)["embed_tokens.weight"].dtype == wanted


def test_a_store_is_used_as_it_is(checkpoint, tmp_path, cache, caplog):
    store = tmp_path / "store"
    assert convert.main([str(checkpoint), str(store)]) == 0
    assert resolve_model(store, cache_dir=cache) == store
    assert resolve_model(store, "float32", cache) == store
    assert not cache.exists()
    with caplog.at_level(logging.WARNING):
        copy = resolve_model(store, "bfloat16", cache)
    assert "holds float32: making a bfloat16 copy" in caplog.text
    assert copy.parent == cache
    assert_same(read_store(copy), in_dtype(ml_dtypes.bfloat16))


def test_weights_are_quantized_once_and_that_is_said(
    checkpoint, tmp_path, cache, caplog
):
    store = tmp_path / "store"
    assert convert.main([str(checkpoint), str(store)]) == 0
    with caplog.at_level(logging.WARNING):
        made = resolve_model(store, cache_dir=cache, weight_bits=4, group_size=8)
    assert "holds float32: making a 4-bit copy" in caplog.text
    assert open_store(made).quantization == Quantization(
        bits=4, group_size=8, dtype="float32"
    )
    before = (made / "manifest.json").stat().st_mtime_ns
    caplog.clear()
    assert resolve_model(store, cache_dir=cache, weight_bits=4, group_size=8) == made
    assert not caplog.text
    assert (made / "manifest.json").stat().st_mtime_ns == before
    others = {
        resolve_model(checkpoint, cache_dir=cache, weight_bits=bits, group_size=size)
        for bits, size in ((4, 8), (8, 8), (4, 16))
    }
    assert len(others | {made}) == 4
    # What asks for nothing takes it as it is stored.
    assert resolve_model(made, cache_dir=cache) == made


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"weight_bits": 8, "group_size": 8}, "weight_bits=4, but weight_bits=8"),
        ({"weight_bits": 4, "group_size": 16}, "group_size=8, but group_size=16"),
        ({"dtype": "bfloat16"}, "dtype=float32, but dtype=bfloat16"),
    ],
)
def test_a_store_that_is_quantized_in_another_way_is_refused(
    asked, message, checkpoint, tmp_path
):
    store = tmp_path / "store"
    arguments = [str(checkpoint), str(store), "--weight-bits", "4", "--group-size", "8"]
    assert convert.main(arguments) == 0
    with pytest.raises(ValueError, match=f"was quantized with {message} is asked for"):
        resolve_model(store, **asked)


def test_nothing_else_is_made_of_a_quantized_store(checkpoint, tmp_path, capsys):
    store = tmp_path / "store"
    arguments = [str(checkpoint), str(store), "--weight-bits", "4", "--group-size", "8"]
    assert convert.main(arguments) == 0
    assert "store, float32, 4 bits" in capsys.readouterr().out
    assert convert.main([str(store), str(tmp_path / "other")]) != 0
    assert "holds weights of 4 bits, from which nothing else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "8"], "--group-size does nothing without --weight-bits"),
        (["--weight-bits", "4", "--group-size", "0"], "--group-size is 0, expected at"),
        (
            ["--weight-bits", "4"],
            "embed_tokens.weight' cannot be quantized: a group_size",
        ),
        (["--weight-bits", "4", "--to", "orbax"], "--weight-bits is of quantized stor"),
        (["--group-size", "8", "--to", "orbax"], "--group-size is of quantized stores"),
    ],
)
def test_what_cannot_be_quantized_is_said_before_anything_is_written(
    arguments, message, checkpoint, tmp_path, capsys
):
    out = tmp_path / "out"
    assert convert.main([str(checkpoint), str(out), *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert not (out / "tensors").exists()


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, capsys):
    tensors = prefixed(make_tensors())
    tensors["model.decoder.layers.1.fc1.weight"][3, 2] = np.inf
    source = write_checkpoint(tmp_path / "checkpoint", tensors)
    out = tmp_path / "out"
    arguments = [str(source), str(out), "--weight-bits", "8", "--group-size", "8"]
    assert convert.main(arguments) != 0
    assert "tensor 'layers.1.fc1.weight' holds infinities" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()


def test_the_cache_is_where_the_environment_says(checkpoint, cache, monkeypatch):
    monkeypatch.setenv("FLEXJAX_CACHE", str(cache))
    assert resolve_model(checkpoint).parent == cache
    monkeypatch.delenv("FLEXJAX_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == pathlib.Path("/home/someone/.cache/flexjax")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache of the Hub's client, which is offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def lay_out(hub: pathlib.Path, model: str, source: pathlib.Path) -> pathlib.Path:
    """Puts a checkpoint into the cache as a download does; returns the snapshot."""
    root = hub / f"models--{model.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    for folder in (snapshot, blobs, root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for i, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


@pytest.mark.parametrize("name", ["opt-bf16", "opt-sharded-bin-f16"])
def test_a_hub_id_is_found_offline(name, hub, cache):
    lay_out(hub, f"facebook/{name}", GOLDEN / name)
    store = resolve_model(f"facebook/{name}", cache_dir=cache)
    assert store.parent == cache
    assert store.name.startswith(f"facebook--{name}-bfloat16-")
    expected = resolve_model(GOLDEN / name, cache_dir=cache)
    assert_same(read_store(store), read_store(expected))
    assert resolve_model(f"facebook/{name}", cache_dir=cache) == store


@pytest.mark.parametrize("missing", ["everything", "weights", "shard", "config"])
def test_what_is_not_in_the_hubs_cache_is_said(missing, hub, cache):
    if missing != "everything":
        snapshot = lay_out(hub, "facebook/opt-x", GOLDEN / "opt-bf16")
        pattern = {
            "weights": "model*",
            "shard": "model-00002*",
            "config": "config.json",
        }[missing]
        for path in snapshot.glob(pattern):
            path.unlink()
    expected = {
        "everything": "not whole in the local cache while the Hub cannot be reached",
        "weights": "facebook/opt-x has no weights",
        "shard": r"shard .*model-00002-of-00002.safetensors is missing",
        "config": "has no config.json",
    }[missing]
    with pytest.raises(ValueError, match=expected) as caught:
        resolve_model("facebook/opt-x", cache_dir=cache)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_config_is_checked_before_weights_are_fetched(hub, cache):
    snapshot = lay_out(hub, "facebook/opt-x", GOLDEN / "opt-bf16")
    for path in snapshot.glob("model*"):
        path.unlink()  # looking for them would be refused

    def check(config, tensors):
        how = tensors["layers.0.fc1.weight"].quantization
        assert (config.hidden_size, how.bits, how.dtype) == (64, 4, "bfloat16")
        raise ValueError("not these")

    with pytest.raises(ValueError, match="^not these$"):
        resolve_model("facebook/opt-x", cache_dir=cache, weight_bits=4, check=check)


@pytest.mark.parametrize(
    "model", ["/nowhere/opt", "./opt", "opt-125m", "a/b/c", "", "a b/c", "~/nothing"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model, hub, cache, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(ValueError, match=f"'{model}' is neither a folder nor a Hub id"):
        resolve_model(model, cache_dir=cache)


def test_trouble_with_the_connection_is_one_sentence(hub, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("proxy says no")

    monkeypatch.setattr("checkpoints_tools.hub.snapshot_download", fail)
    with pytest.raises(OSError, match="cannot fetch facebook/opt-x .*proxy says no"):
        resolve_model("facebook/opt-x")


def test_an_unknown_dtype_is_refused(checkpoint):
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of auto, bf"):
        resolve_model(checkpoint, "int8")


def test_an_unwritable_cache_is_named(checkpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"cannot write into {tmp_path / 'file'}"):
        resolve_model(checkpoint, cache_dir=tmp_path / "file")
