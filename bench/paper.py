"""The cost model on FlexGen's machine: its published throughputs, and where it loses.

    python -m bench.paper

Policies are those of the paper's tables 15 and 16 (arXiv 2303.06865), prompts of 512
tokens and 32 new ones on one T4; published are the tokens/s of its table 2.
"""

import argparse
import sys
from typing import NamedTuple

from flexjax.cli import run_command
from flexjax.plan.hardware import read_hardware
from flexjax.plan.planner import find_model
from flexjax.plan.predict import Job, predict
from flexjax.policy import Placement, Policy

MACHINE = "t4-208gb"
PROMPT_LEN, GEN_LEN = 512, 32


class Published(NamedTuple):
    """A policy of the paper's, and what it gave."""

    model: str
    policy: Policy
    tokens_per_s: float


ON_HOST = Placement(host=1.0)
PAPER = (
    Published("opt-6.7b", Policy(batch_size=2), 25.26),
    Published(
        "opt-30b",
        Policy(
            weights=Placement(device=0.2, host=0.8),
            kv_cache=ON_HOST,
            activations=ON_HOST,
            batch_size=48,
            num_batches=3,
            host_attention=True,
        ),
        7.32,
    ),
    Published(
        "opt-175b",
        Policy(
            weights=Placement(host=0.5),
            kv_cache=Placement(),
            activations=ON_HOST,
            batch_size=32,
            num_batches=8,
            host_attention=True,
        ),
        0.69,
    ),
)


def predicted_tokens_per_s(published: Published) -> tuple[float, str]:
    """What the cost model says of a policy, and which resource bounds it."""
    policy, hardware = published.policy, read_hardware(MACHINE)
    model = find_model(published.model, platform="gpu").model(policy)
    job = Job(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=policy.block_size)
    prediction = predict(model, policy, hardware, job)
    return prediction.tokens_per_s, prediction.bottleneck.value


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    del args
    for published in PAPER:
        found, bottleneck = predicted_tokens_per_s(published)
        policy, given = published.policy, published.tokens_per_s
        print(
            f"{published.model:9} {policy.num_batches} x {policy.batch_size:2}: "
            f"published {given:5.2f} tokens/s, predicted {found:5.2f} "
            f"({found / given - 1:+.0%}), bounded by {bottleneck}"
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return argparse.ArgumentParser(
        prog="python -m bench.paper",
        description="Compares the cost model with the FlexGen paper's throughputs.",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
