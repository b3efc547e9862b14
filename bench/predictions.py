"""What the planner says, beside what comes: times and bytes of a grid of policies.

    python -m bench.predictions --json bench/results/predictions.json

The machine is calibrated first, unless it was before. Every policy runs twice, the
first time to compile; errors are of the second run's seconds. Measured bytes are what
the engine counts, and what XLA says that it works in (`step_shapes`).
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from bench.command import typed
from bench.machine import describe_machine
from bench.report_values import bits_in_words
from bench.step_shapes import workspace_bytes
from bench.synthetic import weights_folder
from checkpoints_tools.resolve import resolve_for
from flexjax.arrangement import shape_of
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import WeightStore, open_store
from flexjax.cli import run_command
from flexjax.kernels.products import PRODUCTS
from flexjax.llm import EMBEDDED_MODEL, LLM
from flexjax.plan.calibrate import calibrated
from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware, hardware_to_json
from flexjax.plan.job import Job
from flexjax.plan.predict import predict, predict_peak
from flexjax.plan.report import prediction_to_json
from flexjax.plan.scratch import store_read_rate
from flexjax.policy import Placement, Policy, Tier, to_json
from flexjax.prompts import random_prompts
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sampling_params import SamplingParams
from flexjax.schedule.footprint import by_tier

DEVICE, HALF, DISK = Placement(device=1.0), Placement(device=0.5), Placement()
HOST = Placement(host=1.0)
PROMPT_LEN, GEN_LEN = 32, 8
PHASES = ("prefill", "decode")


def policies(model: str, *, device_is_host: bool) -> Iterator[Policy]:
    """Mixes of tiers, in several shapes, some of them with 4 bits."""
    return _shared(model) if device_is_host else _apart()


def _apart() -> Iterator[Policy]:
    """Where a link is between host and device: what goes over it, and what need not."""
    sent = Policy(weights=HOST, kv_cache=DEVICE, batch_size=24)
    attended = [
        Policy(weights=weights, kv_cache=HOST, batch_size=24, num_batches=2)
        for weights in (HOST, DEVICE)
    ]
    for plain in attended:
        yield plain
        yield dataclasses.replace(plain, host_attention=True)
    yield sent
    yield dataclasses.replace(sent, weight_bits=4)
    for plain in attended:
        yield dataclasses.replace(plain, kv_cache_bits=4)


def _shared(model: str) -> Iterator[Policy]:
    large = model.endswith("6.7b")
    shapes = [(32, 1), (16, 2)] if large else [(16, 1), (64, 1), (32, 2), (16, 4)]
    weights = [DISK] if large else [DEVICE, HALF, DISK]
    for (batch_size, num_batches), placed, cache in itertools.product(
        shapes, weights, [DEVICE, DISK]
    ):
        policy = Policy(
            weights=placed,
            kv_cache=cache,
            batch_size=batch_size,
            num_batches=num_batches,
        )
        yield policy
        if placed == DISK and num_batches != 1:
            yield dataclasses.replace(policy, weight_bits=4)
            if cache == DISK:
                yield dataclasses.replace(policy, weight_bits=4, kv_cache_bits=4)
            elif PRODUCTS.is_there():
                yield dataclasses.replace(policy, weight_bits=4, activation_bits=8)


def compare(
    store: WeightStore,
    policy: Policy,
    hardware: Hardware,
    folder: pathlib.Path,
    *,
    prompt_len: int = PROMPT_LEN,
    gen_len: int = GEN_LEN,
) -> dict[str, Any]:
    """One policy's prediction and run, as JSON values."""
    model = Model(config=store.config, dtype=store.dtype, tensors=store.tensors)
    job = Job(prompt_len=prompt_len, gen_len=gen_len, num_prompts=policy.block_size)
    predicted = predict(model, policy, hardware, job)
    peak = predict_peak(model, policy, job, hardware.processor)
    prompts = random_prompts(store.config.vocab_size, job.num_prompts, prompt_len)
    params = SamplingParams(max_tokens=gen_len, temperature=0.0, ignore_eos=True)
    with LLM(store.folder, policy=policy, offload_dir=folder) as llm:
        for _ in range(2):
            llm.generate(prompts, params)
        metrics = llm.metrics
    layout = model.layout(policy, hardware.processor)
    work = layout.workload(
        policy,
        shape_of(policy, job.num_prompts),
        prompt_len=prompt_len,
        gen_len=gen_len,
    )
    counted = metrics["peak_bytes"]
    workspace = workspace_bytes(policy, work, layout)
    on_device = counted[Tier.DEVICE.value] + workspace
    measured = {f"{phase}_s": metrics[phase]["seconds"] for phase in PHASES}
    measured["total_s"] = metrics["seconds"]
    return {
        "policy": to_json(policy),
        "job": dataclasses.asdict(job),
        "predicted": prediction_to_json(predicted),
        "measured": measured | {"busy_s": {p: metrics[p]["busy_s"] for p in PHASES}},
        "error": predicted.total_s / measured["total_s"] - 1,
        "predicted_peak_bytes": {t.value: n for t, n in by_tier(peak).items()},
        "measured_peak_bytes": {**counted, Tier.DEVICE.value: on_device},
        "workspace_bytes": workspace,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Errors of all rows, as fractions of what was measured."""
    errors = sorted(abs(row["error"]) for row in rows)
    memories = (Tier.DEVICE.value, Tier.HOST.value)
    within = [
        sum(row["predicted_peak_bytes"][tier] for tier in memories)
        / sum(row["measured_peak_bytes"][tier] for tier in memories)
        for row in rows
    ]
    return {
        "policies": len(rows),
        "median_error": statistics.median(errors),
        "error_of_90_percent": errors[int(0.9 * (len(errors) - 1))],
        "least_peak_ratio": min(within),
        "most_peak_ratio": max(within),
    }


def host_attention_gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What attention on the host wins over moving the cache, as told and as measured.

    A gain is decode seconds without it over those with it, all else being equal.
    """
    gains = []
    for row in rows:
        moving = row["policy"] | {"host_attention": False}
        if not row["policy"]["host_attention"]:
            continue
        for other in rows:
            if other["policy"] == moving and other["model"] == row["model"]:
                gain = {
                    what: other[what]["decode_s"] / row[what]["decode_s"]
                    for what in ("predicted", "measured")
                }
                gains.append({"policy": row["policy"], **gain})
    return gains


def main(args: argparse.Namespace) -> None:
    """Runs the parsed command line."""
    if args.json is not None:
        ensure_writable("--json", args.json)
    folder = default_cache()
    device = jax.devices()[0]
    hardware = calibrated(folder, device, lambda text: print(text, file=sys.stderr))
    rows: list[dict[str, Any]] = []
    for name in args.models:
        weights = weights_folder(name)
        for policy in policies(name, device_is_host=hardware.device_is_host):
            store = open_store(
                resolve_for(policy, weights or EMBEDDED_MODEL, device=device)
            )
            measured = hardware
            if hardware.device_is_host:  # elsewhere nothing is on disk
                measured = dataclasses.replace(
                    hardware, disk_read_bytes_per_s=store_read_rate(store)
                )
            found = compare(
                store,
                policy,
                measured,
                folder,
                prompt_len=args.prompt_len,
                gen_len=args.gen_len,
            )
            rows.append({"model": pathlib.PurePath(name).name, **found})
            print(_line(rows[-1]), flush=True)
            if args.json is not None:  # each time: the whole takes long
                _write(args, rows, hardware)
    print(json.dumps(summary(rows), indent=1))
    for gain in host_attention_gains(rows):
        print(json.dumps(gain))


def _write(
    args: argparse.Namespace, rows: list[dict[str, Any]], hardware: Hardware
) -> None:
    report = {
        "summary": summary(rows),
        "host_attention": host_attention_gains(rows),
        "predictions": rows,
        "hardware": hardware_to_json(hardware),
        "machine": describe_machine(default_cache()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": typed(
            "bench.predictions", build_parser(), args, leave_out=("json", "help")
        ),
    }
    write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")


def _line(row: dict[str, Any]) -> str:
    policy, measured = row["policy"], row["measured"]
    predicted = row["predicted"]
    times = " ".join(
        f"{phase} {measured[f'{phase}_s']:6.2f} s ({predicted[f'{phase}_s']:6.2f})"
        for phase in PHASES
    )
    on_device = [policy[kind]["device"] for kind in ("weights", "kv_cache")]
    bits = f"{bits_in_words(policy)} bits"
    if policy["host_attention"]:
        bits += ", attention on the host"
    return (
        f"{row['model']} {policy['num_batches']} x {policy['batch_size']:3}, on the "
        f"{Tier.DEVICE.value} {on_device[0]:.1f} {on_device[1]:.1f}, {bits:10} {times} "
        f"{row['error']:+.1%}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.predictions",
        description="Runs a grid of policies and compares times and bytes with what "
        "the planner says.",
    )
    parser.add_argument(
        "models", nargs="*", default=["opt-1.3b", "opt-6.7b"], help="published models"
    )
    parser.add_argument(
        "--prompt-len",
        type=int,
        default=PROMPT_LEN,
        metavar="N",
        help=f"tokens of every prompt (default: {PROMPT_LEN})",
    )
    parser.add_argument(
        "--gen-len",
        type=int,
        default=GEN_LEN,
        metavar="N",
        help=f"tokens to generate for each (default: {GEN_LEN})",
    )
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="write the result here"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser()))
