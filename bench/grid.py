"""How good the planned policy is: beside every policy of a grid that fits.

    python -m bench.grid opt-1.3b --memory-cap 2GB 3GB 4GB --json FILE

Under each cap a process of its own plans the job as `LLM(model)` would, and runs the
plan and the grid. Each policy runs once, which also compiles for it; what came near the
best then, and the plan, run again, and the quicker run counts.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from bench.machine import describe_machine
from bench.memory_cap import ensure_can_cap, result_under_cap
from bench.synthetic import weights_folder
from checkpoints_tools.resolve import resolve_model
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import EMBEDDED_MODEL, WeightStore, open_store
from flexjax.cli import run_command
from flexjax.llm import LLM
from flexjax.memory.capacity import free_bytes, give_back_freed
from flexjax.memory.link import processor_of
from flexjax.plan.auto import Asked, choose_policies
from flexjax.plan.calibrate import calibrated
from flexjax.plan.closed_form import Model
from flexjax.plan.job import Job
from flexjax.plan.search import fits, memory_budgets
from flexjax.policy import Placement, Policy, Tier, to_json
from flexjax.prompts import random_prompts
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sampling_params import SamplingParams
from flexjax.sizes import parse_bytes

JOB = Job(prompt_len=32, gen_len=6, num_prompts=24)
SHAPES = ((8, 3), (12, 2), (24, 1), (12, 1))  # rows, batches
WEIGHTS_ON_DEVICE = (0.0, 0.1, 0.25, 0.35, 0.5, 1.0)
CACHE_ON_DEVICE = (0.0, 0.5, 1.0)
NEAR = 1.25  # times as long as the best: such a policy gets another run


def grid() -> Iterator[Policy]:
    """Policies whose tensors are on the device or on disk, in blocks of several shapes.

    Where the device is the host's processor, the host is no third place.
    """
    for (rows, batches), weights, cache in itertools.product(
        SHAPES, WEIGHTS_ON_DEVICE, CACHE_ON_DEVICE
    ):
        yield Policy(
            weights=Placement(device=weights),
            kv_cache=Placement(device=cache),
            batch_size=rows,
            num_batches=batches,
        )


def run_here(store: WeightStore, folder: pathlib.Path) -> dict[str, Any]:
    """Runs the plan and the grid in the memory that there is, as JSON values."""
    device = jax.devices()[0]
    free = free_bytes(device, folder)
    processor = processor_of(device, is_quantized=store.quantization is not None)
    budgets = memory_budgets(free, device_is_host=processor.is_host)
    model = Model(config=store.config, dtype=store.dtype, tensors=store.tensors)
    (chosen,) = choose_policies(
        store,
        Asked([JOB.prompt_len] * JOB.num_prompts, JOB.gen_len),
        device=device,
        offload_dir=folder,
        held=dict.fromkeys(Tier, 0),
        progress=lambda text: print(text, file=sys.stderr),
    )
    policies = [p for p in grid() if fits(model, p, budgets, JOB, processor)]
    seconds: dict[Policy, float] = {}
    for policy in (chosen.policy, *policies):
        seconds[policy] = _run(store, policy, folder)
    best_s = min(seconds.values())
    for policy, spent_s in seconds.items():
        if policy == chosen.policy or spent_s <= NEAR * best_s:
            seconds[policy] = min(spent_s, _run(store, policy, folder))
    planned_s = seconds.pop(chosen.policy)
    runs = [
        {"policy": to_json(policy), "seconds": spent_s}
        for policy, spent_s in seconds.items()
        if math.isfinite(spent_s)
    ]
    planned = {"policy": to_json(chosen.policy), "seconds": planned_s}
    return {"chosen": planned, "reason": chosen.reason, "grid": runs}


def _run(store: WeightStore, policy: Policy, folder: pathlib.Path) -> float:
    """Seconds of the job under a policy, once all is loaded.

    Infinity if it is refused: a process keeps some of what earlier runs freed.
    """
    give_back_freed()
    vocab_size = store.config.vocab_size
    prompts = random_prompts(vocab_size, JOB.num_prompts, JOB.prompt_len)
    params = SamplingParams(max_tokens=JOB.gen_len, temperature=0.0, ignore_eos=True)
    try:
        with LLM(store.folder, policy=policy, offload_dir=folder) as llm:
            llm.generate(prompts, params)
            spent_s = llm.metrics["seconds"]
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
        return math.inf
    print(f"{spent_s:7.2f} s {_in_short(to_json(policy))}", file=sys.stderr)
    return spent_s


def with_ratio(result: dict[str, Any]) -> dict[str, Any]:
    """A result with the grid's best, and how much longer the plan took."""
    best = min(result["grid"], key=lambda run: run["seconds"])
    ratio = result["chosen"]["seconds"] / best["seconds"]
    return result | {"best": best, "chosen_over_best": ratio}


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    caps = [parse_bytes(text) for text in args.memory_cap]
    for cap_bytes in caps:
        ensure_can_cap(cap_bytes)
    if args.json is not None:
        if not caps:
            raise ValueError(
                "--json keeps what the machines of --memory-cap took; give a cap, or "
                "leave --json out"
            )
        ensure_writable("--json", args.json)
    folder = default_cache()
    weights = resolve_model(weights_folder(args.model) or EMBEDDED_MODEL)
    if not caps:  # the process that a cap holds for
        print(json.dumps(run_here(open_store(weights), folder)))
        return
    calibrated(folder, jax.devices()[0], lambda text: print(text, file=sys.stderr))
    results = []
    for text, cap_bytes in zip(args.memory_cap, caps, strict=True):
        found = result_under_cap("bench.grid", [args.model], cap_bytes)
        result = with_ratio(found)
        results.append({"memory_cap_bytes": cap_bytes, **result})
        print(_line(text, result), flush=True)
        if args.json is not None:  # after each: the next one may fail
            _write(args, results)


def _write(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    report = {
        "model": args.model,
        "job": dataclasses.asdict(JOB),
        "machines": results,
        "machine": describe_machine(default_cache()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python -m bench.grid {args.model} --memory-cap "
        + " ".join(args.memory_cap),
    }
    write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def _line(cap: str, result: dict[str, Any]) -> str:
    chosen, best = result["chosen"], result["best"]
    return (
        f"{cap}: planned {chosen['seconds']:.2f} s ({_in_short(chosen['policy'])}), "
        f"best of {len(result['grid'])} {best['seconds']:.2f} s "
        f"({_in_short(best['policy'])}): {result['chosen_over_best'] - 1:+.1%}"
    )


def _in_short(policy: dict[str, Any]) -> str:
    """A policy as JSON in a few words."""
    weights, cache = (policy[kind]["device"] for kind in ("weights", "kv_cache"))
    return (
        f"{policy['num_batches']} x {policy['batch_size']}, weights {weights:.0%}, "
        f"cache {cache:.0%} on the device"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.grid",
        description="Runs the planned policy and a grid of others, and says how near "
        "the plan comes to the best of them.",
    )
    parser.add_argument("model", help="a published model, such as opt-1.3b")
    parser.add_argument(
        "--memory-cap",
        nargs="+",
        default=[],
        metavar="SIZE",
        help="memory of one machine each; without, the grid runs here, as it is",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
