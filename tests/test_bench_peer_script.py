"""The peer's script, which runs elsewhere, with packages that are not here."""

import pathlib
import runpy
import sys
from unittest import mock

import pytest

from bench.peers.accelerate_system import SCRIPT, Accelerate
from flexjax.prompts import random_prompts
from tests.test_bench_sweep import JOB


@pytest.fixture
def script(monkeypatch):
    for name in ("accelerate", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    sys.modules["torch"].from_numpy = lambda array: array
    return runpy.run_path(str(SCRIPT))


def test_the_script_takes_the_command_that_runs_it(script):
    system = Accelerate(batch_sizes=(8, 16), layers=("disk", "host"))
    for ladder in system.ladders(JOB):
        for each in ladder:
            words = system.command(JOB, each, pathlib.Path("out.json"))
            args = script["build_parser"]().parse_args(words[2:])
            assert args.batch_size == each.num_rows
            assert (args.prompt_len, args.gen_len) == (8, 16)


def test_the_script_makes_the_prompts_that_flexjax_makes(script):
    prompts = script["random_prompts"](50272, 3, 5)
    assert prompts.tolist() == random_prompts(50272, 3, 5)


def test_the_script_knows_prompts_from_tokens(script):
    clock = script["StepClock"](4)
    for _ in range(1 + 4):
        clock.put(None)
    clock.end()
    assert len(clock.step_s) == 3
    assert clock.prefill_s + sum(clock.step_s) == pytest.approx(clock.arrivals_s[-1])


def test_only_layers_are_offloaded(script):
    places = script["device_map"](2, "disk", "cpu")
    on_disk = [name for name, place in places.items() if place == "disk"]
    assert on_disk == [f"model.decoder.layers.{i}" for i in range(2)]
