"""What a comparison found, as JSON values and as a table for people."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.peers.sweep import Result
from bench.peers.system import Attempt, Failed
from flexjax.sizes import format_bytes

HEADINGS = ("system", "tokens/s", "prefill s", "decode s", "s/step", "peak", "setting")


def ratio(results: Iterable[Result], ours: str) -> float | None:
    """Tokens/s of `ours` over the best other's; None if either has no figure."""
    speeds = {r.name: r.best.tokens_per_s for r in results if r.best is not None}
    own = speeds.pop(ours, None)
    return own / max(speeds.values()) if own is not None and speeds else None


def result_to_json(result: Result) -> dict[str, Any]:
    """The row of a system: its best run, or why it has none, and all that it tried."""
    row = result.best or result.attempts[-1]
    return {
        "name": result.name,
        **attempt_to_json(row),
        "tried": [attempt_to_json(attempt) for attempt in result.attempts],
    }


def attempt_to_json(attempt: Attempt) -> dict[str, Any]:
    """One run of a system; figures are None where it failed."""
    values = {"setting": str(attempt.setting), "num_rows": attempt.setting.num_rows}
    outcome, gen_len = attempt.outcome, attempt.gen_len
    if isinstance(outcome, Failed):
        figures = dict.fromkeys(
            (
                *("tokens_per_s", "prefill_s", "decode_s", "step_s"),
                *("peak_rss_bytes", "versions"),
            )
        )
        return (
            values
            | figures
            | {
                "projected": False,
                "killed_for_memory": outcome.killed_for_memory,
                "failure": outcome.reason,
            }
        )
    decode_s = outcome.decode_s(gen_len)
    return values | {
        "tokens_per_s": attempt.tokens_per_s,
        "prefill_s": outcome.prefill_s,
        "decode_s": decode_s,
        "step_s": decode_s / (gen_len - 1) if gen_len > 1 else 0.0,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "versions": dict(outcome.versions),
        "projected": outcome.is_projected(gen_len),
        "killed_for_memory": False,
        "failure": None,
    }


def describe(attempt: Attempt) -> str:
    """A run in a few words."""
    if isinstance(attempt.outcome, Failed):
        return attempt.outcome.reason
    projected = attempt.outcome.is_projected(attempt.gen_len)
    return f"{attempt.tokens_per_s:.2f} tokens/s{' (projected)' if projected else ''}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `result_to_json`, with their figures in columns."""
    lines = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["failure"] is not None:
        return row["name"], *["-"] * 5, f"{row['setting']}: {row['failure']}"
    return (
        row["name"],
        f"{row['tokens_per_s']:.2f}",
        f"{row['prefill_s']:.2f}",
        f"{row['decode_s']:.2f}",
        f"{row['step_s']:.3f}",
        format_bytes(row["peak_rss_bytes"]),
        row["setting"] + (" (projected)" if row["projected"] else ""),
    )
