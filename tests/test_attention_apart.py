"""Attention apart: which bytes move, in which lane, and what a fault leaves."""

import dataclasses

import jax
import pytest

from flexjax import attention_apart, engine
from flexjax.checkpoint import open_store
from flexjax.memory import link, transport
from flexjax.memory.host import HostStore
from flexjax.memory.lanes import Lane
from flexjax.memory.processor import Processor
from flexjax.memory.routes import DIRECT, Route, cache_routes
from flexjax.policy import Kind, Placement, Policy, Tier, validate
from tests.common import ApartLink, in_time
from tests.test_engine import GREEDY, make_engine, make_rows

HOST = Placement(host=1.0)
TO_DEVICE, TO_HOST = (Tier.HOST, Tier.DEVICE), (Tier.DEVICE, Tier.HOST)


@pytest.fixture(autouse=True)
def device_apart(monkeypatch):
    monkeypatch.setattr(transport, "DeviceLink", ApartLink)
    apart = Processor(is_host=False)
    monkeypatch.setattr(engine, "processor_of", lambda device, **_: apart)


@pytest.fixture
def run_of(golden, tmp_path):
    """An engine with a cache on the host, and a function that runs it."""
    checkpoint = golden("opt-pre-ln")
    engines = []

    def make(**changes):
        policy = Policy(kv_cache=HOST, batch_size=4, num_batches=2)
        policy = validate(dataclasses.replace(policy, **changes))
        made = make_engine(open_store(checkpoint.store), policy, tmp_path)
        engines.append(made)
        params = dataclasses.replace(GREEDY, max_tokens=6)

        def run():
            rows = make_rows(checkpoint.prompts, params)
            in_time(made.generate, rows)
            return [row.checker.token_ids for row in rows]

        return made, run

    yield make
    for made in engines:
        made.close()


def test_host_attention_leaves_the_cache_on_the_host(run_of):
    plain, run_plain = run_of()
    apart, run_apart = run_of(host_attention=True)
    assert run_plain() == run_apart()
    moved, moved_apart = plain.times.decode.moved, apart.times.decode.moved
    assert moved_apart[TO_DEVICE] < moved[TO_DEVICE] / 10
    assert apart.times.decode.busy_s[Lane.ATTENTION] > 0
    assert apart.times.decode.busy_s[Lane.PROJECT] > 0
    assert plain.times.decode.busy_s[Lane.ATTENTION] == 0
    # Neither holds anything of the run any more.
    for ended in (plain, apart):
        assert ended.ledger.held(Tier.HOST, Kind.KV_CACHE) == 0
        assert ended.ledger.held(Tier.DEVICE, Kind.KV_CACHE) == 0


@pytest.mark.parametrize("kv_cache_bits", [None, 4])
def test_sparse_attention_moves_the_values_that_it_attends_to(run_of, kv_cache_bits):
    plain, run_plain = run_of(kv_cache_bits=kv_cache_bits)
    sparse, run_sparse = run_of(kv_cache_bits=kv_cache_bits, attention_sparsity=0.1)
    run_plain()
    run_sparse()
    # All keys, and a tenth of the values, rounded up in every row and head.
    ratio = sparse.times.decode.moved[TO_DEVICE] / plain.times.decode.moved[TO_DEVICE]
    assert 0.5 < ratio < 0.62


def test_scores_and_sparse_attention_do_not_go_together(run_of):
    sparse, _ = run_of(attention_sparsity=0.1)
    with pytest.raises(ValueError, match=r"attention_sparsity=0\.1 acts on new tokens"):
        sparse.score([[5, 6, 7]])


@pytest.mark.parametrize("at", [1, 7])
@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({"host_attention": True}, attention_apart, "attend_step"),
        ({"host_attention": True}, attention_apart, "project_step"),
        ({"attention_sparsity": 0.3}, HostStore, "gather"),
        ({"attention_sparsity": 0.3}, attention_apart, "combine_step"),
    ],
)
def test_a_fault_reaches_the_caller_and_leaves_nothing(
    run_of, monkeypatch, changes, place, name, at
):
    made, run = run_of(**changes)
    expected, original, calls = run(), getattr(place, name), []

    def strike(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise RuntimeError(f"{name} failed")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, strike)
        with pytest.raises(RuntimeError, match=f"{name} failed"):
            run()
    held = [made.ledger.held(tier, Kind.KV_CACHE) for tier in Tier]
    assert held == [0, 0, 0]
    assert run() == expected


def test_a_host_without_a_cpu_backend_is_named(monkeypatch):
    def no_backend(backend):
        raise RuntimeError(f"no {backend}")

    monkeypatch.setattr(link.jax, "local_devices", no_backend)
    with pytest.raises(ValueError, match=r"needs JAX's cpu backend.*JAX_PLATFORMS"):
        link.HostLink()


@pytest.mark.parametrize("sparsity", [1.0, 0.5])
@pytest.mark.parametrize("host_attention", [False, True])
def test_on_a_cpu_every_cache_is_attended_to_where_it_is(host_attention, sparsity):
    assert jax.devices()[0].platform == "cpu"
    policy = Policy(
        kv_cache=HOST, host_attention=host_attention, attention_sparsity=sparsity
    )
    routes = cache_routes(policy, device_is_host=True)
    assert routes == dict.fromkeys(Tier, DIRECT)


def test_routes_of_a_device_apart():
    mixed = Placement(device=0.2, host=0.4)

    def routes(kv_cache=mixed, **changes):
        policy = Policy(kv_cache=kv_cache, **changes)
        return tuple(cache_routes(policy, device_is_host=False).values())

    on_host, gathers = Route(on_host=True), Route(gathers=True)
    assert routes() == (DIRECT, DIRECT, DIRECT)
    assert routes(host_attention=True) == (DIRECT, on_host, on_host)
    assert routes(attention_sparsity=0.1) == (DIRECT, gathers, DIRECT)
    both = routes(attention_sparsity=0.1, host_attention=True)
    assert both == (DIRECT, on_host, on_host)
    # Where nothing lies, nothing is asked for.
    assert routes(kv_cache=HOST, host_attention=True) == (DIRECT, on_host, DIRECT)
