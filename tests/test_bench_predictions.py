"""The grid of policies that predictions are compared on, and what is made of it."""

import dataclasses
import json

import pytest

from bench.predictions import (
    GEN_LEN,
    HOST,
    PROMPT_LEN,
    compare,
    host_attention_gains,
    policies,
    summary,
)
from bench.report_files import read_results
from bench.report_values import Predictions
from checkpoints_tools.resolve import resolve_model
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.plan.hardware import read_hardware
from flexjax.policy import Placement, Policy, to_json, validate


def test_the_grid_is_of_valid_policies_each_of_its_own():
    grids = [
        list(policies(name, device_is_host=is_host))
        for name in ("opt-1.3b", "opt-6.7b")
        for is_host in (True, False)
    ]
    assert len(grids[0]) >= 24
    for grid in grids:
        for policy in grid:
            assert validate(policy) == policy
            assert grid.count(policy) == 1


def test_every_policy_that_attends_on_the_host_has_one_that_moves_the_cache():
    grid = list(policies("opt-6.7b", device_is_host=False))
    on_host = [policy for policy in grid if policy.host_attention]
    assert on_host
    for policy in on_host:
        assert dataclasses.replace(policy, host_attention=False) in grid


def test_what_attention_on_the_host_wins_is_of_the_same_policy():
    def run(decode_s, said_s, **changes):
        policy = {"batch_size": 8, "host_attention": False} | changes
        seconds = {"measured": decode_s, "predicted": said_s}
        return {
            "model": "m",
            "policy": policy,
            **{what: {"decode_s": value} for what, value in seconds.items()},
        }

    on_host = run(2.0, 4.0, host_attention=True)
    rows = [run(9.0, 9.0, batch_size=4), run(3.0, 5.0), on_host]
    (gain,) = host_attention_gains(rows)
    assert gain == {"policy": on_host["policy"], "measured": 1.5, "predicted": 1.25}
    assert host_attention_gains([on_host]) == []


def test_a_report_tells_attention_on_the_host_from_moving_the_cache(tmp_path):
    seconds = {"prefill_s": 1.0, "decode_s": 2.0}
    rows = [
        {
            "model": "opt-6.7b",
            "policy": to_json(Policy(kv_cache=HOST, host_attention=on_host)),
            "predicted": seconds,
            "measured": seconds,
            "error": 0.0,
        }
        for on_host in (False, True)
    ]
    values = {
        "summary": {"median_error": 0.0, "error_of_90_percent": 0.0},
        "host_attention": host_attention_gains(rows),
        "predictions": rows,
        "machine": {"cpu": {"model": "a CPU", "cores": 2}, "memory_bytes": 10**9},
        "command": "python -m bench.predictions",
    }
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(values))
    (result,) = read_results([path])
    assert isinstance(result, Predictions)
    moved, attended = (predicted.policy for predicted in result.rows)
    assert moved.endswith("kv-cache host=1")
    assert attended == f"{moved}, attended to there"


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
        "num_shared": 0,
        "rows_per_prefix": 0,
        "fewest_per_prefix": 0,
    }
    measured = found["measured"]
    total_s = measured["prefill_s"] + measured["decode_s"]
    assert measured["total_s"] == pytest.approx(total_s)
    assert found["error"] == found["predicted"]["total_s"] / total_s - 1
    for tier in ("device", "host"):
        told, held = (found[f"{w}_peak_bytes"][tier] for w in ("predicted", "measured"))
        assert told >= held
