"""Throughput against latency: the plans of which none is better in both.

    python -m bench.frontier facebook/opt-175b --hardware t4-208gb --json FILE

A larger block of prompts uses each load of a layer's weights for more of them, and
takes longer. `python -m bench.report` makes a plot of it.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from flexjax.cli import run_command
from flexjax.plan.hardware import example_names, read_hardware
from flexjax.plan.job import Job
from flexjax.plan.planner import check_job, find_model
from flexjax.plan.report import format_seconds, policy_in_words
from flexjax.plan.search import Plan, frontier
from flexjax.policy import to_json
from flexjax.safe_files import ensure_writable, write_atomically


def point(plan: Plan) -> dict[str, Any]:
    """One plan of a frontier, as JSON values."""
    return {
        "block_s": plan.prediction.block_s,
        "tokens_per_s": plan.prediction.tokens_per_s,
        "num_prompts": plan.job.num_prompts,
        "bottleneck": plan.prediction.bottleneck.value,
        "policy": to_json(plan.policy),
    }


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    if args.json is not None:
        ensure_writable("--json", args.json)
    hardware = read_hardware(args.hardware)
    platform = "cpu" if hardware.device_is_host else "gpu"
    found = find_model(args.model, platform=platform)
    job = Job(
        prompt_len=args.prompt_len, gen_len=args.gen_len, num_prompts=args.num_prompts
    )
    check_job(job, found.config)
    model = found.model(found.template)
    plans = frontier(model, hardware, job, found.template)
    points = [point(plan) for plan in plans]
    for plan, at in zip(plans, points, strict=True):
        print(
            f"{format_seconds(at['block_s']):>9} a block: {at['tokens_per_s']:8.3g} "
            f"tokens/s, {policy_in_words(plan)}"
        )
    if args.json is not None:
        report = {
            "model": args.model.rpartition("/")[2],
            "hardware": pathlib.Path(args.hardware).stem,
            "job": dataclasses.asdict(job),
            "frontier": points,
            "command": f"python -m bench.frontier {args.model} --prompt-len "
            f"{job.prompt_len} --gen-len {job.gen_len} --num-prompts "
            f"{job.num_prompts} --hardware {args.hardware}",
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.frontier",
        description="Lists the plans of which none gives more tokens per second in "
        "less time a block.",
    )
    parser.add_argument("model", help="a published model, or a folder")
    parser.add_argument("--prompt-len", type=int, default=512, metavar="N")
    parser.add_argument("--gen-len", type=int, default=32, metavar="N")
    parser.add_argument(
        "--num-prompts", type=int, default=1000, metavar="N", help="most of a block"
    )
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="NAME",
        help="a machine's file, or one of " + ", ".join(example_names()),
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
