"""What an evaluation of many subjects gains, each of which has examples of its own.

    python -m bench.subjects opt-1.3b --memory-cap 6GB --json FILE

As `bench.prefixes`, but that prompts begin as those of their subject do, and come in
turns, so that neighbours have nothing in common.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from bench.prefixes import in_words, run_prompts, told_apart
from bench.two_ways import TwoWays, measure_machine
from flexjax.checkpoint import WeightStore
from flexjax.cli import run_command
from flexjax.prompts import FIRST_ORDINARY_ID

NUM_SUBJECTS = 6
PROMPTS_EACH = 12
EXAMPLES = (400, 600)  # tokens with which a subject's prompts begin, from ... to ...
OWN = (40, 100)  # tokens of a prompt beyond these
GEN_LEN = 8


def make_prompts(vocab_size: int, *, different: bool) -> list[list[int]]:
    """Random prompts of the subjects in turn, the same in every run.

    With `different` no two of them begin with the same token.
    """
    numbers = np.random.default_rng(0)

    def draw(span: tuple[int, int]) -> list[int]:
        count = int(numbers.integers(span[0], span[1] + 1))
        return numbers.integers(FIRST_ORDINARY_ID, vocab_size, count).tolist()

    begins = [draw(EXAMPLES) for _ in range(NUM_SUBJECTS)]
    prompts = [begin + draw(OWN) for _ in range(PROMPTS_EACH) for begin in begins]
    return told_apart(prompts) if different else prompts


def run_here(
    store: WeightStore, folder: pathlib.Path, *, different: bool
) -> dict[str, Any]:
    """Runs the prompts in the memory that there is, as JSON values."""
    prompts = make_prompts(store.config.vocab_size, different=different)
    return run_prompts(store, folder, prompts, GEN_LEN)


WAYS = TwoWays(
    module="bench.subjects",
    names=("alike", "different"),
    switch_help="prompts of the same lengths that have nothing in common",
    run=lambda store, folder, different: run_here(store, folder, different=different),
    settings=lambda: {
        "num_subjects": NUM_SUBJECTS,
        "num_prompts": NUM_SUBJECTS * PROMPTS_EACH,
        "example_tokens": EXAMPLES,
        "own_tokens": OWN,
        "gen_len": GEN_LEN,
    },
    in_words=in_words,
    prepare=measure_machine,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return WAYS.parser(
        "Continues prompts of several subjects, each of which begins them its own way, "
        "and prompts of the same lengths that have nothing in common."
    )


if __name__ == "__main__":
    sys.exit(run_command(WAYS.main, build_parser()))
