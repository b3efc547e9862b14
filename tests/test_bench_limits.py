import dataclasses
import pathlib
import types

import jax
import numpy as np
import pytest

from bench import compute_limit, disk_limit, limits, page_cache
from bench.catalog import find_case
from bench.compute_limit import ComputeLimit, mean_limit
from bench.disk_limit import measure_read, measure_write, store_files
from bench.limits import limits_report, mean_rates, measure_limits, setting_of
from flexjax.checkpoint import open_store
from flexjax.models.config import OPTConfig
from flexjax.plan import step_rates
from flexjax.policy import Placement, Policy
from flexjax.store_format import DTYPES
from flexjax.workload import Workload
from tests.common import files, random_tensors, write_store

CONFIG = OPTConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    ffn_dim=64,
    max_position_embeddings=128,
)
WORK = Workload(
    num_decoder_layers=3, num_batches=2, batch_size=4, prompt_len=32, gen_len=40
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    tensors = random_tensors(CONFIG, DTYPES["float32"])
    return open_store(write_store(folder, CONFIG, tensors))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(step_rates, "MOST_REPEATS", 1)


def a_second_each() -> ComputeLimit:
    """Steps that take a second, whatever they do."""
    slots = {compute_limit.read_slots(WORK, step) for step in range(1, WORK.gen_len)}
    return ComputeLimit(
        prefill_layer_s=1.0,
        prefill_ends_s=1.0,
        decode_layer_s=dict.fromkeys(slots, 1.0),
        decode_ends_s=1.0,
        head_s=1.0,
        widen_s=0.0,
    )


def test_the_compute_bound_counts_every_step_of_every_batch():
    limit, parts = a_second_each(), WORK.num_decoder_layers + 2
    assert limit.prefill_s(WORK) == WORK.num_batches * parts
    assert limit.decode_s(WORK) == WORK.num_batches * parts * (WORK.gen_len - 1)
    assert limit.decode_s(dataclasses.replace(WORK, gen_len=1)) == 0


def test_the_mean_of_a_limit_and_itself_is_itself():
    limit = a_second_each()
    assert mean_limit([limit, limit]) == limit


def test_the_store_is_read_whole_where_it_is_small(store):
    tensors = list(store.tensors)
    paths = list(store_files(store, tensors))
    assert set(paths) == {
        p for p in files(store.folder / "tensors") if p.stem != "zarr"
    }
    rate = measure_read(store, tensors)
    assert rate.num_bytes == sum(path.stat().st_size for path in paths)
    assert rate.bytes_per_s > 0
    assert rate.direct == store.direct_io


def test_of_a_large_store_a_part_is_read_from_everywhere(store):
    paths = list(store_files(store, list(store.tensors)))
    total_bytes = sum(path.stat().st_size for path in paths)
    picked = disk_limit._spread(paths, total_bytes // 4)
    assert picked == paths[::4]


def test_what_was_written_to_measure_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_limit, "LEAST_WRITE_BYTES", 8 << 20)
    rate = measure_write(tmp_path, 1)
    assert rate.num_bytes == len(disk_limit.WAYS) * (8 << 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv_cache", [Placement(), Placement(device=0.5, host=0.5)])
def test_limits_are_measured_for_what_a_run_uses(store, tmp_path, kv_cache):
    policy = Policy(
        weights=Placement(device=0.3), kv_cache=kv_cache, batch_size=4, num_batches=2
    )
    case = dataclasses.replace(find_case("smoke"), policy=policy, gen_len=40)
    setting = setting_of(case, store, jax.devices()[0], tmp_path)
    assert 0 < len(setting.disk_tensors) < len(store.tensors)
    measured = [measure_limits(setting)]
    spills = kv_cache.disk > 0
    assert ("disk read" in mean_rates(measured)) == store.direct_io
    assert (setting.spill_bytes > 0) == spills
    assert ("disk write" in mean_rates(measured)) == spills
    slots = {compute_limit.read_slots(setting.work, step) for step in range(1, 40)}
    compute = measured[0].compute
    assert compute.decode_layer_s.keys() == slots
    assert compute.widen_s == 0  # nothing is quantized
    steps = dataclasses.replace(compute, widen_s=1.0)
    assert (np.array(jax.tree.leaves(dataclasses.asdict(steps))) > 0).all()
    report = limits_report(measured * 2, [])
    assert report["bytes_per_s"] == mean_rates(measured)
    assert report["compute"] == dataclasses.asdict(compute)


def test_the_best_route_in_each_direction_is_the_limit_of_copies(monkeypatch):
    rows = [
        ("host to device", {"bytes_per_s": 1.0}),
        ("host to device", {"bytes_per_s": 3.0}),
        ("host to host", {"bytes_per_s": 9.0}),
        ("device to host", {"error": "no"}),
        ("device to host", {"bytes_per_s": 2.0}),
    ]
    found = [{"direction": direction, **rate} for direction, rate in rows]
    monkeypatch.setattr(limits, "compare_routes", lambda device, sizes: found)
    apart = types.SimpleNamespace(platform="gpu")
    assert limits._measure_copies(apart) == {"host to device": 3.0, "device to host": 2}
    assert limits._measure_copies(jax.devices("cpu")[0]) == {}


def test_dropping_the_page_cache_says_what_was_done(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    paths = [path, tmp_path / "nothing"]
    monkeypatch.setattr(page_cache, "_DROP", tmp_path / "drop_caches")
    assert not page_cache.may_drop_everything()
    assert page_cache.drop_page_cache(paths) == "cold"
    assert (tmp_path / "drop_caches").read_text() == "3"
    monkeypatch.setattr(page_cache, "_DROP", pathlib.Path("/proc/none/drop_caches"))
    assert page_cache.drop_page_cache(paths) == "cold (the store only)"
    assert path.read_bytes() == b"x" * 8192
