import jax.numpy as jnp
import pytest

from bench import pauses as pauses_module
from bench.disk_limit import DiskRate, Way, read_files, store_files
from bench.limits import decode_rates
from bench.pauses import DiskPauses
from flexjax.checkpoint import open_store
from flexjax.models.config import OPTConfig
from tests.common import random_tensors, write_store

CONFIG = OPTConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    ffn_dim=64,
    max_position_embeddings=128,
)
WAY = Way(1 << 12, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "store"
    tensors = random_tensors(CONFIG, jnp.dtype("float32"))
    return open_store(write_store(folder, CONFIG, tensors))


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """A disk that has nothing to do, a pause whenever one may be, and its file."""
    path = tmp_path / "inflight"
    path.write_text("       0        0\n")
    monkeypatch.setattr(pauses_module, "_inflight_file", lambda folder: path)
    monkeypatch.setattr(pauses_module, "LEAST_S", 0.0)
    monkeypatch.setattr(pauses_module, "MOST_SHARE", 1.0)
    monkeypatch.setattr(pauses_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(pauses_module, "WAY", WAY)
    return path


def make_pauses(store, quiet, num_batches):
    return DiskPauses(store, list(store.tensors), num_batches, quiet.parent)


def run(pauses, num_batches, gen_len):
    for _ in range(num_batches * gen_len):
        pauses(1)


def test_a_pause_reads_all_that_a_step_reads_in_its_order(store, quiet):
    tensors = list(store.tensors)
    order = list(store_files(store, tensors))
    found = make_pauses(store, quiet, num_batches=1)._files
    assert sorted(found) == sorted(order)
    start = order.index(found[0])
    assert start > 0
    assert "layers.2." in found[0].parent.name
    assert found == [*order[start:], *order[:start]]
    rate = read_files(found, WAY, direct=store.direct_io)
    assert rate.num_bytes == sum(path.stat().st_size for path in found)


def test_pauses_come_after_steps_of_the_decode_and_do_not_count(store, quiet):
    if not store.direct_io:
        pytest.skip("no direct I/O here")
    pauses = DiskPauses(
        store, list(store.tensors), num_batches=2, offload_dir=quiet.parent
    )
    run(pauses, num_batches=2, gen_len=4)
    assert len(pauses.rates) == 3  # of four tokens, the first is the prefill's
    metrics = {
        "seconds": 30.0,
        "num_tokens": 8,
        "tokens_per_s": 8 / 30,
        "prefill": {"seconds": 10.0},
        "decode": {"seconds": 20.0, "busy_s": {}},
        "step_s": [5.0, 7.0, 8.0],
    }
    found = pauses.without(metrics)
    paused_s = 30.0 - found["seconds"]
    assert paused_s > 0
    assert found["prefill"] == metrics["prefill"]
    assert found["decode"]["seconds"] == pytest.approx(20.0 - paused_s)
    assert sum(found["step_s"]) == pytest.approx(20.0 - paused_s)
    assert all(
        after < before
        for after, before in zip(found["step_s"], metrics["step_s"], strict=True)
    )
    assert found["tokens_per_s"] == pytest.approx(8 / found["seconds"])


def test_a_disk_that_is_never_quiet_is_not_measured(store, quiet, monkeypatch):
    monkeypatch.setattr(pauses_module, "_MOST_WAIT_S", 0.01)
    quiet.write_text("       1        0\n")
    pauses = DiskPauses(
        store, list(store.tensors), num_batches=1, offload_dir=quiet.parent
    )
    run(pauses, num_batches=1, gen_len=3)
    assert pauses.rates == []


def test_the_decode_is_bounded_by_the_mean_of_its_pauses():
    rates = {"disk read": 9.0, "disk write": 4.0}
    found = [
        DiskRate(bytes_per_s=rate, way=WAY, direct=True, num_bytes=1)
        for rate in (1.0, 5.0)
    ]
    assert decode_rates(rates, found) == {"disk read": 3.0, "disk write": 4.0}
    assert decode_rates(rates, []) == rates
    assert decode_rates({}, found) == {}  # reads may come from the page cache
