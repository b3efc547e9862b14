import argparse
import dataclasses
import json

import pytest

from bench.cases import case_from_json, case_to_json
from bench.catalog import all_cases, find_case
from flexjax.models.config import MODELS, OPTConfig
from flexjax.policy import validate
from flexjax.policy_args import add_policy_arguments, policy_from_args

CASES = all_cases()


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert {find_case(name).name for name in names} == set(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_can_run_and_is_read_back(case):
    assert case.model is None or case.model in MODELS
    if case.model is not None:
        case.ensure_fits(MODELS[case.model])
    policy = validate(case.policy)
    again = case_from_json(json.loads(json.dumps(case_to_json(case))))
    assert again == dataclasses.replace(case, policy=policy)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("1b3_test", "--percent 100 0 100 0 100 0 --gpu-batch-size 16"),
        ("1b3_test-weights-half", "--percent 50 50 100 0 100 0 --gpu-batch-size 16"),
        ("1b3_test-weights-disk", "--percent 0 0 100 0 100 0 --gpu-batch-size 16"),
        (
            "1b3_test-two-batches",
            "--percent 100 0 100 0 100 0 --gpu-batch-size 16 --num-gpu-batches 2",
        ),
        (
            "6b7_1x1",
            "--percent 100 0 100 0 100 0 --gpu-batch-size 2 --overlap False",
        ),
        (
            "ablation-no-cpu",
            "--percent 0 50 0 0 0 100 --gpu-batch-size 32 --num-gpu-batches 8",
        ),
    ],
)
def test_a_case_of_flexgen_is_what_its_command_line_says(name, command):
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)
    policy = policy_from_args(parser.parse_args(command.split()))
    assert validate(find_case(name).policy) == policy


def test_an_unknown_case_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean opt-1.3b-disk.*--list"):
        find_case("opt-1.3b-dsk")
    with pytest.raises(ValueError, match="unknown case '!!'. `python -m bench.run"):
        find_case("!!")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_len": 0}, "--prompt-len is 0, expected at least 1"),
        ({"gen_len": -1}, "--gen-len is -1, expected at least 1"),
        ({"prompt_len": 30, "gen_len": 3}, "need 33 positions, but the model has 32"),
    ],
)
def test_a_run_that_the_model_has_no_room_for_is_refused(changes, message):
    config = OPTConfig(max_position_embeddings=32)
    case = dataclasses.replace(find_case("smoke"), **changes)
    with pytest.raises(ValueError, match=message):
        case.ensure_fits(config)
