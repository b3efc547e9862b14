"""`python -m bench.run`: one whole run, beside what the machine's limits allow."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from bench.cases import Case
from bench.catalog import all_cases, find_case
from bench.command import typed
from bench.memory_cap import ensure_can_cap, run_capped
from bench.page_cache import may_drop_everything
from bench.summary import summary
from bench.synthetic import published_config, weights_folder
from flexjax.cli import run_command
from flexjax.policy import validate
from flexjax.policy_args import add_policy_arguments, policy_from_args
from flexjax.safe_files import (
    ensure_distinct,
    ensure_writable,
    make_folder,
    write_atomically,
)
from flexjax.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from bench.measure import Job

# What may be said in addition to a case's name; everything else is the case's own.
_WITH_A_CASE = {
    *("case", "json", "trace", "cold", "memory_cap", "offload_dir", "debug"),
    *("prompt_len", "gen_len"),
}
_NOT_OF_THE_RUN = {"json", "trace", "offload_dir", "debug", "list", "help"}
_PROMPT_LEN, _GEN_LEN = 128, 32
_EXAMPLE = """examples:
  python -m bench.run --list
  python -m bench.run opt-1.3b-disk --memory-cap 4GB --json opt-1.3b-disk.json
  python -m bench.run --model opt-6.7b --weights disk=1 --batch-size 64 --cold
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.run",
        description="Runs a model once, whole, and says how near it came to the limits "
        "of the machine, which are measured before and after the run. The weights of a "
        "published model are random; they are made the first time.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "case", nargs="?", metavar="CASE", help="what to run, instead of --model"
    )
    parser.add_argument("--list", action="store_true", help="list the cases, and end")
    parser.add_argument(
        "--model", help="a published model such as opt-6.7b, or a folder with weights"
    )
    parser.add_argument(
        "--prompt-len",
        type=int,
        metavar="N",
        help=f"tokens of every prompt (default: the case's, or {_PROMPT_LEN})",
    )
    parser.add_argument(
        "--gen-len",
        type=int,
        metavar="N",
        help=f"tokens to generate for each (default: the case's, or {_GEN_LEN})",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="drop the page cache before the run (many cases do so anyway)",
    )
    parser.add_argument(
        "--memory-cap",
        metavar="SIZE",
        help="such as 2GB: run in a cgroup that may take no more, page cache included",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    parser.add_argument(
        "--trace", metavar="FILE", help="write a trace of the run here, for Perfetto"
    )
    add_policy_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    if args.list:
        _list_cases()
        return
    case = _case(args)
    _ensure_ready(case, args)
    weights = weights_folder(case.model)

    from bench.measure import Job, measure  # loads JAX: after what can be refused early

    job = Job(
        case=case,
        weights=None if weights is None else str(weights),
        offload_dir=args.offload_dir,
        trace=args.trace,
    )
    if case.memory_cap_bytes is None:
        report = measure(job)
    else:
        report = _measure_capped(job, debug=args.debug)
    report["command"] = typed(
        "bench.run", build_parser(), args, leave_out=_NOT_OF_THE_RUN
    )
    if args.json is not None:
        text = json.dumps(report, indent=1, allow_nan=False)
        write_atomically(pathlib.Path(args.json), text.encode() + b"\n")
    print(summary(report))


def _case(args: argparse.Namespace) -> Case:
    """What the command line asks for, with a validated policy."""
    if (args.case is None) == (args.model is None):
        raise ValueError(
            "say what to run: either a CASE (`--list` lists them) or --model"
        )
    if args.case is None:
        case = Case(
            name="",
            model=args.model,
            policy=policy_from_args(args),
            prompt_len=_PROMPT_LEN,
            gen_len=_GEN_LEN,
        )
    else:
        case = find_case(args.case)
        _refuse_beside_a_case(args)
    changes: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("prompt_len", "gen_len")
        if getattr(args, name) is not None
    }
    if args.memory_cap is not None:
        changes["memory_cap_bytes"] = parse_bytes(args.memory_cap)
    return dataclasses.replace(
        case,
        policy=validate(case.policy),
        cold=case.cold or args.cold,
        **changes,
    )


def _refuse_beside_a_case(args: argparse.Namespace) -> None:
    plain = vars(build_parser().parse_args([]))
    for name, value in vars(args).items():
        if name not in _WITH_A_CASE and value != plain[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} does not go with a case, which has a "
                "policy of its own; give --model instead of the case"
            )


def _ensure_ready(case: Case, args: argparse.Namespace) -> None:
    """Refuses what would only fail after a long time."""
    flags = ("json", "trace", "policy")
    ensure_distinct({f"--{flag}": getattr(args, flag) for flag in flags})
    for name in ("json", "trace"):
        if (path := getattr(args, name)) is not None:
            ensure_writable(f"--{name}", pathlib.Path(path))
    config = published_config(case.model)
    if config is not None:
        case.ensure_fits(config)
    if args.offload_dir is not None:
        make_folder(pathlib.Path(args.offload_dir))
    if case.memory_cap_bytes is not None:
        ensure_can_cap(case.memory_cap_bytes)
    if case.cold and not may_drop_everything():
        print(
            "note: only the weight store is dropped from the page cache, since this "
            "user may not drop all of it",
            file=sys.stderr,
        )


def _measure_capped(job: "Job", *, debug: bool) -> dict[str, Any]:
    """Measures in a process of its own, under the case's cap.

    Raises:
        ValueError: the cap was too low.
        SystemExit: the run failed; it has said why.
    """
    from bench.measure import job_to_json

    cap_bytes = job.case.memory_cap_bytes
    assert cap_bytes is not None
    command = [sys.executable, "-m", "bench.measure", job_to_json(job)]
    finished = run_capped([*command, *["--debug"] * debug], cap_bytes)
    if finished.killed_for_memory:
        raise ValueError(
            f"the run was killed: it needed more than its cap of "
            f"{format_bytes(cap_bytes)}; raise the cap, lower batch_size or "
            "num_batches, or place less in memory"
        )
    if finished.returncode:
        raise SystemExit(finished.returncode)
    report = json.loads(finished.stdout)
    return report | {"cgroup_peak_bytes": finished.peak_bytes}


def _list_cases() -> None:
    for case in all_cases():
        policy = case.policy
        print(
            f"{case.name:33} {case.model or 'embedded':9} "
            f"{policy.batch_size:3} x {policy.num_batches:<2} "
            f"prompt {case.prompt_len:4}, {case.gen_len:3} new: {case.note}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
