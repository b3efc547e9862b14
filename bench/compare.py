"""The same job on flexjax and on other offloading systems, each at its best.

    python -m bench.compare opt-1.3b --memory-cap 2GB --prompt-len 128 --gen-len 32

Every run is a process of its own under the same cap, one after the other.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Collection, Sequence
from typing import Any

from bench.command import typed
from bench.machine import describe_machine
from bench.memory_cap import ensure_can_cap, run_capped
from bench.peers.accelerate_system import BATCH_SIZES, LAYERS, PYTHON, Accelerate
from bench.peers.flexjax_system import Flexjax, parse_setting
from bench.peers.report import describe, ratio, result_to_json, table
from bench.peers.sweep import Result, find_best
from bench.peers.system import Attempt, Failed, Job, Measured, Setting, System
from bench.peers.weights import kv_cache_bytes, make_weights, weights_bytes
from flexjax.cache_folder import default_cache
from flexjax.cli import run_command
from flexjax.models.config import named_config
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sizes import parse_bytes

MIN_SWEEP_LEN = 3  # the first token is prefill's, and the step after it does not count
ABSENT = ("flexllmgen", "deepspeed")  # peers for GPUs that nobody has tried here yet
SYSTEMS = ("flexjax", "accelerate")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description="Runs the same job on flexjax and on its peers, each at its best "
        "setting, and prints tokens/s of each and the ratio.",
    )
    parser.add_argument("model", help="a published model, such as opt-1.3b")
    parser.add_argument(
        "--memory-cap", metavar="SIZE", help="memory of every run, such as 2GB"
    )
    parser.add_argument("--prompt-len", type=int, default=128, metavar="N")
    parser.add_argument("--gen-len", type=int, default=32, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument(
        "--only", metavar="NAME", help=f"one system: {' or '.join(SYSTEMS)}"
    )
    _add_sweep_arguments(parser)
    return parser


def _add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sweep", "which settings are tried in short before the best one runs in full"
    )
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=BATCH_SIZES,
        metavar="N",
        help=f"the peer's (default {' '.join(map(str, BATCH_SIZES))})",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        choices=LAYERS,
        default=LAYERS,
        help="where the peer keeps decoder layers (default: either)",
    )
    group.add_argument(
        "--our-settings",
        nargs="+",
        default=(),
        metavar="ARGS",
        help="flexjax's, each as one text with arguments of bench.run, such as "
        '"--batch-size 64 --num-batches 2 --weights disk=1 --kv-cache disk=1"',
    )
    group.add_argument(
        "--sweep-len",
        type=int,
        default=6,
        metavar="N",
        help="tokens of a short run (default %(default)s)",
    )
    group.add_argument(
        "--projected",
        action="store_true",
        help="leave full runs out: report what the best short runs promise",
    )
    group.add_argument(
        "--peers-python",
        type=pathlib.Path,
        default=PYTHON,
        metavar="FILE",
        help="interpreter of an environment with accelerate (default: the one that "
        "`make peers` makes)",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    systems = _systems(args)
    json_path = None if args.json is None else pathlib.Path(args.json).absolute()
    if json_path is not None:
        ensure_writable("--json", json_path)
    job = _job(args, {system.weights_format for system in systems})
    results = [
        find_best(
            system,
            job,
            functools.partial(run_child, system, job),
            sweep_len=args.sweep_len,
            projected=args.projected,
        )
        for system in systems
    ]
    report = _report(args, job, results)
    if json_path is not None:
        write_atomically(json_path, json.dumps(report, indent=1).encode())
    print(table(report["systems"]))
    if report["ratio"] is not None:
        print(f"flexjax is {report['ratio']:.2f} times as fast as its best peer")


def run_child(system: System, job: Job, setting: Setting, gen_len: int) -> Attempt:
    """Runs `system` for `gen_len` tokens of `job`, as a process under the job's cap."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.json")
        part = dataclasses.replace(job, gen_len=gen_len)
        finished = run_capped(
            system.command(part, setting, report), job.memory_cap_bytes
        )
        outcome: Measured | Failed
        if finished.killed_for_memory:
            outcome = Failed("killed: out of memory", killed_for_memory=True)
        elif finished.returncode:
            lines = finished.stderr.strip().splitlines()
            reason = lines[-1] if lines else "it said nothing"
            outcome = Failed(f"exit status {finished.returncode}: {reason}")
        else:
            outcome = system.read(json.loads(report.read_text()))
    attempt = Attempt(setting, job.gen_len, outcome)
    print(f"{system.name} {setting}: {describe(attempt)}", file=sys.stderr)
    return attempt


def _systems(args: argparse.Namespace) -> list[System]:
    """What is to be compared, if it is here.

    Raises:
        ValueError: a system is unknown or not installed, or has no sensible setting.
    """
    if args.only in ABSENT:
        raise ValueError(
            f"{args.only} is no part of this comparison yet: it needs a GPU, and an "
            f"environment of its own; --only takes {' or '.join(SYSTEMS)}"
        )
    if args.only not in (None, *SYSTEMS):
        raise ValueError(f"--only is {args.only!r}, expected {' or '.join(SYSTEMS)}")
    for name, least in (
        ("sweep_len", MIN_SWEEP_LEN),
        ("prompt_len", 1),
        ("gen_len", 1),
    ):
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {getattr(args, name)}, expected at least {least}"
            )
    if min(args.batch_sizes) < 1:
        raise ValueError(
            f"--batch-sizes has {min(args.batch_sizes)}, expected 1 or more"
        )
    everything: list[System] = [
        Flexjax([parse_setting(text) for text in args.our_settings]),
        Accelerate(args.batch_sizes, args.layers, args.peers_python),
    ]
    systems = [s for s in everything if args.only in (None, s.name)]
    for system in systems:
        system.check()
    return systems


def _job(args: argparse.Namespace, formats: Collection[str]) -> Job:
    """The job; makes the weights, once all else that may be missing is here."""
    config = named_config(args.model)
    length = args.prompt_len + args.gen_len
    if length > config.max_position_embeddings:
        raise ValueError(
            f"--prompt-len and --gen-len make {length} tokens, but {args.model} has "
            f"{config.max_position_embeddings} positions; shorten one of them"
        )
    cap_bytes = None if args.memory_cap is None else parse_bytes(args.memory_cap)
    if cap_bytes is not None:
        ensure_can_cap(cap_bytes)
    return Job(
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        memory_cap_bytes=cap_bytes,
        weights_bytes=weights_bytes(args.model),
        kv_cache_bytes=kv_cache_bytes(args.model, length),
        weights=make_weights(args.model, formats),
    )


def _report(
    args: argparse.Namespace, job: Job, results: Sequence[Result]
) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "model": args.model,
        "prompt_len": job.prompt_len,
        "gen_len": job.gen_len,
        "memory_cap_bytes": job.memory_cap_bytes,
        "ratio": ratio(results, SYSTEMS[0]),
        "systems": [result_to_json(result) for result in results],
        # Last: it wakes the device, whose memory the runs had to themselves.
        "machine": describe_machine(default_cache()),
        "date": now.isoformat(timespec="seconds"),
        "command": typed(
            "bench.compare",
            build_parser(),
            args,
            leave_out={"json", "peers_python", "debug", "help"},
        ),
    }


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
