"""What sampling parameters accept, and how they say no."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from flexjax.sampling_params import SamplingParams


def test_defaults_are_those_of_vllm():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("max_tokens", True),
        ("max_tokens", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 1e39),
        ("temperature", 10**400),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", 3),
        ("stop_token_ids", "3"),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", True),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(name: str, value: Any):
    message = rf"^{name}={re.escape(repr(value))} cannot be used: {name} must be \w+"
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("temperature", 0, 0.0),
        ("top_k", -1, -1),
        ("top_p", 1, 1.0),
        ("min_p", 1, 1.0),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", np.int64(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("stop", "end", ("end",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [2, np.int32(3)], (2, 3)),
        ("stop_token_ids", None, ()),
        ("logprobs", 0, 0),
    ],
)
def test_what_is_allowed_is_kept_in_one_plain_form(name: str, value: Any, stored: Any):
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == stored
    assert type(getattr(params, name)) is type(stored)
    json.dumps(dataclasses.asdict(params))
    assert hash(params) == hash(dataclasses.replace(params))


def test_greedy_and_filters_are_recognised():
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams().is_greedy
    assert not SamplingParams(top_k=-1).has_filter
    assert all(
        params.has_filter
        for params in (
            SamplingParams(top_k=1),
            SamplingParams(top_p=0.9),
            SamplingParams(min_p=0.1),
        )
    )
