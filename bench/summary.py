"""A run's report in a few lines, for a person."""

from collections.abc import Mapping
from typing import Any

from bench.bounds import DISK_READ
from flexjax.sizes import format_bytes


def summary(report: Mapping[str, Any]) -> str:
    """What was run, how near to its bounds, and what it took."""
    policy, limits = report["policy"], report["limits"]
    rates = ", ".join(
        f"{resource} {rate / 1e9:.2f} GB/s"
        for resource, rate in limits["bytes_per_s"].items()
    )
    lines = [
        f"{report['case'] or report['model']}: {policy['batch_size']} x "
        f"{policy['num_batches']} prompts of {report['prompt_len']} tokens, "
        f"{report['gen_len']} new each ({report['page_cache']})",
        f"{report['num_tokens']} tokens in {report['seconds']:.2f} s: "
        f"{report['tokens_per_s']:.2f} tokens/s",
        "",
        *_phase_table(report),
        "",
        f"limits: {rates}{_in_pauses(limits)}",
        f"memory: {_memory(report)}",
    ]
    return "\n".join(lines)


def _phase_table(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{'':8} {'seconds':>9} {'bound':>9} {'reached':>8}  bound by"]
    for name in ("prefill", "decode"):
        phase = report[name]
        if phase["fraction_of_bound"] is None:
            continue
        bound_s = phase["bound_s"][phase["bound_by"]]
        moved = ", ".join(
            f"{link} {rate / 1e9:.2f} GB/s"
            for link, rate in phase["bytes_per_s"].items()
        )
        fraction = phase["fraction_of_bound"]
        doubt = "; above 1: the limit was measured too low" if fraction > 1 else ""
        lines.append(
            f"{name:8} {phase['seconds']:9.2f} {bound_s:9.2f} {fraction:8.3f}  "
            f"{phase['bound_by']} (moved: {moved or 'nothing'}{doubt})"
        )
    return lines


def _in_pauses(limits: Mapping[str, Any]) -> str:
    """What the disk gave while the run paused."""
    rates = [rate["bytes_per_s"] / 1e9 for rate in limits["in_pauses"]]
    if not rates:
        return ""
    counted = limits["decode_bytes_per_s"].get(DISK_READ, 0.0) / 1e9
    return (
        f"; in {len(rates)} pauses of the decode {counted:.2f} GB/s "
        f"({min(rates):.2f} to {max(rates):.2f})"
    )


def _memory(report: Mapping[str, Any]) -> str:
    parts = [f"{format_bytes(report['peak_rss_bytes'])} resident"]
    for tier, nbytes in report["peak_bytes"].items():
        predicted = report["predicted_peak_bytes"].get(tier, 0)
        parts.append(
            f"{format_bytes(nbytes)} on {tier} (predicted {format_bytes(predicted)})"
        )
    if report["memory_cap_bytes"] is not None:
        parts.append(f"cap {format_bytes(report['memory_cap_bytes'])}")
    return ", ".join(parts)
