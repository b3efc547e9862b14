"""What a task of multiple choice gains, the choices of whose questions begin alike.

    python -m bench.choices opt-1.3b --memory-cap 6GB --json FILE

Scores as many sequences of the same lengths with the same tokens too, but for the first
of each, so that nothing is shared; both without a policy, as `LLM(model)` runs.
"""

import argparse
import pathlib
import sys
from typing import Any

import numpy as np

from bench.prefixes import in_words, run_job, told_apart
from bench.two_ways import TwoWays, measure_machine
from flexjax.checkpoint import WeightStore
from flexjax.cli import run_command
from flexjax.prompts import FIRST_ORDINARY_ID

NUM_QUESTIONS = 12
CHOICES_EACH = 4
CONTEXT = (60, 180)  # tokens of a question, from ... to ...
OWN = (4, 30)  # tokens of a choice


def make_sequences(vocab_size: int, *, different: bool) -> list[list[int]]:
    """Random questions with each of their choices, the same in every run.

    With `different` no two of them begin with the same token.
    """
    numbers = np.random.default_rng(0)

    def draw(span: tuple[int, int]) -> list[int]:
        count = int(numbers.integers(span[0], span[1] + 1))
        return numbers.integers(FIRST_ORDINARY_ID, vocab_size, count).tolist()

    contexts = [draw(CONTEXT) for _ in range(NUM_QUESTIONS)]
    found = [context + draw(OWN) for context in contexts for _ in range(CHOICES_EACH)]
    return told_apart(found) if different else found


def run_here(
    store: WeightStore, folder: pathlib.Path, *, different: bool
) -> dict[str, Any]:
    """Scores the sequences in the memory that there is, as JSON values."""
    sequences = make_sequences(store.config.vocab_size, different=different)
    return run_job(store, folder, lambda llm: llm.score(sequences))


WAYS = TwoWays(
    module="bench.choices",
    names=("alike", "different"),
    switch_help="sequences of the same lengths that have nothing in common",
    run=lambda store, folder, different: run_here(store, folder, different=different),
    settings=lambda: {
        "num_questions": NUM_QUESTIONS,
        "choices_each": CHOICES_EACH,
        "context_tokens": CONTEXT,
        "own_tokens": OWN,
    },
    in_words=in_words,
    prepare=measure_machine,
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return WAYS.parser(
        "Scores the choices of questions, and sequences of the same lengths that have "
        "nothing in common."
    )


if __name__ == "__main__":
    sys.exit(run_command(WAYS.main, build_parser()))
