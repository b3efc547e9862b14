"""Makes a page of tables and figures from the JSON files that benchmarks wrote.

    python -m bench.report [FILES...] [--out bench/results]

Files may come from different machines, which are shown apart, and may be traces.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bench.report_files import read_results
from bench.report_values import (
    PHASES,
    Chosen,
    Comparison,
    Frontier,
    Grid,
    InTwoWays,
    Kernels,
    Phase,
    Precision,
    Predicted,
    Predictions,
    Quality,
    Rate,
    Result,
    Run,
    Trace,
)
from flexjax.cli import run_command
from flexjax.safe_files import make_folder, write_atomically

if TYPE_CHECKING:
    from bench.report_figures import Plot

RESULTS = pathlib.Path("bench/results")
PAGE = "README.md"
_INTRODUCTION = """# Results

Made by `python -m bench.report` from the JSON files in this folder, which hold more.
A fraction of the bound is the largest of the times that each resource alone would
take, over the measured time; what bounds it is that resource.
"""
_RUN_COLUMNS = (
    "case",
    "tokens/s",
    *(f"{phase}: fraction of bound" for phase in PHASES),
    "peak memory",
    "command",
)


def _main(args: argparse.Namespace) -> None:
    paths = args.files or sorted(args.out.glob("*.json"))
    if not paths:
        raise ValueError(
            f"there are no results in {args.out}; make one, for instance with "
            f"`python -m bench.run CASE --json {args.out}/CASE.json`"
        )
    if args.window is not None and not 0 <= args.window[0] < args.window[1]:
        raise ValueError(
            f"--window is {args.window[0]:g} {args.window[1]:g}, expected the begin "
            "and a later end, in seconds"
        )
    results = read_results(paths)
    try:
        from bench.report_figures import machine_figures, timeline
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report's figures need {error.name}, which is not installed; install "
            "it with `make setup EXTRAS=dev,bench`"
        ) from error
    traces = [result for result in results if isinstance(result, Trace)]
    groups = list(by_machine(results))
    make_folder(args.out)
    page = [_INTRODUCTION]
    for machine, group in groups:
        plots = list(machine_figures(machine, group))
        page += [f"## {machine}\n", *_tables(group), *_figures(plots, args.out)]
    if traces:
        plots = [timeline(trace, args.window) for trace in traces]
        page += ["## Timelines\n", *_figures(plots, args.out)]
    write_atomically(args.out / PAGE, "\n".join(page).encode())
    print(f"wrote {args.out / PAGE}")


def by_machine(results: Iterable[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each machine, in their order; traces do not tell theirs."""
    told = [result for result in results if not isinstance(result, Trace)]
    ordered = sorted(told, key=lambda result: result.machine)
    for machine, group in itertools.groupby(ordered, lambda result: result.machine):
        yield machine, list(group)


def _figures(plots: Sequence["Plot"], out: pathlib.Path) -> Iterator[str]:
    """Writes the figures that have data; yields the lines that show them."""
    for plot in plots:
        if plot.svg is None:
            print(f"left out, for want of results: {plot.title}")
            continue
        write_atomically(out / f"{plot.stem}.svg", plot.svg)
        yield f"![{plot.title}]({plot.stem}.svg)\n"


