"""The grid of policies that predictions are compared on, and what is made of it."""

import pytest

from bench.predictions import GEN_LEN, PROMPT_LEN, compare, policies, summary
from checkpoints_tools.resolve import resolve_model
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.plan.hardware import read_hardware
from flexjax.policy import Placement, Policy, validate


def test_the_grid_is_of_valid_policies_each_of_its_own():
    grids = {name: list(policies(name)) for name in ("opt-1.3b", "opt-6.7b")}
    assert len(grids["opt-1.3b"]) >= 24
    for grid in grids.values():
        for policy in grid:
            assert validate(policy) == policy
            assert grid.count(policy) == 1


def row(error, held=10, said=11):
    return {
        "error": error,
        "predicted_peak_bytes": {"device": said, "host": 0, "disk": 5},
        "measured_peak_bytes": {"device": held, "host": 0, "disk": 50},
    }


def test_errors_count_by_size_and_bytes_without_the_disk():
    rows = [row(error) for error in (-0.1, 0.02, 0.04, -0.06, 0.3)]
    found = summary([*rows, row(0.05, said=9)])
    assert found["policies"] == 6
    assert found["median_error"] == pytest.approx(0.055)
    assert found["error_of_90_percent"] == pytest.approx(0.1)
    assert found["least_peak_ratio"] == pytest.approx(0.9)
    assert found["most_peak_ratio"] == pytest.approx(1.1)


def test_a_policy_is_predicted_and_run(tmp_path):
    policy = Policy(weights=Placement(), kv_cache=Placement(), batch_size=2)
    hardware = read_hardware("epyc-2-cores")
    store = open_store(resolve_model(EMBEDDED_MODEL))
    found = compare(store, policy, hardware, tmp_path)
    assert found["job"] == {
        "prompt_len": PROMPT_LEN,
        "gen_len": GEN_LEN,
        "num_prompts": 2,
    }
    measured = found["measured"]
    total_s = measured["prefill_s"] + measured["decode_s"]
    assert measured["total_s"] == pytest.approx(total_s)
    assert found["error"] == found["predicted"]["total_s"] / total_s - 1
    for tier in ("device", "host"):
        told, held = (found[f"{w}_peak_bytes"][tier] for w in ("predicted", "measured"))
        assert told >= held
