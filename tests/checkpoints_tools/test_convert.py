import dataclasses
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_tools import convert
from checkpoints_tools.hugging_face import TOKENIZER_FILES
from checkpoints_tools.safetensors_writer import plan_shards
from checkpoints_tools.source import canonical_name
from flexjax.checkpoint import open_store
from flexjax.models.config import OPTConfig, read_config
from flexjax.store_format import DTYPES
from tests.checkpoints_tools.conftest import (
    CONFIG,
    GOLDEN,
    assert_same,
    make_tensors,
    prefixed,
    read_store,
    write_checkpoint,
    write_config,
)

ROOT = pathlib.Path(__file__).parents[2]


def converted(source: pathlib.Path, out: pathlib.Path, *options: str):
    """The tensors that the command line makes of `source`."""
    assert convert.main([str(source), str(out), *options]) == 0
    return read_store(out)


def refusal(capsys, source, out, *options: str) -> str:
    """The one line with which the command line refuses `source`."""
    capsys.readouterr()
    assert convert.main([str(source), str(out), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (out / "manifest.json").exists()
    return message


class PlainReader(pickle.Unpickler):
    """Reads torch's archives in the simplest way, as a second opinion."""

    def __init__(self, archive: zipfile.ZipFile):
        pkl = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        super().__init__(io.BytesIO(archive.read(pkl)))
        self.archive, self.root = archive, pkl.removesuffix("data.pkl")

    def find_class(self, module, name):
        return {"_rebuild_tensor_v2": self.tensor, "OrderedDict": dict}.get(name, name)

    def persistent_load(self, pid):
        assert pid[1] == "HalfStorage"
        return np.frombuffer(self.archive.read(f"{self.root}data/{pid[2]}"), np.float16)

    def tensor(self, storage, offset, shape, stride, *_):
        data = storage[offset : offset + np.prod(shape, dtype=int)].reshape(shape)
        assert stride == tuple(step // 2 for step in data.strides)
        return data


def golden_tensors(folder: pathlib.Path):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    for path in folder.glob("*.bin"):
        with zipfile.ZipFile(path) as archive:
            tensors |= PlainReader(archive).load()
    named = {canonical_name(name): data for name, data in tensors.items()}
    named.pop("lm_head.weight", None)
    return named


@pytest.mark.parametrize("name", [path.parent.name for path in GOLDEN.glob("*/*.npz")])
def test_golden_checkpoints_convert_bit_by_bit(name, tmp_path):
    tensors = converted(GOLDEN / name, tmp_path / "store")
    assert_same(tensors, golden_tensors(GOLDEN / name))
    assert open_store(tmp_path / "store").config == read_config(GOLDEN / name)


@pytest.mark.parametrize("own", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_dtypes_are_rounded_to_nearest_even(own, wanted, tmp_path):
    tensors = make_tensors(dtype=DTYPES[own].type)
    source = write_checkpoint(tmp_path / "checkpoint", prefixed(tensors))
    found = converted(source, tmp_path / "store", "--dtype", wanted)
    expected = {
        name: data.astype(np.float32).astype(DTYPES[wanted])
        for name, data in tensors.items()
    }
    assert_same(found, expected)


def test_rounding_goes_to_the_even_neighbour(tmp_path):
    tensors = make_tensors()
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, np.inf, -np.inf, 1e-45])
    tensors["final_layer_norm.bias"][:6] = ties
    source = write_checkpoint(tmp_path / "checkpoint", prefixed(tensors))
    found = converted(source, tmp_path / "store", "--dtype", "bfloat16")
    expected = [1, 1 + 2**-6, -1, np.inf, -np.inf, 0]
    assert found["final_layer_norm.bias"][:6].tolist() == expected


def test_a_value_too_large_for_float16_is_named(tmp_path, capsys):
    tensors = make_tensors()
    tensors["layers.1.fc1.bias"][3] = -70000
    source = write_checkpoint(tmp_path / "checkpoint", prefixed(tensors))
    message = refusal(capsys, source, tmp_path / "store", "--dtype", "float16")
    assert "'layers.1.fc1.bias'" in message
    assert "70000" in message
    assert "--dtype bfloat16" in message


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder.", ""])
def test_all_prefixes_of_hugging_face_are_known(prefix, tmp_path):
    tensors = make_tensors()
    source = write_checkpoint(tmp_path / "checkpoint", prefixed(tensors, prefix))
    assert_same(converted(source, tmp_path / "store"), tensors)


def test_old_names_and_buffers_are_understood(tmp_path):
    tensors = make_tensors()
    old = prefixed(tensors, "decoder.") | {
        "decoder.version": np.ones(1, np.float32),
        "lm_head.weight": tensors["embed_tokens.weight"],
    }
    for part in ("weight", "bias"):
        norm = old.pop(f"decoder.final_layer_norm.{part}")
        old[f"decoder.layer_norm.{part}"] = norm
    source = write_checkpoint(tmp_path / "checkpoint", old)
    assert_same(converted(source, tmp_path / "store"), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.decoder.extra.weight": np.ones(3, np.float32)}, "extra.weight"),
        ({"model.decoder.layers.1.fc1.bias": None}, "lacks tensor 'layers.1.fc1.bias'"),
        (
            {"model.decoder.layers.1.fc1.bias": np.ones(3, np.float32)},
            "fc1.bias' in {path} has shape [3], but config.json asks for [48]",
        ),
        (
            {"model.decoder.layers.1.fc1.bias": np.ones(48, np.int32)},
            "'layers.1.fc1.bias' in {path} is int32, expected one of bfloat16",
        ),
        (
            {"decoder.layers.1.fc1.bias": np.ones(48, np.float32)},
            "tensor 'layers.1.fc1.bias' twice",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(change, message, tmp_path, capsys):
    tensors = prefixed(make_tensors()) | change
    tensors = {name: data for name, data in tensors.items() if data is not None}
    source = write_checkpoint(tmp_path / "checkpoint", tensors)
    found = refusal(capsys, source, tmp_path / "store")
    assert message.format(path=source / "model.safetensors") in found


@pytest.mark.parametrize("name", ["opt-pre-ln", "opt-sharded-bin-f16"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "cut to nothing"])
def test_a_harmed_shard_is_refused_by_name(name, harm, tmp_path, capsys):
    source = shutil.copytree(GOLDEN / name, tmp_path / "checkpoint")
    shard = sorted(p for p in source.iterdir() if p.suffix in (".bin", ".safetensors"))[
        1
    ]
    match harm:
        case "missing":
            shard.unlink()
        case "truncated":
            os.truncate(shard, shard.stat().st_size - 100)
        case "cut to nothing":
            os.truncate(shard, 0)
    assert str(shard) in refusal(capsys, source, tmp_path / "store")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../model.safetensors"}}, "outside its folder"),
        ({"weight_map": {"x": "model.safetensors"}}, "'x' is in model.safetensors"),
        ({"weight_map": {"x": 3}}, "damaged"),
        ({}, "damaged"),
    ],
)
def test_a_wrong_index_is_refused(index, message, checkpoint, tmp_path, capsys):
    if "not" not in message:
        (checkpoint / "model.safetensors").rename(checkpoint / "a.safetensors")
    if message.startswith("'x'"):
        (checkpoint / "a.safetensors").rename(checkpoint / "model-1.safetensors")
        index = {"weight_map": {"x": "model-1.safetensors"}}
        message = "'x' is in model-1.safetensors, but it is not"
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    found = refusal(capsys, checkpoint, tmp_path / "store")
    assert "model.safetensors.index.json" in found
    assert message in found


def test_shards_without_an_index_are_found(tmp_path):
    tensors = make_tensors()
    source = write_checkpoint(tmp_path / "checkpoint", prefixed(tensors))
    (source / "model.safetensors").unlink()
    names = list(prefixed(tensors))
    for i in range(2):
        part = {name: prefixed(tensors)[name] for name in names[i::2]}
        save_file(part, source / f"part{i}.safetensors")
    assert_same(converted(source, tmp_path / "store"), tensors)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": '{"model_type": "llama"}'}, "only 'opt' is supported"),
        ({"config.json": '{"model_type": "opt"}'}, "but no weights"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(files, message, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert message in refusal(capsys, tmp_path, tmp_path / "store")


def test_a_source_that_is_not_there_is_refused(tmp_path, capsys):
    message = refusal(capsys, tmp_path / "nothing", tmp_path / "store")
    assert f"{tmp_path / 'nothing'} is not a folder" in message


def test_the_source_is_never_written(checkpoint, capsys):
    assert "is the source itself" in refusal(capsys, checkpoint, checkpoint)


def test_tokenizer_files_come_along(checkpoint, tmp_path):
    for name in TOKENIZER_FILES:
        (checkpoint / name).write_text(name)
    for to, out in (("store", tmp_path / "store"), ("orbax", tmp_path / "orbax")):
        assert convert.main([str(checkpoint), str(out), "--to", to]) == 0
        for name in TOKENIZER_FILES:
            assert (out / name).read_text() == name


def test_a_store_changes_its_dtype(checkpoint, tmp_path):
    converted(checkpoint, tmp_path / "store")
    found = converted(tmp_path / "store", tmp_path / "other", "--dtype", "bfloat16")
    expected = {
        name: data.astype(ml_dtypes.bfloat16) for name, data in make_tensors().items()
    }
    assert_same(found, expected)


def test_converting_again_does_nothing(checkpoint, tmp_path):
    converted(checkpoint, tmp_path / "store")
    before = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    converted(checkpoint, tmp_path / "store")
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == before


def test_a_changed_source_is_noticed(checkpoint, tmp_path, capsys):
    converted(checkpoint, tmp_path / "store")
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert convert.main([str(checkpoint), str(tmp_path / "store")]) == 2
    assert "already holds a weight store made from" in capsys.readouterr().err
    open_store(tmp_path / "store")


def test_the_command_line_reports_by_its_status(tmp_path):
    command = [sys.executable, "-m", "checkpoints_tools.convert", str(tmp_path), "out"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} has no config.json")
    assert "Traceback" not in done.stderr
    done = subprocess.run(
        [*command, "--debug"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Traceback" in done.stderr


MEASURED = """
import sys
from checkpoints_tools import convert
status = convert.main(sys.argv[1:])
# Not ru_maxrss, which begins with the size of the process that started this one.
status_lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in status_lines if "VmHWM" in line))
sys.exit(status)
"""


def write_zeros(folder: pathlib.Path, config: OPTConfig) -> None:
    """A checkpoint of zeros that takes no space, as a file with a hole."""
    folder.mkdir()
    write_config(folder, config)
    for name, shard in plan_shards(config, DTYPES["bfloat16"], "zeros").items():
        (folder / name).write_bytes(shard.header)
        os.truncate(folder / name, shard.nbytes)


@pytest.mark.parametrize("options", [["--to", "orbax"], ["--dtype", "float16"]])
def test_memory_is_bounded(options, tmp_path):
    """300 MB of a tensor are converted in 450 MB, much of which is Python and JAX."""
    config = dataclasses.replace(
        CONFIG, vocab_size=150_000, hidden_size=1024, word_embed_proj_dim=1024
    )
    write_zeros(tmp_path / "checkpoint", config)
    command = [
        sys.executable,
        "-c",
        MEASURED,
        tmp_path / "checkpoint",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 450e6
