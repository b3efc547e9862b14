"""The grid that plans are compared with, and what is made of its runs."""

import pytest

from bench import grid as module
from bench.grid import (
    CACHE_ON_DEVICE,
    WEIGHTS_ON_DEVICE,
    grid,
    run_here,
    with_ratio,
)
from checkpoints_tools.resolve import resolve_model
from flexjax.checkpoint import EMBEDDED_MODEL, open_store
from flexjax.cli import run_command
from flexjax.plan.job import Job
from flexjax.policy import Policy, from_json, to_json, validate


def test_the_grid_is_of_valid_policies_each_of_its_own():
    policies = list(grid())
    assert len(policies) >= 60  # of which not all fit
    for policy in policies:
        assert validate(policy) == policy
        assert policies.count(policy) == 1
        assert policy.block_size <= module.JOB.num_prompts


def run(seconds):
    return {"policy": to_json(Policy()), "seconds": seconds}


@pytest.mark.parametrize(("chosen", "ratio"), [(3.0, 1.5), (1.0, 0.5)])
def test_a_plan_is_compared_with_the_best_of_the_grid(chosen, ratio):
    result = with_ratio({"chosen": run(chosen), "grid": [run(4.0), run(2.0)]})
    assert result["best"]["seconds"] == 2.0
    assert result["chosen_over_best"] == ratio


def test_the_plan_and_all_that_fits_are_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "JOB", Job(prompt_len=4, gen_len=2, num_prompts=4))
    monkeypatch.setattr(module, "SHAPES", ((2, 2),))
    found = run_here(open_store(resolve_model(EMBEDDED_MODEL)), tmp_path)
    assert len(found["grid"]) == len(WEIGHTS_ON_DEVICE) * len(CACHE_ON_DEVICE)
    for policy in (found["chosen"], *found["grid"]):
        assert policy["seconds"] > 0
        assert validate(from_json(policy["policy"]))


def test_a_result_file_without_a_cap_is_refused(tmp_path, capsys):
    path = tmp_path / "grid.json"
    argv = ["opt-1.3b", "--json", str(path)]
    assert run_command(module.main, module.build_parser(), argv) == 2
    assert "--json keeps what the machines of --memory-cap took" in (
        capsys.readouterr().err
    )
    assert not path.exists()
