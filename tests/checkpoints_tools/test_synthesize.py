import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints_tools import convert, safetensors_writer, synthesize
from checkpoints_tools.random_weights import random_blocks
from checkpoints_tools.source import canonical_name
from flexjax.checkpoint import open_store
from flexjax.models.config import OPTConfig, read_config
from flexjax.store_format import DTYPES
from flexjax.store_writer import JOURNAL
from tests.cells import RUNS_ALL
from tests.checkpoints_tools.conftest import (
    CONFIG,
    assert_same,
    read_store,
    write_config,
)

ROOT = pathlib.Path(__file__).parents[2]
BF16 = DTYPES["bfloat16"]


@pytest.fixture
def model(tmp_path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder)
    return str(folder)


def test_both_formats_hold_the_same_weights(model, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 5000)
    store, folder = tmp_path / "store", tmp_path / "hf"
    assert synthesize.main([model, str(store), "--seed", "3"]) == 0
    assert synthesize.main([model, str(folder), "--seed", "3", "--format", "hf"]) == 0
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert read_config(folder) == CONFIG
    tensors = {}
    for shard in shards:
        tensors |= load_file(shard)
    assert all(name.startswith("model.decoder.") for name in tensors)
    named = {canonical_name(name): data for name, data in tensors.items()}
    assert_same(read_store(store), named)
    assert convert.main([str(folder), str(tmp_path / "converted")]) == 0
    assert_same(read_store(tmp_path / "converted"), named)


def test_a_published_model_has_its_true_shapes(tmp_path):
    out = str(tmp_path / "store")
    assert synthesize.main(["facebook/opt-125m", out, "--dtype", "float16"]) == 0
    store = open_store(out)
    assert store.dtype == np.float16
    assert store.tensors["embed_tokens.weight"].shape == (50272, 768)
    assert len(store.tensors) == 12 * 16 + 4


def test_an_unknown_model_is_refused(tmp_path, capsys):
    assert synthesize.main(["opt-9000b", str(tmp_path / "out")]) == 2
    assert "unknown model 'opt-9000b'; known are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def drawn(name: str, shape=(3000, 1000), dtype=BF16, seed=0) -> np.ndarray:
    return np.concatenate(list(random_blocks(name, shape, dtype, seed)))


def test_weights_depend_on_seed_and_name_alone():
    one = drawn("a.weight")
    assert one.shape == (3000, 1000)
    assert one.dtype == BF16
    np.testing.assert_array_equal(one, drawn("a.weight"))
    assert not np.array_equal(one, drawn("b.weight"))
    assert not np.array_equal(one, drawn("a.weight", seed=1))
    exact = drawn("a.weight", dtype=DTYPES["float32"])
    np.testing.assert_array_equal(one, exact.astype(BF16))


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("layers.0.fc1.weight", 0, 0.02),
        ("layers.0.fc1.bias", 0, 0.002),
        ("layers.0.self_attn_layer_norm.weight", 1, 0.002),
        ("layers.0.self_attn_layer_norm.bias", 0, 0.002),
    ],
)
def test_weights_are_normal(name, mean, std):
    data = drawn(name, dtype=DTYPES["float32"]).reshape(-1)
    assert abs(data.mean() - mean) < std / 500
    assert abs(data.std() / std - 1) < 0.005
    inside = np.mean(np.abs(data - mean) < std)
    assert abs(inside - 0.6827) < 0.002
    # No stretch of it comes twice.
    assert len({data[i : i + 8].tobytes() for i in range(0, data.size, 1000)}) == 3000


def test_an_hf_folder_is_kept_or_refused_but_not_overwritten(model, tmp_path, capsys):
    command = [model, str(tmp_path / "hf"), "--format", "hf"]
    assert synthesize.main(command) == 0
    shard = next((tmp_path / "hf").glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert synthesize.main(command) == 0
    assert shard.stat().st_mtime_ns == before
    assert synthesize.main([*command, "--seed", "1"]) == 2
    assert "already holds another checkpoint" in capsys.readouterr().err
    assert shard.stat().st_mtime_ns == before


def test_an_interrupted_hf_folder_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "MAX_SHARD_BYTES", 5000)
    command = [model, str(tmp_path / "hf"), "--format", "hf"]
    assert synthesize.main(command) == 0
    kept, lost = sorted((tmp_path / "hf").glob("*.safetensors"))[:2]
    before, data = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.write_bytes(data[:-1])
    (tmp_path / "hf" / "config.json").unlink()
    assert synthesize.main(command) == 0
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == data
    assert read_config(tmp_path / "hf") == CONFIG


MIDDLE = OPTConfig(
    vocab_size=20_000,
    hidden_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    ffn_dim=2048,
    max_position_embeddings=512,
)


def progress(folder: pathlib.Path) -> int:
    """How far a conversion has come: tensors begun and tensors finished."""
    journal = folder / JOURNAL
    lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    return lines + len(list(folder.glob("tensors/*")))


TOOLS = {"synthesize": synthesize.main, "convert": convert.main}


@pytest.mark.parametrize("tool", TOOLS if RUNS_ALL else ["convert"])
def test_a_killed_program_leaves_no_store_and_goes_on(tool, tmp_path):
    """Killed again and again until it gets through, in the end it is all the same."""
    model, whole, out = tmp_path / "model", tmp_path / "whole", tmp_path / "out"
    model.mkdir()
    write_config(model, MIDDLE)
    assert synthesize.main([str(model), str(whole)]) == 0
    source = model
    if tool == "convert":
        source = tmp_path / "hf"
        assert synthesize.main([str(model), str(source), "--format", "hf"]) == 0
    command = [sys.executable, "-m", f"checkpoints_tools.{tool}", source, out]
    dice = random.Random(0)
    kills = 0
    for attempt in range(30):
        seen, patience = progress(out), dice.choice([0, 1, 2, 40, 60, 200])
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and (
            attempt > 5 or progress(out) < seen + patience
        ):
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "manifest.json").exists():
            break
        kills += 1
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="not a finished weight store"):
            open_store(out)
    assert kills >= 2
    assert TOOLS[tool]([str(source), str(out)]) == 0
    assert open_store(out).tensors == open_store(whole).tensors
    assert_same(read_store(out), read_store(whole))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "tensors"]
