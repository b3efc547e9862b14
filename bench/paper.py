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
from flexjax.plan.job import Job
from flexjax.plan.planner import allowed_policies, find_model, make_plan
from flexjax.plan.predict import Prediction, predict
from flexjax.plan.report import policy_in_words
from flexjax.plan.search import Plan
from flexjax.policy import Placement, Policy

MACHINE = "t4-208gb"
PROMPT_LEN, GEN_LEN = 512, 32
NUM_PROMPTS = 1024  # for which a plan is searched: some of the paper's blocks


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


def predicted(published: Published, *, barrier: bool = False) -> Prediction:
    """What the cost model says of a policy, with one layer ahead as FlexGen has.

    FlexGen waits for everything before each compute call: that is the `barrier`.
    """
    policy, hardware = published.policy, read_hardware(MACHINE)
    model = find_model(published.model, platform="gpu").model(policy)
    job = Job(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=policy.block_size)
    return predict(model, policy, hardware, job, layers_ahead=1, barrier=barrier)


def searched(published: Published) -> Plan:
    """The best plan for prompts of the same length on the same machine."""
    found = find_model(published.model, platform="gpu")
    job = Job(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=NUM_PROMPTS)
    allowed = allowed_policies(quantized=False, host_attention=True)
    return make_plan(found, read_hardware(MACHINE), job, allowed)[0]


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    del args
    for published in PAPER:
        prediction = predicted(published)
        found, given = prediction.tokens_per_s, published.tokens_per_s
        waiting = predicted(published, barrier=True).tokens_per_s
        plan, policy = searched(published), published.policy
        print(
            f"{published.model:9} {policy.num_batches} x {policy.batch_size:2}: "
            f"published {given:5.2f} tokens/s, predicted {found:5.2f} "
            f"({found / given - 1:+.0%}), bounded by {prediction.bottleneck.value}; "
            f"{waiting:5.2f} ({waiting / given - 1:+.0%}) with a barrier at each call; "
            f"searched {plan.prediction.tokens_per_s:5.2f} "
            f"({policy_in_words(plan)})",
            flush=True,
        )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    return argparse.ArgumentParser(
        prog="python -m bench.paper",
        description="Compares the cost model with the FlexGen paper's throughputs.",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
