"""Calibration gives figures that a machine can have, leaves nothing, and is kept."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexjax import extents
from flexjax.cache_folder import CACHE_VARIABLE
from flexjax.kernels.compiled import AVX2, AVX512, Kernel
from flexjax.kernels.decode_attention import DECODE_ATTENTION
from flexjax.kernels.products import PRODUCTS
from flexjax.models.config import OPTConfig
from flexjax.plan import calibrate, step_rates
from flexjax.plan.hardware import (
    ATTENTION,
    VERSION,
    WHOLE_BITS,
    Hardware,
    read_hardware,
    validate_hardware,
    write_hardware,
)
from tests.common import ApartLink, WatchedOs, in_time
from tests.plan.conftest import PIECE_BYTES, assert_nothing_is_left

DEVICE = jax.devices()[0]
NAMES = ["device_memory_bytes", "host_memory_bytes", "disk_bytes"]
is_apart = pytest.mark.skipif(DEVICE.platform != "cpu", reason="it is apart anyway")


@pytest.fixture(autouse=True)
def _small(monkeypatch, small_scratch):
    """A measurement of a moment."""
    del small_scratch
    tiny = OPTConfig(hidden_size=128, num_attention_heads=8, ffn_dim=128)
    for name, value in {
        "LIMIT_S": 1e-3,
        "MOST_REPEATS": 2,
        "LAYERS": (tiny, dataclasses.replace(tiny, ffn_dim=256)),
        "ROWS": (1, 4, 8),
        "QUANTIZED_ROWS": (1, 8),
        "PREFILL_ROWS": 8,
        "PROMPT_LEN": 4,
        "PAST_SLOTS": 4,
        "PROMPTS": (2, 2, 4, 8),
        "CACHE": (2, 2, 4, 64),
        "WIDENED": (2, 128),
        "LOGITS": (2, 8),
        "ENGINE_ROWS": 2,
        "ENGINE_TOKENS": 3,
    }.items():
        monkeypatch.setattr(step_rates, name, value)
    for name, value in {
        "LIMIT_S": 1e-3,
        "LAYERS": step_rates.LAYERS,
        "LINK_BYTES": 1 << 12,
        "LINK_REPEATS": 1,
        "BESIDE_ROWS": 4,
        "BESIDE_S": 1e-3,
    }.items():
        monkeypatch.setattr(calibrate, name, value)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def _measures_nothing(monkeypatch):
    """All but the disk is left out."""
    rates = dict.fromkeys(
        (
            "prefill_attention_flops_per_s",
            "sampled_logits_per_s",
        ),
        1.0,
    )
    rates |= {"dequantized_bytes_per_s": {4: 1.0, 8: 1.0}}
    rates |= {name: {4: 1.0, 8: 1.0, WHOLE_BITS: 1.0} for name in ATTENTION}
    monkeypatch.setattr(calibrate, "attention_figures", lambda *_: dict(rates))
    monkeypatch.setattr(calibrate, "engine_call_s", lambda *_: 0.0)
    figures = {"product_flops_per_s": {1: 1.0}, "call_s": {1: 0.0}}
    monkeypatch.setattr(calibrate, "step_figures", lambda *_: figures)
    monkeypatch.setattr(calibrate, "Layers", lambda *_: None)
    monkeypatch.setattr(calibrate, "quantized_product_rates", lambda *_: {1: 1.0})
    monkeypatch.setattr(calibrate, "_contention", lambda *_: {})
    monkeypatch.setattr(calibrate, "_copy_figures", lambda *_: COPY_RATES)


COPY_RATES = {"to_device_bytes_per_s": 1.0, "from_device_bytes_per_s": 1.0}


@is_apart
def test_a_cpu_gets_figures_that_a_machine_can_have(folder):
    machine = calibrate.calibrate(folder, DEVICE)
    assert validate_hardware(machine) is machine
    assert machine.device_is_host
    assert machine.to_device_bytes_per_s is machine.from_device_bytes_per_s is None
    assert machine.host_attention_bytes_per_s == machine.attention_bytes_per_s
    assert [*machine.product_flops_per_s] == [*machine.call_s] == [1, 4, 8]
    for by_bits in (
        machine.quantized_product_flops_per_s,
        machine.rounded_product_flops_per_s,
    ):
        assert (by_bits is not None) == calibrate.PRODUCTS.is_there()
        assert all([*rates] == [1, 8] for rates in (by_bits or {}).values())
    assert_nothing_is_left(folder)


@given(*2 * [st.floats(1e-3, 2)])
@example(0.09110166065386126, 0.2401429621671659)
def test_what_is_kept_side_by_side_is_what_turns_would_keep_or_more(first, second):
    kept = calibrate.kept_together(first, second)
    assert sum(kept) >= 1
    assert max(kept) <= 1
    if first + second >= 1:
        assert kept == (min(1.0, first), min(1.0, second))
    else:
        assert kept[0] / kept[1] == pytest.approx(first / second)


@pytest.fixture
def _apart(monkeypatch):
    """The device has memory of its own."""
    for module in (calibrate, step_rates):
        monkeypatch.setattr(module, "is_shared", lambda device: False)
    monkeypatch.setattr(calibrate, "DeviceLink", ApartLink)


@pytest.mark.usefixtures("_apart")
def test_a_device_apart_gets_rates_of_copies_and_no_contention(folder, monkeypatch):
    def rates(device):
        return dict.fromkeys((4, 8, WHOLE_BITS), 1.0 if device is DEVICE else 2.0)

    monkeypatch.setattr(step_rates, "_attention_rates", rates)
    monkeypatch.setattr(step_rates, "host_device", lambda what: "host")
    heard: list[str] = []
    machine = calibrate.calibrate(folder, DEVICE, heard.append)
    assert validate_hardware(machine) is machine
    assert not machine.device_is_host
    assert machine.compute_beside_disk == machine.disk_beside_compute == 1.0
    assert machine.round_trip_s > 0
    assert machine.attention_bytes_per_s == rates(DEVICE)
    assert machine.host_attention_bytes_per_s == rates("host")
    assert any("copies" in text for text in heard)
    assert any(str(folder) in text for text in heard)
    assert_nothing_is_left(folder)


@pytest.mark.usefixtures("_measures_nothing")
@pytest.mark.parametrize(
    "broken", ["Layers", "step_figures", "attention_figures", "engine_call_s"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_fails_leaves_nothing(folder, monkeypatch, broken, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(calibrate, broken, fail)
    with pytest.raises(error):
        in_time(calibrate.calibrate, folder, DEVICE)
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("call", ["open", "preadv", "pwritev"])
@pytest.mark.parametrize("which", [0, 5])
def test_an_error_of_the_disk_reaches_the_caller(folder, monkeypatch, call, which):
    count = 0

    def watch(made, path, is_direct, nbytes):
        nonlocal count
        count += made == call
        if made == call and count > which:
            raise OSError(errno.ENOSPC, "No space left on device")
        return nbytes or None

    monkeypatch.setattr(extents, "os", WatchedOs(watch))
    with pytest.raises(OSError, match=f"{folder} .*: No space left.*; free some"):
        in_time(calibrate.calibrate, folder, DEVICE)
    assert_nothing_is_left(folder)


def test_a_full_disk_is_heard_of_before_it_is_written(folder, monkeypatch):
    def usage(path):
        del path
        return shutil._ntuple_diskusage(1 << 40, 1 << 40, PIECE_BYTES)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(OSError, match=f"not enough space in {folder}"):
        calibrate.calibrate(folder, DEVICE)
    assert_nothing_is_left(folder)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match=f"cannot write into {file}"):
        calibrate.calibrate(file, DEVICE)


@pytest.fixture
def counted(monkeypatch, tmp_path, _measures_nothing):
    """Counts calibrations, which are kept below `tmp_path`."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    made: list[Hardware] = []
    measure = calibrate.calibrate

    def counting(*args) -> Hardware:
        made.append(measure(*args))
        return made[-1]

    monkeypatch.setattr(calibrate, "calibrate", counting)
    return made


