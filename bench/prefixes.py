"""What prompts gain that begin alike, as those of few-shot evaluations do.

    python -m bench.prefixes opt-1.3b --memory-cap 6GB --json FILE

Under the cap a process plans the job as `LLM(model)` would, and runs it; another one
does the same with prompts of the same lengths whose first token is not the same, so
that they have nothing in common.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.two_ways import TwoWays, measure_machine
from flexjax.checkpoint import WeightStore
from flexjax.cli import run_command
from flexjax.llm import LLM
from flexjax.prompts import FIRST_ORDINARY_ID
from flexjax.sampling_params import SamplingParams

NUM_PROMPTS = 32
NUM_COMMON = 1200  # tokens: five examples of a question and its answer
OWN = (40, 100)  # tokens of a prompt beyond these, from so many to so many
GEN_LEN = 8


def make_prompts(vocab_size: int, *, different: bool) -> list[list[int]]:
    """Random prompts that begin alike, the same in every run.

    With `different` they do from the second token on.
    """
    numbers = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return numbers.integers(FIRST_ORDINARY_ID, vocab_size, count).tolist()

    common, (least, most) = draw(NUM_COMMON), OWN
    prompts = [common + draw(n) for n in numbers.integers(least, most + 1, NUM_PROMPTS)]
    return told_apart(prompts) if different else prompts


def told_apart(prompts: list[list[int]]) -> list[list[int]]:
    """The same, but that each begins with a token of its own."""
    return [
        [FIRST_ORDINARY_ID + number, *prompt[1:]]
        for number, prompt in enumerate(prompts)
    ]


def run_here(
    store: WeightStore, folder: pathlib.Path, *, different: bool
) -> dict[str, Any]:
    """Runs the prompts in the memory that there is, as JSON values."""
    prompts = make_prompts(store.config.vocab_size, different=different)
    return run_prompts(store, folder, prompts, GEN_LEN)


def run_prompts(
    store: WeightStore, folder: pathlib.Path, prompts: list[list[int]], gen_len: int
) -> dict[str, Any]:
    """Runs any prompts as `LLM(model)` would, as JSON values."""
    params = SamplingParams(max_tokens=gen_len, temperature=0.0, ignore_eos=True)
    return run_job(store, folder, lambda llm: llm.generate(prompts, params))


def run_job(
    store: WeightStore, folder: pathlib.Path, run: Callable[[LLM], object]
) -> dict[str, Any]:
    """What a call of `LLM(model)` took, as JSON values."""
    with LLM(store.folder, offload_dir=folder) as llm:
        run(llm)
        metrics, plan = llm.metrics, llm.plan
    assert plan is not None
    predicted = metrics.get("predicted", {})  # nothing, where all is on the device
    return {
        "seconds": metrics["seconds"],
        "prefill_s": metrics["prefill"]["seconds"],
        "decode_s": metrics["decode"]["seconds"],
        "predicted_prefill_s": predicted.get("prefill_s"),
        "predicted_decode_s": predicted.get("decode_s"),
        "num_shared_tokens": metrics["num_shared_tokens"],
        "peak_rss_bytes": metrics["peak_rss_bytes"],
        "policy": plan.reason,
    }


def in_words(alike: Mapping[str, Any], different: Mapping[str, Any]) -> str:
    """Both runs in a line."""
    return (
        f"{alike['num_shared_tokens']:,} tokens of prompts shared: "
        f"{alike['seconds']:.1f} s; with nothing in common {different['seconds']:.1f} s"
    )


WAYS = TwoWays(
    module="bench.prefixes",
    names=("alike", "different"),
    switch_help="prompts of the same lengths that have nothing in common",
    run=lambda store, folder, different: run_here(store, folder, different=different),
    settings=lambda: {
        "num_prompts": NUM_PROMPTS,
        "num_common": NUM_COMMON,
        "own_tokens": OWN,
        "gen_len": GEN_LEN,
    },
    in_words=in_words,
    prepare=measure_machine,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return WAYS.parser(
        "Continues prompts that begin alike, and prompts of the same lengths that have "
        "nothing in common."
    )


if __name__ == "__main__":
    sys.exit(run_command(WAYS.main, build_parser()))
