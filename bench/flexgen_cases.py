"""FlexGen's benchmark suite under its own names: its batch shapes and its placements.

A suite's plain name is its case with 512 prompt tokens, or its first; a suffix names
the others. Where FlexGen ran fewer tokens or batches and projected the rest, these run
whole.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench.cases import Case
from flexjax.policy import Placement, Policy, Schedule

_PROMPT_LEN, _GEN_LEN = 512, 32
_CPU = {"host_attention": True}  # FlexGen's --cpu-cache-compute
_BOTH_4BIT = {"weight_bits": 4, "kv_cache_bits": 4}
_ALL_ON_GPU = (100, 0, 100, 0, 100, 0)


def flexgen_cases() -> Iterator[Case]:
    """Every case of the suites that run on one device."""
    yield from _suite_1b3()
    yield from _suite_6b7()
    yield from _suite_30b()
    yield from _suite_175b()
    yield from _ablations()


def _policy(
    shape: tuple[int, int], percent: tuple[int, ...], **features: Any
) -> Policy:
    """A policy as FlexGen's `--percent` says it, for `(batch size, batches)`."""
    places = [
        Placement(device=device / 100, host=host / 100)
        for device, host in zip(percent[::2], percent[1::2], strict=True)
    ]
    weights, kv_cache, activations = places
    batch_size, num_batches = shape
    return Policy(
        weights=weights,
        kv_cache=kv_cache,
        activations=activations,
        batch_size=batch_size,
        num_batches=num_batches,
        **features,
    )


def _case(name: str, model: str, policy: Policy, note: str = "") -> Case:
    return Case(
        name=name,
        model=model,
        policy=policy,
        prompt_len=_PROMPT_LEN,
        gen_len=_GEN_LEN,
        note=note,
    )


def _by_prompt_len(
    suite: str, model: str, policies: dict[int, Policy], note: str = ""
) -> Iterator[Case]:
    """A case for each prompt length."""
    for prompt_len, policy in policies.items():
        name = suite if prompt_len == _PROMPT_LEN else f"{suite}-s{prompt_len}"
        case = _case(name, model, policy, note)
        yield dataclasses.replace(case, prompt_len=prompt_len)


def _suite_1b3() -> Iterator[Case]:
    spilled = (100, 0, 0, 0, 100, 0)
    rows: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("", _ALL_ON_GPU, {}),
        ("-weights-host", (0, 100, 100, 0, 100, 0), {}),
        ("-kv-host", (100, 0, 0, 100, 100, 0), _CPU),
        ("-both-host", (0, 100, 0, 100, 100, 0), _CPU),
        ("-weights-disk", (0, 0, 100, 0, 100, 0), {}),
        ("-kv-disk", spilled, _CPU),
        ("-weights-half", (50, 50, 100, 0, 100, 0), {}),
        ("-kv-half", (100, 0, 50, 50, 100, 0), _CPU),
        ("-kv-disk-sparse", spilled, _CPU | {"attention_sparsity": 0.1}),
        ("-kv-disk-4bit", spilled, {"kv_cache_bits": 4}),
    ]
    for suffix, percent, features in rows:
        policy = _policy((16, 1), percent, **features)
        case = _case(f"1b3_test{suffix}", "opt-1.3b", policy, "each way to place")
        yield dataclasses.replace(case, cold=suffix == "-weights-disk")
    policy = _policy((16, 2), _ALL_ON_GPU)
    yield _case("1b3_test-two-batches", "opt-1.3b", policy, "each way to place")


def _suite_6b7() -> Iterator[Case]:
    serial = {"schedule": Schedule.SERIAL}
    plain = {256: (4, 1), 512: (2, 1), 1024: (1, 1)}
    packed = {256: (128, 1), 512: (72, 1), 1024: (28, 1)}
    yield from _by_prompt_len(
        "6b7_1x1",
        "opt-6.7b",
        {n: _policy(shape, _ALL_ON_GPU, **serial) for n, shape in plain.items()},
        "all on the device",
    )
    yield from _by_prompt_len(
        "6b7_1x1_comp",
        "opt-6.7b",
        {
            n: _policy(shape, _ALL_ON_GPU, **serial, **_BOTH_4BIT)
            for n, shape in packed.items()
        },
        "all on the device, in 4 bits",
    )


def _suite_30b() -> Iterator[Case]:
    cache_on_host = (0, 100, 0, 100)
    plain = {
        256: _policy((160, 2), (10, 90, *cache_on_host), **_CPU),
        512: _policy((48, 3), (20, 80, *cache_on_host), **_CPU),
        1024: _policy((20, 4), (4, 96, *cache_on_host), **_CPU),
    }
    packed = {256: (128, 8), 512: (64, 8), 1024: (20, 12)}
    yield from _by_prompt_len("30b_1x1", "opt-30b", plain, "weights on the host")
    yield from _by_prompt_len(
        "30b_1x1_comp",
        "opt-30b",
        {
            n: _policy(shape, (0, 100, *cache_on_host), kv_cache_bits=4)
            for n, shape in packed.items()
        },
        "all on the host, the KV cache in 4 bits",
    )


def _suite_175b() -> Iterator[Case]:
    plain = {256: (64, 8), 512: (32, 8), 1024: (12, 12)}
    packed = {256: (96, 3), 512: (48, 3), 1024: (12, 4)}
    yield from _by_prompt_len(
        "175b_1x1",
        "opt-175b",
        {n: _policy(s, (0, 50, 0, 0, 0, 100), **_CPU) for n, s in plain.items()},
        "half of the weights and the KV cache on disk",
    )
    yield from _by_prompt_len(
        "175b_1x1_comp",
        "opt-175b",
        {
            n: _policy(s, (0, 100, 0, 100, 0, 100), **_BOTH_4BIT)
            for n, s in packed.items()
        },
        "all on the host, in 4 bits",
    )


def _ablations() -> Iterator[Case]:
    searched = (0, 50, 0, 0, 0, 100)
    one_by_one = {
        "no-search": _policy((32, 1), searched, **_CPU),
        "no-overlap": _policy((32, 8), searched, **_CPU, schedule=Schedule.SERIAL),
        "no-cpu": _policy((32, 8), searched),
        "deepspeed": _policy((2, 1), (0, 0, 100, 0, 100, 0)),
    }
    for what, policy in one_by_one.items():
        yield _case(f"ablation-{what}", "opt-175b", policy, "one idea left out")
    rows: list[tuple[str, str, tuple[int, int], tuple[int, ...]]] = [
        ("30b", "opt-30b", (48, 3), (20, 80, 0, 100, 0, 100)),
        ("30b-weights-host", "opt-30b", (48, 3), (0, 100, 0, 100, 0, 100)),
        ("30b-one-batch", "opt-30b", (48, 1), (20, 80, 0, 100, 0, 100)),
        ("30b-one-row", "opt-30b", (1, 1), (20, 80, 100, 0, 100, 0)),
        ("175b", "opt-175b", (32, 8), searched),
        ("175b-weights-disk", "opt-175b", (32, 8), (0, 0, 0, 0, 0, 100)),
        ("175b-one-batch", "opt-175b", (32, 1), searched),
        ("175b-one-row", "opt-175b", (1, 1), (0, 50, 100, 0, 100, 0)),
    ]
    for what, model, shape, percent in rows:
        # FlexGen says so everywhere, but a cache on the device stays there.
        features = _CPU if percent[2] < 100 else {}
        policy = _policy(shape, percent, **features)
        yield _case(f"ablation_policy-{what}", model, policy, "one choice changed")
