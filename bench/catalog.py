"""The cases that have a name: what is streamed from disk here, and FlexGen's suite."""

import dataclasses
import difflib
from collections.abc import Iterator

from bench.cases import Case
from bench.flexgen_cases import flexgen_cases
from flexjax.policy import Placement, Policy


def find_case(name: str) -> Case:
    """The case of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    cases = {case.name: case for case in all_cases()}
    if name not in cases:
        near = difflib.get_close_matches(name, cases, n=3, cutoff=0.5)
        guess = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"unknown case {name!r}{guess} `python -m bench.run --list` lists all"
        )
    return cases[name]


def all_cases() -> list[Case]:
    """Our own cases, then FlexGen's."""
    return [*_own_cases(), *flexgen_cases()]


_DISK = Placement()
_HOST = Placement(host=1.0)


def _own_cases() -> Iterator[Case]:
    yield Case(
        name="smoke",
        model=None,
        policy=Policy(weights=_DISK, kv_cache=_DISK, batch_size=2, num_batches=2),
        prompt_len=8,
        gen_len=4,
        note="the embedded model, in seconds: does everything work?",
    )
    streamed = Policy(weights=_DISK, batch_size=64)
    yield _streamed("opt-1.3b", "disk", streamed, "all weights on disk: disk-bound")
    yield _streamed("opt-6.7b", "disk", streamed, "all weights on disk: disk-bound")
    yield _streamed(
        "opt-13b",
        "disk",
        dataclasses.replace(streamed, batch_size=32),
        "26 GB of weights, all on disk",
        gen_len=16,
    )
    yield _streamed(
        "opt-1.3b",
        "crossover",
        dataclasses.replace(streamed, batch_size=48, num_batches=2),
        "about as much time to read a layer as to compute it",
    )
    yield _streamed(
        "opt-1.3b",
        "long",
        streamed,
        "200 tokens: does a step stay as fast?",
        gen_len=200,
    )
    halves = dataclasses.replace(streamed, batch_size=32, num_batches=2)
    for model in ("opt-1.3b", "opt-6.7b"):
        policy = dataclasses.replace(halves, kv_cache=_DISK)
        yield _streamed(model, "kv-disk", policy, "weights and KV cache on disk")
    yield from _quantized_cases(streamed, halves)
    yield _streamed(
        "opt-1.3b",
        "kv-host",
        dataclasses.replace(halves, kv_cache=_HOST),
        "weights on disk, KV cache on the host",
    )


def _quantized_cases(streamed: Policy, halves: Policy) -> Iterator[Case]:
    four_bits = dataclasses.replace(streamed, weight_bits=4)
    both = dataclasses.replace(halves, kv_cache=_DISK, weight_bits=4, kv_cache_bits=4)
    for model in ("opt-1.3b", "opt-6.7b"):
        note = "4-bit weights on disk"
        yield _streamed(model, "4bit-disk", four_bits, note)
        policy = dataclasses.replace(four_bits, activation_bits=8)
        note = "4-bit weights on disk, what they multiply rounded to 8 bits"
        yield _streamed(model, "4bit-rounded-disk", policy, note)
        note = "4-bit weights and KV cache on disk"
        yield _streamed(model, "4bit-kv-disk", both, note)


def _streamed(
    model: str, what: str, policy: Policy, note: str, *, gen_len: int = 32
) -> Case:
    return Case(
        name=f"{model}-{what}",
        model=model,
        policy=policy,
        prompt_len=128,
        gen_len=gen_len,
        cold=True,
        note=note,
    )