def _tables(results: Sequence[Result]) -> Iterator[str]:
    runs = [result for result in results if isinstance(result, Run)]
    if runs:
        yield _table(_RUN_COLUMNS, map(_run_row, runs))
    comparisons = [result for result in results if isinstance(result, Comparison)]
    if comparisons:
        columns = ("model", "memory cap", "tokens/s", "ratio", "command")
        yield _table(columns, map(_comparison_row, comparisons))

    for result in results:
        if isinstance(result, Kernels):
            yield f"With everything in memory, shapes of {result.model}:\n"
            columns = ("kernel", "shape", "TFLOP/s", "GB/s")
            yield _table(columns, map(_rate_row, result.rates))
        if isinstance(result, Quality):
            yield f"Perplexity on held-out text, `{result.command}`:\n"
            columns = (
                *("weights", "KV cache", "inputs", "past", "perplexity", "change"),
                "same top 1",
            )
            yield _table(columns, map(_precision_row, result.precisions))
        if isinstance(result, Predictions):
            yield (
                f"Seconds predicted and measured, `{result.command}`: half of the "
                f"errors are below {result.median_error:.1%}, nine in ten below "
                f"{result.error_of_90_percent:.1%}:\n"
            )
            columns = ("policy", *PHASES, "error of all")
            yield _table(columns, map(_predicted_row, result.rows))
        if isinstance(result, Grid):
            yield (
                f"{result.model}, the plan and the best of a grid of others, "
                f"`{result.command}`:\n"
            )
            columns = ("memory cap", "planned", "best other", "others", "longer")
            yield _table(columns, map(_chosen_row, result.rows))
        if isinstance(result, InTwoWays):
            yield (
                f"{result.model}, `{result.command}`: {result.in_words}: "
                f"{result.ratio:.1f} times as long.\n"
            )
        if isinstance(result, Frontier):
            yield f"{result.model}, predicted by `{result.command}`.\n"


def _rate_row(rate: Rate) -> list[str]:
    flops = "" if rate.flops_per_s is None else f"{rate.flops_per_s / 1e12:.2f}"
    nbytes = "" if rate.bytes_per_s is None else f"{rate.bytes_per_s / 1e9:.1f}"
    return [rate.kernel, rate.shape, flops, nbytes]


def _precision_row(row: Precision) -> list[str]:
    return [
        f"{row.weight_bits} bits",
        f"{row.kv_cache_bits} bits",
        f"{row.activation_bits} bits",
        f"{row.attention_sparsity:.0%}",
        f"{row.perplexity:.3f}",
        f"{row.increase:+.2%}",
        f"{row.top_1_agreement:.1%}",
    ]


def _predicted_row(row: Predicted) -> list[str]:
    return [
        row.policy,
        *(f"{row.predicted_s[p]:.2f} for {row.measured_s[p]:.2f}" for p in PHASES),
        f"{row.error:+.1%}",
    ]


def _chosen_row(row: Chosen) -> list[str]:
    return [
        f"{row.memory_cap_bytes / 1e9:g} GB",
        f"{row.chosen_s:.2f} s ({row.chosen})",
        f"{row.best_s:.2f} s ({row.best})",
        str(row.policies),
        f"{row.ratio - 1:+.1%}",
    ]


def _run_row(run: Run) -> list[str]:
    fractions = [_fraction(run.phases.get(phase)) for phase in PHASES]
    case = f"{run.case}: {run.note}" if run.note else run.case
    peak = f"{run.peak_rss_bytes / 1e9:.2f} GB"
    return [case, f"{run.tokens_per_s:.1f}", *fractions, peak, f"`{run.command}`"]


def _fraction(phase: Phase | None) -> str:
    return f"{phase.fraction_of_bound:.2f} ({phase.bound_by})" if phase else "-"


def _comparison_row(comparison: Comparison) -> list[str]:
    cap_bytes = comparison.memory_cap_bytes
    rates = [
        f"{system.name} {system.tokens_per_s:.1f} ({system.setting})"
        for system in comparison.systems
    ]
    return [
        comparison.model,
        "none" if cap_bytes is None else f"{cap_bytes / 1e9:g} GB",
        "; ".join(rates),
        "" if comparison.ratio is None else f"{comparison.ratio:.2f}",
        f"`{comparison.command}`",
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_cell(c) for c in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Makes a page of tables and figures from benchmarks' JSON files.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=pathlib.Path,
        metavar="FILE",
        help="results and traces (default: every *.json in the folder of --out)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=RESULTS,
        metavar="DIR",
        help="where the page and its figures go (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("BEGIN_S", "END_S"),
        help="what timelines show, in seconds (default: a few layers in the middle)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_main, build_parser()))
