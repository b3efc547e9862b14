"""What prompts of different lengths gain from plans of their own.

    python -m bench.lengths opt-1.3b --memory-cap 2GB --json FILE

Under the cap a process plans the job as `LLM(model)` would, and runs it; another one
runs it under one policy, which is planned for prompts that are all as long as the
longest.
"""

import argparse
import pathlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bench.two_ways import TwoWays, measure_machine
from flexjax.checkpoint import WeightStore
from flexjax.cli import run_command
from flexjax.llm import LLM
from flexjax.plan.auto import Asked, choose_policies
from flexjax.policy import Policy, Tier
from flexjax.prompts import FIRST_ORDINARY_ID
from flexjax.sampling_params import SamplingParams

GROUPS = ((2, 700, 800), (100, 20, 60))  # prompts, of so many tokens to so many
GEN_LEN = 16


def make_prompts(vocab_size: int) -> list[list[int]]:
    """Random prompts of all groups, in a random order; the same in every run."""
    numbers = np.random.default_rng(0)
    prompts = [
        numbers.integers(FIRST_ORDINARY_ID, vocab_size, length).tolist()
        for count, least, most in GROUPS
        for length in numbers.integers(least, most + 1, count)
    ]
    random.Random(0).shuffle(prompts)
    return prompts


def run_here(
    store: WeightStore, folder: pathlib.Path, *, as_one: bool
) -> dict[str, Any]:
    """Runs the prompts in the memory that there is, as JSON values."""
    prompts = make_prompts(store.config.vocab_size)
    policy = _planned_as_one(store, prompts, folder) if as_one else None
    params = SamplingParams(max_tokens=GEN_LEN, temperature=0.0, ignore_eos=True)
    with LLM(store.folder, policy=policy, offload_dir=folder) as llm:
        llm.generate(prompts, params)
        metrics = llm.metrics
    return {
        "seconds": metrics["seconds"],
        "prefill_s": metrics["prefill"]["seconds"],
        "decode_s": metrics["decode"]["seconds"],
        "predicted_s": metrics["predicted"]["total_s"] if policy is None else None,
        "peak_rss_bytes": metrics["peak_rss_bytes"],
        "parts": [part["num_prompts"] for part in metrics.get("parts", ())],
    }


def _planned_as_one(
    store: WeightStore, prompts: list[list[int]], folder: pathlib.Path
) -> Policy:
    longest = max(map(len, prompts))
    (choice,) = choose_policies(
        store,
        Asked([longest] * len(prompts), GEN_LEN),
        device=jax.devices()[0],
        offload_dir=folder,
        held=dict.fromkeys(Tier, 0),
        progress=lambda text: print(text, file=sys.stderr),
    )
    return choice.policy


def _in_words(parts: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    return (
        f"parts: {len(parts['parts']) or 1}; {parts['seconds']:.1f} s, predicted "
        f"{parts['predicted_s']:.1f} s; as one {one['seconds']:.1f} s"
    )


WAYS = TwoWays(
    module="bench.lengths",
    names=("in_parts", "as_one"),
    switch_help="under one plan",
    run=lambda store, folder, as_one: run_here(store, folder, as_one=as_one),
    settings=lambda: {"lengths": [list(group) for group in GROUPS], "gen_len": GEN_LEN},
    in_words=_in_words,
    prepare=measure_machine,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return WAYS.parser(
        "Runs prompts of different lengths in parts, each with a plan of its own, and "
        "under one plan for the longest."
    )


if __name__ == "__main__":
    sys.exit(run_command(WAYS.main, build_parser()))
