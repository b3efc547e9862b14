"""What prompts of different lengths gain from plans of their own.

    python -m bench.lengths opt-1.3b --memory-cap 2GB --json FILE

Under the cap a process plans the job as `LLM(model)` would, and runs it; another one
runs it under one policy, which is planned for prompts that are all as long as the
longest. Both compile as they go.
"""

import argparse
import datetime
import json
import pathlib
import random
import sys
from typing import Any

import jax
import numpy as np

from bench.machine import describe_machine
from bench.memory_cap import ensure_can_cap, result_under_cap
from bench.synthetic import weights_folder
from checkpoints_tools.resolve import resolve_model
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import EMBEDDED_MODEL, WeightStore, open_store
from flexjax.cli import run_command
from flexjax.llm import LLM
from flexjax.plan.auto import choose_policies
from flexjax.plan.calibrate import calibrated
from flexjax.policy import Policy, Tier
from flexjax.prompts import FIRST_ORDINARY_ID
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sampling_params import SamplingParams
from flexjax.sizes import parse_bytes

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
        [longest] * len(prompts),
        GEN_LEN,
        device=jax.devices()[0],
        offload_dir=folder,
        held=dict.fromkeys(Tier, 0),
        progress=lambda text: print(text, file=sys.stderr),
    )
    return choice.policy


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    if args.memory_cap is None and args.json is not None:
        raise ValueError("--json is for what --memory-cap compares; give a cap")
    if args.memory_cap is not None and args.as_one:
        raise ValueError("--as-one is of one run; --memory-cap makes both")
    folder = default_cache()
    if args.memory_cap is None:  # the process that a cap holds for
        weights = resolve_model(weights_folder(args.model) or EMBEDDED_MODEL)
        print(json.dumps(run_here(open_store(weights), folder, as_one=args.as_one)))
        return
    cap_bytes = parse_bytes(args.memory_cap)
    ensure_can_cap(cap_bytes)
    if args.json is not None:
        ensure_writable("--json", args.json)
    resolve_model(weights_folder(args.model) or EMBEDDED_MODEL)  # made once for both
    calibrated(folder, jax.devices()[0], lambda text: print(text, file=sys.stderr))
    parts = result_under_cap("bench.lengths", [args.model], cap_bytes)
    one = result_under_cap("bench.lengths", [args.model, "--as-one"], cap_bytes)
    ratio = one["seconds"] / parts["seconds"]
    print(
        f"parts: {len(parts['parts']) or 1}; {parts['seconds']:.1f} s, predicted "
        f"{parts['predicted_s']:.1f} s; as one {one['seconds']:.1f} s: {ratio:.2f} "
        "times as long"
    )
    if args.json is not None:
        report = {
            "model": args.model,
            "lengths": [list(group) for group in GROUPS],
            "gen_len": GEN_LEN,
            "memory_cap_bytes": cap_bytes,
            "in_parts": parts,
            "as_one": one,
            "ratio": ratio,
            "machine": describe_machine(folder),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": f"python -m bench.lengths {args.model} "
            f"--memory-cap {args.memory_cap}",
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.lengths",
        description="Runs prompts of different lengths in parts, each with a plan of "
        "its own, and under one plan for the longest.",
    )
    parser.add_argument("model", help="a published model, such as opt-1.3b")
    parser.add_argument(
        "--memory-cap",
        metavar="SIZE",
        help="memory of the machine; without, one run is made here, as it is",
    )
    parser.add_argument(
        "--as-one", action="store_true", help="of one run: under one plan"
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
