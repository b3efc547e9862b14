"""What rows that end by themselves gain where those that live long are preempted.

    python -m bench.endings opt-1.3b --memory-cap 6GB --json FILE

Under the cap a process continues all prompts in one call; another one continues each
block in a call of its own, so that every block runs until its last row has ended.
Tokens are drawn, and a random share of the vocabulary ends a row.
"""

import argparse
import pathlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.two_ways import TwoWays
from flexjax.checkpoint import WeightStore
from flexjax.cli import run_command
from flexjax.llm import LLM
from flexjax.outputs import RequestOutput
from flexjax.policy import Placement, Policy
from flexjax.prompts import FIRST_ORDINARY_ID
from flexjax.sampling_params import SamplingParams

NUM_PROMPTS = 192
PROMPT_LEN = 32
MAX_TOKENS = 200
STOP_SHARE = 0.03  # of the vocabulary: a row has 33 tokens on average
POLICY = Policy(weights=Placement(), batch_size=64)  # weights on disk


def make_job(vocab_size: int) -> tuple[list[list[int]], SamplingParams]:
    """Random prompts, and what ends them; the same in every run."""
    numbers = np.random.default_rng(0)
    shape = (NUM_PROMPTS, PROMPT_LEN)
    prompts = numbers.integers(FIRST_ORDINARY_ID, vocab_size, shape).tolist()
    ids = range(FIRST_ORDINARY_ID, vocab_size)
    stops = random.Random(0).sample(ids, round(len(ids) * STOP_SHARE))
    params = SamplingParams(
        max_tokens=MAX_TOKENS, ignore_eos=True, stop_token_ids=tuple(stops)
    )
    return prompts, params


def run_here(
    store: WeightStore, folder: pathlib.Path, *, apart: bool
) -> dict[str, Any]:
    """Runs the prompts in the memory that there is, as JSON values."""
    prompts, params = make_job(store.config.vocab_size)
    size = POLICY.block_size if apart else NUM_PROMPTS
    outputs: dict[int, RequestOutput] = {}
    runs: list[dict[str, Any]] = []
    with LLM(store.folder, policy=POLICY, offload_dir=folder) as llm:
        for first in range(0, NUM_PROMPTS, size):
            indices = range(first, min(NUM_PROMPTS, first + size))
            llm.generate_each(
                prompts, params, indices=indices, on_outputs=outputs.update
            )
            runs.append(llm.metrics)
    lengths = [len(output.outputs[0].token_ids) for output in outputs.values()]
    seconds = sum(run["seconds"] for run in runs)
    num_tokens = sum(run["num_tokens"] for run in runs)
    return {
        "seconds": seconds,
        "prefill_s": sum(run["prefill"]["seconds"] for run in runs),
        "decode_s": sum(run["decode"]["seconds"] for run in runs),
        "num_steps": sum(len(run["step_s"]) for run in runs),
        "num_preemptions": sum(run["num_preemptions"] for run in runs),
        "num_tokens": num_tokens,
        "most_tokens": max(lengths),
        "tokens_per_s": num_tokens / seconds,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def _in_words(together: Mapping[str, Any], apart: Mapping[str, Any]) -> str:
    return (
        f"{together['num_tokens']} tokens in {together['seconds']:.1f} s, "
        f"{together['num_preemptions']} preemptions; each block to its end "
        f"{apart['seconds']:.1f} s"
    )


WAYS = TwoWays(
    module="bench.endings",
    names=("together", "apart"),
    switch_help="every block until its last row has ended",
    run=lambda store, folder, apart: run_here(store, folder, apart=apart),
    settings=lambda: {
        "num_prompts": NUM_PROMPTS,
        "prompt_len": PROMPT_LEN,
        "max_tokens": MAX_TOKENS,
        "stop_share": STOP_SHARE,
        "batch_size": POLICY.batch_size,
    },
    in_words=_in_words,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return WAYS.parser(
        "Continues prompts whose rows end by themselves, with those that live long "
        "preempted, and with every block run until its last row has ended."
    )


if __name__ == "__main__":
    sys.exit(run_command(WAYS.main, build_parser()))
