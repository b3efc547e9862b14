"""What is found fits, runs as it is, and is no worse than what a person would try."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.arrangement import shape_of
from flexjax.memory.footprint import run_peak_bytes
from flexjax.plan import search as search_module
from flexjax.plan.hardware import read_hardware
from flexjax.plan.job import Job
from flexjax.plan.planner import (
    Found,
    allowed_policies,
    check_job,
    find_model,
    make_plan,
)
from flexjax.plan.predict import predict
from flexjax.plan.report import plan_to_json, plan_to_text, saved_s
from flexjax.plan.search import fits, frontier, memory_budgets, search
from flexjax.policy import BITS, Kind, Placement, Policy, Tier, from_json, validate
from flexjax.schedule.footprint import by_tier
from tests.cells import every_other
from tests.plan.test_closed_form import APART, CONFIG, SHARED

DTYPE = np.dtype(np.float16)
JOB = Job(prompt_len=20, gen_len=8, num_prompts=40)
FOUND = Found(CONFIG, DTYPE)
MODEL = FOUND.model(Policy())


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch):
    """All of a small machine is to be used."""
    monkeypatch.setattr(search_module, "RESERVED_BYTES", 0)
    monkeypatch.setattr(search_module, "RESERVED", 0.0)


def machine(base, device_kib, host_kib):
    return dataclasses.replace(
        base,
        device_memory_bytes=device_kib << 10,
        host_memory_bytes=host_kib << 10,
        call_s={1: 1e-6},
    )


machines = st.builds(
    machine,
    st.sampled_from([APART, SHARED]),
    st.integers(4500, 20_000),
    st.integers(4500, 20_000),
)


@given(hardware=machines)
@settings(max_examples=10, deadline=None)
def test_a_plan_fits_as_the_engine_counts_and_its_policy_is_valid(hardware):
    plan = search(MODEL, hardware, JOB)
    layout = MODEL.layout(plan.policy, hardware.processor)
    work = layout.workload(
        plan.policy,
        shape_of(plan.policy, min(plan.policy.block_size, JOB.num_prompts)),
        prompt_len=JOB.prompt_len,
        gen_len=JOB.gen_len,
    )
    held = by_tier(run_peak_bytes(work, plan.policy, layout))
    budgets = plan.budgets
    if hardware.device_is_host:
        assert held[Tier.DEVICE] + held[Tier.HOST] <= budgets[Tier.HOST]
    else:
        assert held[Tier.DEVICE] <= budgets[Tier.DEVICE]
        assert held[Tier.HOST] <= budgets[Tier.HOST]
    stored = layout.home_bytes[Tier.DISK]  # is there whatever happens
    assert held[Tier.DISK] - stored <= budgets[Tier.DISK]
    values = plan_to_json(plan, hardware, saved_s(plan, MODEL, hardware))
    assert from_json(values["policy"]) == validate(plan.policy)
    assert values["total_s"] == pytest.approx(values["prefill_s"] + values["decode_s"])
    assert plan.policy.activations.disk == pytest.approx(0)


@pytest.mark.parametrize("base", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("kib", every_other([4000, 8000]))
def test_no_policy_of_a_grid_is_predicted_to_be_much_faster(base, kib):
    hardware = machine(base, kib, kib)
    plan = search(MODEL, hardware, JOB)
    shared = hardware.device_is_host
    budgets = memory_budgets(hardware.free_bytes, device_is_host=shared)
    shares = [Placement(), Placement(device=0.5), Placement(device=1.0)]
    if not shared:
        shares += [Placement(host=1.0), Placement(device=0.5, host=0.5)]
    for weights, cache, batch_size, num_batches in itertools.product(
        shares, shares, (8, 20, 40), (1, 2, 5)
    ):
        policy = Policy(
            weights=weights,
            kv_cache=cache,
            batch_size=batch_size,
            num_batches=num_batches,
        )
        if fits(MODEL, policy, budgets, JOB, hardware.processor):
            found_s = predict(MODEL, policy, hardware, JOB).total_s
            assert plan.prediction.total_s <= 1.05 * found_s, policy


@pytest.mark.parametrize("base", [APART, SHARED], ids=["apart", "shared"])
def test_a_frontier_gives_more_for_more_patience_and_ends_at_the_best(base):
    hardware = machine(base, 6000, 6000)
    plans = frontier(MODEL, hardware, JOB)
    rates = [plan.prediction.tokens_per_s for plan in plans]
    latencies = [plan.prediction.block_s for plan in plans]
    assert rates == sorted(set(rates))
    assert latencies == sorted(set(latencies))
    best = search(MODEL, hardware, JOB).prediction
    assert best.tokens_per_s <= 1.05 * rates[-1]


@pytest.mark.parametrize("base", [APART, SHARED], ids=["apart", "shared"])
def test_a_block_that_has_to_be_quick_is(base):
    hardware = machine(base, 6000, 6000)
    free = search(MODEL, hardware, JOB)
    most_s = 0.5 * free.prediction.block_s
    quick = search(MODEL, hardware, JOB, most_block_s=most_s)
    assert quick.prediction.block_s <= most_s
    assert quick.prediction.total_s >= free.prediction.total_s
    with pytest.raises(ValueError, match="no block is done within 1e-09 s"):
        search(MODEL, hardware, JOB, most_block_s=1e-9)


def test_where_memory_is_short_fewer_layers_are_on_their_way():
    found = {
        search(MODEL, machine(APART, kib, kib), JOB).layers_ahead
        for kib in range(4000, 7000, 250)
    }
    assert found == {1, 2}


@pytest.mark.parametrize("base", [APART, SHARED], ids=["apart", "shared"])
def test_more_memory_is_not_slower(base):
    times = [
        search(MODEL, machine(base, kib, kib), JOB).prediction.total_s
        for kib in (4000, 6000, 12_000, 40_000)
    ]
    for less, more in itertools.pairwise(times):
        assert more <= 1.05 * less


@pytest.mark.parametrize("gen_len", [8, 1])  # of one token no cache is kept
def test_where_everything_fits_everything_is_on_the_device(gen_len):
    job = dataclasses.replace(JOB, gen_len=gen_len)
    plan = search(MODEL, machine(APART, 10**6, 10**6), job)
    for kind in Kind:
        assert plan.policy.placement(kind).device == pytest.approx(1.0), kind


def test_where_nothing_fits_it_is_said_where_and_by_how_much():
    message = r"not even one prompt of 20 tokens fits.*device needs .* KiB.*of weights"
    with pytest.raises(ValueError, match=message):
        search(MODEL, machine(APART, 100, 10**6), JOB)


def test_quantized_weights_are_tried_only_where_they_are_allowed():
    # A disk so slow that fewer bytes win, whatever they cost.
    hardware = dataclasses.replace(
        machine(APART, 4000, 3000),
        disk_read_bytes_per_s=1e6,
        dequantized_bytes_per_s={4: 1e12, 8: 1e12},
    )
    for quantized in (False, True):
        allowed = allowed_policies(quantized=quantized, host_attention=False)
        plan, _ = make_plan(FOUND, hardware, JOB, allowed)
        assert (plan.policy.weight_bits is not None) == quantized


def test_weights_that_are_quantized_already_stay_so():
    stored = Policy(weight_bits=4)
    allowed = allowed_policies(quantized=True, host_attention=False, base=stored)
    assert {policy.weight_bits for policy in allowed} == {4}
    assert {policy.kv_cache_bits for policy in allowed} == {None, 4}


def kernels(*, plain, rounded):
    """A processor with the kernels, and their rates."""
    return dataclasses.replace(
        machine(SHARED, 10**6, 10**6),
        quantized_product_flops_per_s={bits: {1: plain} for bits in BITS},
        rounded_product_flops_per_s={bits: {1: rounded} for bits in BITS},
    )


@pytest.mark.parametrize(
    ("rates", "allows", "rounds"),
    [
        ({"plain": 1e12, "rounded": 1e15}, True, True),
        ({"plain": 1e12, "rounded": 1e15}, False, False),
        ({"plain": 1e15, "rounded": 1e12}, True, False),
    ],
)
def test_a_plan_that_may_quantize_rounds_where_products_gain_by_it(
    rates, allows, rounds
):
    found = Found(CONFIG, np.dtype("bfloat16"))
    allowed = allowed_policies(quantized=True, host_attention=False, rounded=allows)
    plan, _ = make_plan(found, kernels(**rates), JOB, allowed)
    assert plan.policy.weight_bits is not None
    assert plan.policy.activation_bits == (8 if rounds else None)


def test_weights_that_no_kernel_takes_are_planned_without_rounding():
    found = Found(CONFIG, np.dtype("float32"))
    hardware = dataclasses.replace(
        kernels(plain=1e12, rounded=1e15),
        disk_read_bytes_per_s=1e6,
        device_memory_bytes=4000 << 10,
        host_memory_bytes=4000 << 10,
        dequantized_bytes_per_s={4: 1e12, 8: 1e12},
    )
    allowed = allowed_policies(quantized=True, host_attention=False, rounded=True)
    plan, _ = make_plan(found, hardware, JOB, allowed)
    assert plan.policy.weight_bits is not None
    assert plan.policy.activation_bits is None


def test_one_model_s_predictions_tell_rounded_products_from_others():
    policies = [Policy(weight_bits=4, activation_bits=bits) for bits in (None, 8)]
    model = Found(CONFIG, np.dtype("bfloat16")).model(policies[0])
    for rates, is_quicker in (((1e9, 1e12), True), ((1e12, 1e9), False)):
        hardware = kernels(plain=rates[0], rounded=rates[1])
        plain, rounded = (predict(model, p, hardware, JOB).total_s for p in policies)
        assert (rounded < plain) == is_quicker


def test_a_plan_in_words_names_every_tier_and_the_bottleneck():
    hardware = machine(SHARED, 5000, 5000)
    plan = search(MODEL, hardware, JOB)
    text = plan_to_text(plan, MODEL, hardware, saved_s(plan, MODEL, hardware))
    for word in (*(tier.value for tier in Tier), "<- bottleneck", "tokens/s", "save"):
        assert word in text


def test_a_published_name_of_another_owner_is_another_model(golden, monkeypatch):
    folder = golden("opt-pre-ln").folder
    monkeypatch.setattr(
        "checkpoints_tools.hub.snapshot_download", lambda *_, **__: str(folder)
    )
    found = find_model("someone/opt-1.3b", platform="cpu")
    assert found.config == find_model(str(folder), platform="cpu").config


@pytest.mark.parametrize("base", [APART, SHARED], ids=["apart", "shared"])
def test_more_memory_saves_what_a_plan_with_it_saves(base):
    plan = search(MODEL, machine(base, 4000, 4000), JOB)
    whole_s = plan.prediction.total_s
    saved = saved_s(plan, MODEL, machine(base, 4000, 4000))
    on_device = next(s for what, s in saved.items() if "GiB more on device" in what)
    roomy = search(MODEL, machine(base, 4000 + (1 << 20), 4000 + (1 << 20)), JOB)
    assert 0 < on_device <= whole_s - 0.99 * roomy.prediction.total_s
    assert all(0 <= seconds < whole_s for seconds in saved.values())


def test_what_more_memory_saves_keeps_to_the_time_of_a_block():
    hardware = machine(APART, 4600, 4600)
    most_s = search(MODEL, hardware, JOB).prediction.block_s
    plan = search(MODEL, hardware, JOB, most_block_s=most_s)
    larger = machine(APART, 4600 + (1 << 20), 4600)
    best = search(MODEL, larger, JOB, most_block_s=most_s).prediction.total_s
    more = "1 GiB more on device"
    bounded = saved_s(plan, MODEL, hardware, most_block_s=most_s)[more]
    assert bounded == pytest.approx(plan.prediction.total_s - best)
    assert 0 < bounded < 0.9 * saved_s(plan, MODEL, hardware)[more]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(prompt_len=0, gen_len=1, num_prompts=1), "prompt_len is 0"),
        (Job(prompt_len=1, gen_len=-1, num_prompts=1), "gen_len is -1"),
        (Job(prompt_len=1, gen_len=1, num_prompts=0), "num_prompts is 0"),
        (Job(prompt_len=2040, gen_len=32, num_prompts=1), "make 2072 tokens"),
    ],
)
def test_jobs_that_no_policy_can_do_are_refused(job, message):
    with pytest.raises(ValueError, match=message):
        check_job(job, CONFIG)


def test_a_model_is_a_name_a_store_or_a_checkpoint(golden):
    known = find_model("facebook/opt-1.3b", platform="cpu")
    assert (known.config.num_hidden_layers, known.dtype.name) == (24, "bfloat16")
    checkpoint = golden("opt-pre-ln")
    stored = find_model(str(checkpoint.store), platform="cpu")
    made = find_model(str(checkpoint.folder), platform="cpu")
    assert (made.config, made.dtype) == (stored.config, stored.dtype)
    assert stored.dtype.name == "float32"
    sizes = [
        {name: entry.nbytes for name, entry in found.model(Policy()).tensors.items()}
        for found in (stored, made)
    ]
    assert sizes[0] == sizes[1]
    with pytest.raises(ValueError, match="unknown model 'opt-9b'"):
        find_model("opt-9b", platform="cpu")


def test_more_memory_makes_no_plan_slower():
    model = find_model("facebook/opt-6.7b", platform="gpu").model(Policy())
    job = Job(prompt_len=64, gen_len=32, num_prompts=995)
    machine = read_hardware("t4-208gb")
    took_s = [
        search(
            model, dataclasses.replace(machine, host_memory_bytes=nbytes), job
        ).prediction.total_s
        for nbytes in (12 << 30, machine.host_memory_bytes)
    ]
    assert took_s[1] <= 1.001 * took_s[0]


def test_of_a_model_on_the_hub_only_the_config_is_fetched(golden, monkeypatch):
    folder, asked = golden("opt-pre-ln").folder, []

    def fetch(model, allow_patterns, **_options):
        asked.append((model, allow_patterns))
        return str(folder)

    monkeypatch.setattr("checkpoints_tools.hub.snapshot_download", fetch)
    found = find_model("someone/their-opt", platform="cpu")
    made = find_model(str(folder), platform="cpu")
    assert (found.config, found.dtype) == (made.config, made.dtype)
    assert asked == [("someone/their-opt", ["config.json"])]


def test_a_model_on_the_hub_of_another_type_is_refused(golden, monkeypatch):
    folder = golden("opt-pre-ln").folder
    monkeypatch.setattr(
        "checkpoints_tools.hub.snapshot_download", lambda *_, **__: str(folder)
    )
    monkeypatch.setattr("flexjax.plan.planner.read_dtype", lambda _: "float64")
    with pytest.raises(ValueError, match="their-opt has weights of float64, expected"):
        find_model("someone/their-opt", platform="cpu")
