"""The closed form is the schedule's own bytes and seconds, summed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.memory.footprint import RunFootprint, run_peak_bytes
from flexjax.models.config import OPTConfig
from flexjax.plan.closed_form import (
    Lengths,
    block_form,
    phase_seconds,
    shares_of,
)
from flexjax.plan.costs import RunCosts
from flexjax.plan.hardware import WHOLE_BITS, read_hardware
from flexjax.plan.job import Job
from flexjax.plan.peak import peak_from_above
from flexjax.plan.planner import Found, find_model
from flexjax.plan.predict import predict
from flexjax.policy import Kind, Placement, Policy, Schedule, Tier
from flexjax.schedule.emit import zigzag
from flexjax.schedule.footprint import by_tier
from flexjax.schedule.ops import Cell, Free, Weights
from flexjax.schedule.resources import Resource
from flexjax.schedule.simulate import simulate
from tests.common import total_seconds
from tests.plan.test_hardware import MACHINE

CONFIG = OPTConfig(
    vocab_size=640,
    hidden_size=128,
    num_attention_heads=2,
    ffn_dim=512,
    num_hidden_layers=5,
)
APART = dataclasses.replace(
    MACHINE,
    product_flops_per_s={1: 1e9, 64: 1e10},
    round_trip_s=1e-3,
)
SHARED = dataclasses.replace(
    APART,
    device_is_host=True,
    round_trip_s=0.0,
    to_device_bytes_per_s=None,
    from_device_bytes_per_s=None,
    compute_beside_disk=0.8,
    disk_beside_compute=0.9,
)
CORNERS = [Placement(device=1.0), Placement(host=1.0), Placement()]
placements = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(
    lambda pair: Placement(device=pair[0], host=(1 - pair[0]) * pair[1])
)


@st.composite
def policies(draw: st.DrawFn, where=placements) -> Policy:
    cache = draw(where)
    return Policy(
        weights=draw(where),
        kv_cache=cache,
        activations=draw(where),
        batch_size=draw(st.integers(1, 9)),
        num_batches=draw(st.integers(1, 5)),
        weight_bits=draw(st.sampled_from([None, 4, 8])),
        kv_cache_bits=draw(st.sampled_from([None, 4, 8])),
        host_attention=draw(st.booleans()) and cache.device < 1.0,
    )


hardware_drawn = st.sampled_from([APART, SHARED])
# With nothing in common, one prefix for all, and one for each two rows.
prefixes = st.sampled_from([{}, {}, {"num_shared": 40}]) | st.just(
    {"num_shared": 40, "rows_per_prefix": 2}
)


def run_of(policy, hardware, **lengths):
    """The costs of a whole block, and its sizes."""
    model = Found(CONFIG, np.dtype(np.float16)).model(policy)
    layout = model.layout(policy, hardware.processor)
    asked = Lengths(**{"prompt_len": 20, "gen_len": 5} | lengths)
    work = asked.workload(layout, policy, policy.block_size)
    work = dataclasses.replace(work, layers_ahead=min(2, work.num_layers - 1))
    sizes = RunFootprint(work=work, policy=policy, weights=layout, scores=False)
    form = block_form(model, policy, hardware, asked)
    return RunCosts(sizes, hardware), sizes, form


def steps_s(costs, steps):
    ops = (op for op in zigzag(costs.work) if not isinstance(op, Free))
    return total_seconds(costs, (op for op in ops if op.step in steps))


@pytest.mark.parametrize("gen_len", [1, 2, 5])
@given(
    policy=policies(st.sampled_from(CORNERS)),
    hardware=hardware_drawn,
    shared=prefixes,
)
@settings(deadline=None, max_examples=30)
def test_seconds_of_whole_placements_are_those_of_the_ops(
    policy, hardware, gen_len, shared
):
    costs, _, form = run_of(policy, hardware, gen_len=gen_len, **shared)
    shares = shares_of(policy)
    assert form.prefill.at(shares) == pytest.approx(steps_s(costs, [0]), abs=1e-9)
    decode = steps_s(costs, range(1, costs.work.gen_len))
    assert form.decode.at(shares) == pytest.approx(decode, abs=1e-9)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_attention_on_the_host_takes_a_round_trip_and_the_host_s_own_rates(bits):
    policy = Policy(
        kv_cache=Placement(host=1.0),
        host_attention=True,
        kv_cache_bits=bits,
        batch_size=3,
    )
    costs, _, _ = run_of(policy, APART)
    wide_bytes = 3 * 2 * CONFIG.hidden_size * 2 * costs.work.cache_slots(0)
    rate = APART.host_attention_bytes_per_s[bits or WHOLE_BITS]
    expected = APART.round_trip_s + wide_bytes / rate
    found = costs.compute(Cell(step=1, layer=0, batch=0))
    assert found[Resource.HOST_ATTENTION] == pytest.approx(expected)


@given(policy=policies(), hardware=hardware_drawn, shared=prefixes)
@settings(deadline=None)
def test_seconds_of_mixed_placements_are_within_a_tensor_and_a_row(
    policy, hardware, shared
):
    """By one tensor's bytes in every step, and one row's in every pair of calls."""
    costs, sizes, form = run_of(policy, hardware, **shared)
    work, weights = costs.work, sizes.weights
    tensor = max(entry.nbytes for entry in weights.tensors.values())
    # How much of the table of logits travels, and in how many blocks, is rounded too.
    tensor += weights.tensors[CONFIG.head_table].nbytes
    row = work.cache_slots(work.gen_len) * sizes.cache_slot_bytes
    row += work.prefix_len * sizes.of_prefix.cache_slot_bytes
    hidden = 2 * work.num_decoder_layers * work.prompt_len * sizes.hidden_bytes
    found, exact = form.prefill.at(shares_of(policy)), steps_s(costs, [0])
    for resource, rate, slack in (
        (Resource.DISK_READ, hardware.disk_read_bytes_per_s, tensor + hidden),
        (Resource.DISK_WRITE, hardware.disk_write_bytes_per_s, row + hidden),
        (Resource.TO_DEVICE, hardware.to_device_bytes_per_s, tensor + hidden),
        (Resource.FROM_DEVICE, hardware.from_device_bytes_per_s, row + hidden),
    ):
        if rate is not None:
            off = abs(found[resource] - exact[resource]) * rate
            assert off <= slack, (resource, off / slack)


@given(
    policy=policies(),
    hardware=hardware_drawn,
    gen_len=st.integers(1, 40),
    shared=prefixes,
)
@settings(deadline=None)
def test_the_quick_peak_is_never_below_the_schedule_s_own(
    policy, hardware, gen_len, shared
):
    _, sizes, _ = run_of(policy, hardware, gen_len=gen_len, **shared)
    above = peak_from_above(sizes)
    exact = run_peak_bytes(sizes.work, policy, sizes.weights)
    for key, nbytes in exact.items():
        assert nbytes <= above[key], key
    # Nor is it above it by more than a layer, and a few calls' rows and workspaces.
    layer = sizes.loaded(Weights(0, 0), 0)
    rows = policy.batch_size + 2 * len(sizes.work.prefixes)
    room = 3 * sum(layer.values()) + 6 * rows * 64 * 6 * CONFIG.ffn_dim
    held, most = by_tier(exact), by_tier(above)
    for tier in Tier:
        assert most[tier] <= 1.25 * held[tier] + room, tier


@given(policy=policies(), hardware=hardware_drawn, shared=prefixes)
@settings(deadline=None)
def test_a_simulated_block_takes_at_least_what_the_form_says(policy, hardware, shared):
    """By the terms of its own ops, so that rounding plays no part."""
    costs, _, _ = run_of(policy, hardware, **shared)
    run = simulate(zigzag, costs.work, costs, hardware.contention)
    steps = range(costs.work.gen_len)
    bound_s = phase_seconds(steps_s(costs, steps), hardware.contention)
    assert run.seconds >= bound_s * (1 - 1e-6)


@pytest.mark.parametrize("hardware", [APART, SHARED], ids=["apart", "shared"])
def test_a_long_run_is_predicted_from_a_part_of_it(hardware, monkeypatch):
    policy = Policy(weights=Placement(), kv_cache=Placement(host=0.5), num_batches=2)
    model = Found(CONFIG, np.dtype(np.float16)).model(policy)
    job = Job(prompt_len=20, gen_len=40, num_prompts=16)
    whole = predict(model, policy, hardware, job)
    monkeypatch.setattr("flexjax.plan.predict.MOST_CELLS", 30)
    monkeypatch.setattr("flexjax.plan.predict.LEAST_LAYERS", 3)
    part = predict(model, policy, hardware, job)
    assert part.prefill_s == pytest.approx(whole.prefill_s, rel=0.15)
    assert part.decode_s == pytest.approx(whole.decode_s, rel=0.15)


@pytest.mark.parametrize(
    ("machine", "policy"),
    [
        ("h200", Policy(kv_cache=Placement(), batch_size=16, num_batches=4)),
        (
            "t4-208gb",
            Policy(
                kv_cache=Placement(host=1.0),
                batch_size=64,
                num_batches=2,
                host_attention=True,
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_bounds_a_run_may_change_as_its_cache_grows(machine, policy, monkeypatch):
    """So a part of its steps must be like all of them, not like the first."""
    policy = dataclasses.replace(policy, weights=Placement(host=1.0))
    model = find_model("opt-13b", platform="gpu").model(policy)
    job = Job(prompt_len=64, gen_len=512, num_prompts=policy.block_size)
    part = predict(model, policy, read_hardware(machine), job)
    monkeypatch.setattr("flexjax.plan.predict.MOST_CELLS", 8000)
    more = predict(model, policy, read_hardware(machine), job)
    assert part.decode_s == pytest.approx(more.decode_s, rel=0.01)


def test_long_runs_store_as_many_tokens_as_their_ops():
    """Steps are sampled, but all store one token but for the last."""
    policy = Policy(kv_cache=Placement(), weights=Placement())
    costs, _, form = run_of(policy, APART, gen_len=60)
    exact = steps_s(costs, range(1, 60))
    found = form.decode.at(shares_of(policy))
    assert found[Resource.DISK_WRITE] == pytest.approx(exact[Resource.DISK_WRITE])
    read = found[Resource.DISK_READ]
    assert read == pytest.approx(exact[Resource.DISK_READ], rel=0.02)


def test_a_schedule_without_phases_is_not_predicted():
    policy = Policy(schedule=Schedule.ROW_BY_ROW)
    model = Found(CONFIG, np.dtype(np.float16)).model(policy)
    with pytest.raises(ValueError, match="'row_by_row' cannot be predicted"):
        predict(model, policy, APART, Job(prompt_len=20, gen_len=3, num_prompts=4))


def test_blocks_follow_each_other_and_the_last_may_be_smaller():
    policy = Policy(batch_size=4, num_batches=2)
    model = Found(CONFIG, np.dtype(np.float16)).model(policy)
    times = {
        count: predict(
            model, policy, APART, Job(prompt_len=20, gen_len=3, num_prompts=count)
        ).total_s
        for count in (4, 8, 20)
    }
    assert times[20] == pytest.approx(2 * times[8] + times[4], rel=0.05)


def test_every_kind_of_tensor_has_a_share_on_both_near_tiers():
    shares = shares_of(Policy())
    assert set(shares) == {(k, t) for k in Kind for t in (Tier.DEVICE, Tier.HOST)}
