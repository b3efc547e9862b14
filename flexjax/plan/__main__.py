"""`python -m flexjax.plan`: says what a run will take before it begins."""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from flexjax.cli import run_command
from flexjax.plan.hardware import (
    Hardware,
    example_names,
    hardware_to_json,
    read_hardware,
)
from flexjax.plan.job import Job
from flexjax.plan.parts import Asked, asks, plan_parts
from flexjax.plan.planner import (
    Found,
    allowed_policies,
    check_job,
    find_model,
    make_plan,
    storable,
)
from flexjax.plan.report import (
    parts_to_json,
    parts_to_text,
    plan_to_json,
    plan_to_text,
    saved_s,
)
from flexjax.plan.search import Plan
from flexjax.policy import to_json
from flexjax.safe_files import ensure_distinct, ensure_writable, write_atomically
from flexjax.sizes import format_bytes, parse_bytes

_CALIBRATE = "calibrate"
_JOB = {"prompt_len": 512, "gen_len": 32, "num_prompts": 1000}  # where not given
_EXAMPLE = """examples:
  python -m flexjax.plan calibrate
  python -m flexjax.plan facebook/opt-175b --prompt-len 512 --gen-len 32 \\
      --num-prompts 1000 --hardware t4-208gb
  python -m flexjax.plan path/to/opt-6.7b --prompts rows.jsonl --gen-len 64
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flexjax.plan",
        description="Finds the policy that does a job in the least time, and prints "
        "what it will cost; no weight is read. Measures this machine the first time.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        help="a published model, a folder, or a Hub id; "
        f"{_CALIBRATE}: measure this machine anew",
    )
    _add_job(parser)
    for flag, what in (
        ("--device-memory", "the device's memory"),
        ("--host-memory", "the host's memory"),
        ("--disk", "room to spill"),
    ):
        parser.add_argument(
            flag,
            metavar="SIZE",
            help=f"{what}, such as 16GiB, instead of what is free; of a memory, a "
            "twentieth and 400 MiB are left for what no plan counts",
        )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="a machine's file, or one of " + ", ".join(example_names()),
    )
    parser.add_argument("--offload-dir", metavar="DIR", help="where to spill to")
    _add_limits(parser)
    parser.add_argument(
        "--json",
        metavar="FILE",
        help=f"write the plan here, or what {_CALIBRATE} measured, for --hardware",
    )
    parser.add_argument(
        "--policy-json", metavar="FILE", help="write a policy.json for --policy here"
    )
    return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("prompt_len", "tokens of a prompt"),
        ("gen_len", "new tokens of each"),
        ("num_prompts", "prompts"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{what} (default {_JOB[name]})",
        )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="plan for the prompts of a file, as flexjax.generate takes them: in parts "
        "where their lengths differ so much that this is faster, or only some begin as "
        "others do, and once a block for what these begin with; - is what is piped in",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-quantized",
        action="store_const",
        const=True,
        help="try weights and KV cache of 4 and 8 bits too, and where a processor "
        "multiplies such weights as they are, activations of 8",
    )
    parser.add_argument(
        "--block-latency",
        type=float,
        metavar="SECONDS",
        help="the most that a block of prompts may take, to its last token",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    _check_flags(args)
    flags = ("json", "policy_json", "hardware", "prompts")
    ensure_distinct({f"--{f.replace('_', '-')}": getattr(args, f) for f in flags})
    for flag in ("json", "policy_json"):
        if (name := getattr(args, flag)) is not None:
            ensure_writable(f"--{flag.replace('_', '-')}", pathlib.Path(name))
    if args.model == _CALIBRATE:
        hardware = _measured(args, anew=True)
        if args.json is not None:
            _write(args.json, hardware_to_json(hardware))
        print(_figures(hardware))
        return
    # A described machine computes float16 as it is stored only if it has a device.
    hardware = None if args.hardware is None else read_hardware(args.hardware)
    is_cpu = hardware is None or hardware.device_is_host
    found = find_model(args.model, platform="cpu" if is_cpu else "gpu")
    given = {name: getattr(args, name) for name in _JOB}
    job = Job(**_JOB | {name: n for name, n in given.items() if n is not None})
    wanted: list[Asked] = []
    if args.prompts is None:
        check_job(job, found.config)
    else:
        check_job(dataclasses.replace(job, prompt_len=1), found.config)
        wanted = _wanted(args, found, job.gen_len)
    hardware = _with_budgets(args, hardware or _measured(args, anew=False))
    plans, values, text = _planned(args, found, hardware, job, wanted)
    print(text)
    if args.json is not None:
        _write(args.json, values)
    if args.policy_json is not None:
        if len(plans) > 1:
            raise ValueError(
                "--policy-json is of one policy, but these prompts are planned in "
                f"{len(plans)} parts: leave it out, and flexjax.generate will plan them"
            )
        _write(args.policy_json, to_json(plans[0].policy))


def _planned(
    args: argparse.Namespace,
    found: Found,
    hardware: Hardware,
    job: Job,
    wanted: list[Asked],
) -> tuple[list[Plan], dict[str, Any], str]:
    """The plans of what is wanted, or else of a job, as JSON values and as text."""
    allowed = allowed_policies(
        quantized=bool(args.allow_quantized),
        host_attention=not hardware.device_is_host,
        rounded=hardware.rounded_product_flops_per_s is not None,
        base=found.template,
    )
    most_block_s = _most_block_s(args)
    if not wanted:
        plan, model = make_plan(
            found, hardware, job, allowed, most_block_s=most_block_s
        )
        saved = saved_s(plan, model, hardware, most_block_s=most_block_s)
        text = plan_to_text(plan, model, hardware, saved)
        return [plan], plan_to_json(plan, hardware, saved), text
    plans = [
        plan
        for asked in wanted
        for plan in plan_parts(storable(found, allowed), hardware, asked)
    ]
    parts = [(plan, found.model(plan.policy)) for plan in plans]
    return plans, parts_to_json(plans, hardware), parts_to_text(parts, hardware)


def _most_block_s(args: argparse.Namespace) -> float:
    return math.inf if args.block_latency is None else args.block_latency


def _wanted(args: argparse.Namespace, found: Found, gen_len: int) -> list[Asked]:
    """Of the prompts of a file, the longest of each first."""
    # Slow to load.
    from flexjax.prompt_file import prompts_path
    from flexjax.prompt_lengths import prompt_lengths

    path = prompts_path(args.prompts)
    lengths, groups = prompt_lengths(path, args.model, found.config, gen_len)
    most_block_s = _most_block_s(args)
    return [
        asked._replace(lengths=sorted(asked.lengths, reverse=True))
        for asked, _ in asks(lengths, gen_len, groups, most_block_s)
    ]


def _write(name: str, values: object) -> None:
    write_atomically(pathlib.Path(name), json.dumps(values, indent=1).encode() + b"\n")


def _check_flags(args: argparse.Namespace) -> None:
    """Refuses what cannot act beside something else."""
    given = [
        flag
        for flag in (
            *("device_memory", "host_memory", "disk", "hardware", "policy_json"),
            *("block_latency", "allow_quantized", "prompts", *_JOB),
        )
        if getattr(args, flag) is not None
    ]
    if args.model == _CALIBRATE and given:
        raise ValueError(
            f"--{given[0].replace('_', '-')} has no effect on {_CALIBRATE}, which "
            "measures this machine as it is; leave it out"
        )
    counted = [name for name in ("prompt_len", "num_prompts") if name in given]
    if args.prompts is not None and counted:
        raise ValueError(
            f"--{counted[0].replace('_', '-')} is of prompts that are not there yet, "
            "but --prompts gives some; leave one of them out"
        )
    if args.block_latency is not None and not args.block_latency > 0:
        raise ValueError(
            f"--block-latency is {args.block_latency:g}, expected more than 0 seconds"
        )
    if args.hardware is not None and args.offload_dir is not None:
        raise ValueError(
            "--offload-dir says which disk is measured, but --hardware describes one: "
            "give one of them"
        )


def _measured(args: argparse.Namespace, *, anew: bool) -> Hardware:
    # Slow to load, and not needed for a machine that is described.
    import jax

    from flexjax.cache_folder import default_cache
    from flexjax.plan.calibrate import calibrated

    folder = args.offload_dir or default_cache()
    return calibrated(
        pathlib.Path(folder),
        jax.devices()[0],
        progress=lambda text: print(text, file=sys.stderr),
        anew=anew,
    )


def _with_budgets(args: argparse.Namespace, hardware: Hardware) -> Hardware:
    given = {
        "device_memory_bytes": args.device_memory,
        "host_memory_bytes": args.host_memory,
        "disk_bytes": args.disk,
    }
    if hardware.device_is_host and args.device_memory is not None:
        raise ValueError(
            "--device-memory has no effect where the device is the host's processor: "
            "give --host-memory, which is the memory of both"
        )
    sizes = {
        name: parse_bytes(text) for name, text in given.items() if text is not None
    }
    return dataclasses.replace(hardware, **sizes)


def _figures(hardware: Hardware) -> str:
    """A machine's figures as a table."""
    lines = [hardware.name]
    for field in dataclasses.fields(Hardware):
        value = getattr(hardware, field.name)
        if field.name != "name" and value is not None:
            lines += _lines(field.name, value)
    return "\n".join(lines)


def _lines(label: str, value: Any) -> Iterator[str]:
    """A figure, or each of a table's, or of a table of tables."""
    if isinstance(value, dict):
        for key, figure in value.items():
            yield from _lines(f"{label} {key}", figure)
    else:
        yield f"  {label:40} {_figure(label.partition(' ')[0], value)}"


def _figure(name: str, value: float) -> str:
    if name.endswith("flops_per_s"):
        return f"{value / 1e12:.3f} TFLOP/s"
    if name.endswith("bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    if name.endswith("_bytes"):
        return format_bytes(int(value))
    if name.endswith("_per_s"):
        return f"{value / 1e6:.3g} million/s"
    if name.endswith("_s"):
        return f"{value * 1e6:.0f} us"
    return str(value) if isinstance(value, bool) else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
