"""The cost model on FlexGen's machine: its published throughputs, and where it loses.

    python -m bench.paper

Policies are those of the paper's tables 15 and 16 (arXiv 2303.06865), prompts of 512
tokens and 32 new ones on one T4; published are the tokens/s of its table 2.
"""

import argparse
import dataclasses
import sys
from typing import NamedTuple

from flexjax.cli import run_command
from flexjax.plan.hardware import Hardware, read_hardware
from flexjax.plan.planner import allowed_policies, find_model, make_plan
from flexjax.plan.predict import Job, Prediction, predict, predict_peak
from flexjax.plan.report import policy_in_words
from flexjax.plan.search import Plan, free_for
from flexjax.policy import Placement, Policy, Tier
from flexjax.schedule.footprint import by_tier

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


def searched(published: Published, *, as_much: bool = False) -> Plan:
    """The best plan for prompts of the same length on the same machine.

    A plan leaves a reserve of each memory, which the paper's policies fill. With
    `as_much` memories are so large that the published policy is one of those to choose.
    """
    found, hardware = (
        find_model(published.model, platform="gpu"),
        read_hardware(MACHINE),
    )
    if as_much:
        hardware = _with_room_for(published, hardware)
    job = Job(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=NUM_PROMPTS)
    allowed = allowed_policies(quantized=False, host_attention=True)
    return make_plan(found, hardware, job, allowed)[0]


def _with_room_for(published: Published, hardware: Hardware) -> Hardware:
    policy = published.policy
    model = find_model(published.model, platform="gpu").model(policy)
    job = Job(prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_prompts=policy.block_size)
    peak = predict_peak(model, policy, job, hardware.processor, layers_ahead=1)
    free = free_for(by_tier(peak))
    return dataclasses.replace(
        hardware,
        device_memory_bytes=max(hardware.device_memory_bytes, free[Tier.DEVICE]),
        host_memory_bytes=max(hardware.host_memory_bytes, free[Tier.HOST]),
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    del args
    for published in PAPER:
        prediction = predicted(published)
        found, given = prediction.tokens_per_s, published.tokens_per_s
        waiting = predicted(published, barrier=True).tokens_per_s
        plan, policy = searched(published), published.policy
        rival = searched(published, as_much=True).prediction.tokens_per_s
        print(
            f"{published.model:9} {policy.num_batches} x {policy.batch_size:2}: "
            f"published {given:5.2f} tokens/s, predicted {found:5.2f} "
            f"({found / given - 1:+.0%}), bounded by {prediction.bottleneck.value}; "
            f"{waiting:5.2f} ({waiting / given - 1:+.0%}) with a barrier at each call; "
            f"searched {plan.prediction.tokens_per_s:5.2f} "
            f"({policy_in_words(plan)}), and {rival:5.2f} with as much memory as the "
            "published policy takes",
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