def cached(tmp_path: pathlib.Path) -> pathlib.Path:
    (path,) = (tmp_path / "cache" / "calibration").iterdir()
    return path


def without_budgets(machine: Hardware) -> Hardware:
    return dataclasses.replace(machine, **dict.fromkeys(NAMES, 0))


def test_a_machine_is_measured_once(tmp_path, folder, counted):
    first = calibrate.calibrated(folder, DEVICE)
    second = calibrate.calibrated(folder, DEVICE)
    assert len(counted) == 1
    assert without_budgets(first) == without_budgets(second)
    assert without_budgets(first) == without_budgets(
        read_hardware(str(cached(tmp_path)))
    )
    assert_nothing_is_left(folder)


def test_budgets_are_those_of_now(tmp_path, folder, counted):
    first = calibrate.calibrated(folder, DEVICE)
    write_hardware(cached(tmp_path), without_budgets(first))
    second = calibrate.calibrated(folder, DEVICE)
    assert len(counted) == 1
    assert all(getattr(second, name) > 0 for name in NAMES)


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", b"\xff\xfe", {"version": 0}], ids=str
)
def test_what_cannot_be_read_is_measured_anew(tmp_path, folder, counted, damage):
    calibrate.calibrated(folder, DEVICE)
    path = cached(tmp_path)
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage)
    path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    machine = calibrate.calibrated(folder, DEVICE)
    assert len(counted) == 2
    assert json.loads(path.read_text())["version"] == VERSION
    assert validate_hardware(machine) is machine


def test_a_cache_that_cannot_be_written_is_heard_of_first(
    tmp_path, folder, counted, monkeypatch
):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write into"):
        calibrate.calibrated(folder, DEVICE)
    assert not counted


def test_a_failed_calibration_is_not_kept(tmp_path, folder, counted, monkeypatch):
    def fail(*_):
        raise OSError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "Layers", fail)
        with pytest.raises(OSError, match="broken"):
            calibrate.calibrated(folder, DEVICE)
    assert not list((tmp_path / "cache" / "calibration").iterdir())
    calibrate.calibrated(folder, DEVICE)
    assert len(counted) == 1


def test_a_machine_has_one_name_and_another_has_another(folder, monkeypatch):
    name = calibrate.machine_id(folder, DEVICE)
    assert name == calibrate.machine_id(folder, DEVICE)
    assert name == calibrate.machine_id(folder / "below", DEVICE)
    assert name.isalnum()
    names = set()
    kernels = {PRODUCTS, DECODE_ATTENTION}
    for there, instructions in (
        *((kernels, one) for one in (AVX2, AVX512)),
        *(({one}, AVX512) for one in kernels),
        (set(), AVX512),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "is_there", lambda one, now=there: one in now)
            patch.setattr(Kernel, "instructions", lambda _, now=instructions: now)
            names.add(calibrate.machine_id(folder, DEVICE))
    assert len(names) == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    assert calibrate.machine_id(folder, DEVICE) != name
