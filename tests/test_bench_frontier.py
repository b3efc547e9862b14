"""Frontiers and grids of plans, and how a report shows them."""

import json

import pytest

from bench import frontier as module
from bench.report_files import read_results
from flexjax.cli import BAD_INPUT, run_command
from flexjax.policy import Policy, to_json, validate
from flexjax.policy import from_json as policy_from_json

pytest.importorskip("matplotlib")

from bench import report

XEON = {
    "cpu": {"model": "Intel(R) Xeon(R) Processor @ 2.10GHz", "cores": 2},
    "memory_bytes": 25 * 10**9,
    "accelerator": None,
}
JOB = ("--prompt-len", "32", "--gen-len", "4", "--num-prompts", "32")


def run(door, *arguments):
    return run_command(door.main, door.build_parser(), [str(a) for a in arguments])


def test_a_frontier_is_of_policies_that_run_and_is_shown(tmp_path):
    path = tmp_path / "frontier.json"
    arguments = ("opt-6.7b", *JOB, "--hardware", "t4-208gb", "--json", path)
    assert run(module, *arguments) == 0
    values = json.loads(path.read_text())
    points = values["frontier"]
    assert len(points) > 2
    for name in ("block_s", "tokens_per_s"):
        assert [p[name] for p in points] == sorted(p[name] for p in points)
    for point in points:
        assert validate(policy_from_json(point["policy"]))
    (result,) = read_results([path])
    assert result.machine == values["hardware"]
    assert run_report(path, tmp_path / "out").count(values["command"]) == 1
    assert list((tmp_path / "out").glob("frontier-*.svg"))


def run_report(path, out):
    parser = report.build_parser()
    assert run_command(report._main, parser, [str(path), "--out", str(out)]) == 0
    return (out / "README.md").read_text()


def test_an_unknown_machine_is_refused(capsys):
    assert run(module, "opt-6.7b", "--hardware", "abacus") == BAD_INPUT
    assert "hardware abacus cannot be read" in capsys.readouterr().err


def test_a_grid_is_shown(tmp_path):
    taken = {"policy": to_json(Policy()), "seconds": 2.0}
    values = {
        "model": "opt-1.3b",
        "machine": XEON,
        "command": "python -m bench.grid opt-1.3b --memory-cap 2GB",
        "machines": [
            {
                "memory_cap_bytes": 2 * 10**9,
                "chosen": taken | {"seconds": 2.1},
                "grid": [taken, taken],
                "best": taken,
                "chosen_over_best": 1.05,
            }
        ],
    }
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(values))
    page = run_report(path, tmp_path / "out")
    assert "| 2 GB | 2.10 s (1 x 8, all on the device) | 2.00 s" in page
    assert "| 2 | +5.0% |" in page
