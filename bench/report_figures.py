"""Turns results into the figures of a report; a figure without data is left out."""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.plots import (
    Bar,
    Bounded,
    LaneRow,
    Line,
    Stretch,
    draw_bars,
    draw_bounds,
    draw_lines,
    draw_timeline,
)
from bench.report_values import (
    PHASES,
    Comparison,
    Copies,
    Frontier,
    Result,
    Run,
    Trace,
    Work,
)
from flexjax.memory.lanes import Lane
from flexjax.trace import assign_rows, busy_s

WINDOW_TASKS = 8  # of the device, in a timeline whose window is not given
_KEYWORD = re.compile(r"\b\w+=")  # an op's repr is short without
_NS_PER_S = 1_000_000_000

Points = dict[tuple[str, ...], dict[float, float]]


class Plot(NamedTuple):
    """A figure; `svg` is None if there is nothing to draw, as `title` then says."""

    stem: str
    title: str
    svg: bytes | None


def machine_figures(machine: str, results: Sequence[Result]) -> Iterator[Plot]:
    """The figures of what was measured on one machine."""
    runs = [result for result in results if isinstance(result, Run)]
    comparisons = [result for result in results if isinstance(result, Comparison)]
    copies = [result for result in results if isinstance(result, Copies)]
    frontiers = [result for result in results if isinstance(result, Frontier)]

    def plot(kind: str, title: str, data: Any, draw: Callable[..., bytes]) -> Plot:
        title = f"{title}: {machine}"
        svg = draw(title, data) if data else None
        return Plot(f"{kind}-{slug(machine)}", title, svg)

    yield plot(
        "throughput-batch",
        "Throughput against rows in a block",
        lines_by_rows(runs, comparisons),
        functools.partial(draw_lines, x="rows in a block", y="tokens/s", doubling=True),
    )
    yield plot(
        "throughput-cap",
        "Throughput against memory cap",
        lines_by_cap(runs, comparisons),
        functools.partial(draw_lines, x="memory cap (GB)", y="tokens/s"),
    )
    yield plot("bounds", "Bounds beside measured time", bounds(runs), draw_bounds)
    yield plot("comparison", "Beside other systems", bars(comparisons), draw_bars)
    yield plot(
        "steps",
        "Time of each decode step",
        [Line(run.case, list(enumerate(run.step_s, 1))) for run in runs if run.step_s],
        functools.partial(draw_lines, x="generated token", y="seconds a step"),
    )
    yield plot(
        "copies",
        "Copies between host and device",
        copy_lines(copies),
        functools.partial(draw_lines, x="MiB in a copy", y="GB/s", doubling=True),
    )
    yield plot(
        "frontier",
        "Predicted throughput against the time of a block",
        [Line(frontier.model, frontier.points) for frontier in frontiers],
        functools.partial(
            draw_lines, x="seconds of a block", y="tokens/s", doubling=True
        ),
    )


def lines_by_rows(runs: Iterable[Run], comparisons: Iterable[Comparison]) -> list[Line]:
    """Tokens per second by rows in a block; what else differs has lines of its own."""
    points: Points = defaultdict(dict)
    for run in runs:
        cap = _cap(run.memory_cap_bytes)
        key = (run.model, "flexjax", run.lengths, cap, run.placement)
        _keep_best(points[key], run.num_rows, run.tokens_per_s)
    for comparison in comparisons:
        for system in comparison.systems:
            cap = _cap(comparison.memory_cap_bytes)
            for tried in system.tried:
                key = (
                    *(comparison.model, system.name, comparison.lengths),
                    *(cap, tried.placement),
                )
                _keep_best(points[key], tried.num_rows, tried.tokens_per_s)
    return _lines(points)


def lines_by_cap(runs: Iterable[Run], comparisons: Iterable[Comparison]) -> list[Line]:
    """The best tokens per second under each memory cap, by model and system."""
    points: Points = defaultdict(dict)
    for run in runs:
        if run.memory_cap_bytes is not None:
            key = (run.model, "flexjax", run.lengths)
            _keep_best(points[key], run.memory_cap_bytes / 1e9, run.tokens_per_s)
    for comparison in comparisons:
        cap_bytes = comparison.memory_cap_bytes
        if cap_bytes is not None:
            for system in comparison.systems:
                key = (comparison.model, system.name, comparison.lengths)
                _keep_best(points[key], cap_bytes / 1e9, system.tokens_per_s)
    return _lines(points)


def _keep_best(best: dict[float, float], x: float, tokens_per_s: float) -> None:
    best[x] = max(tokens_per_s, best.get(x, 0.0))


def _lines(points: Points) -> list[Line]:
    """Lines of two points or more, each called by what tells it from the others."""
    found = {key: list(xy.items()) for key, xy in sorted(points.items()) if len(xy) > 1}
    differing = [len(set(parts)) > 1 for parts in zip(*found, strict=True)]
    lines = []
    for (model, *others), xy in found.items():
        told = zip(others, differing[1:], strict=True)
        parts = [part for part, differs in told if differs and part]
        lines.append(Line(", ".join([model, *parts]), xy))
    return lines


def bounds(runs: Sequence[Run]) -> Mapping[str, list[Bounded]]:
    """Every case's bounds, by phase."""
    return {
        phase: [
            Bounded(run.case, run.phases[phase].seconds, run.phases[phase].bound_s)
            for run in runs
            if phase in run.phases
        ]
        for phase in (PHASES if runs else ())
    }


def bars(comparisons: Iterable[Comparison]) -> list[Bar]:
    """Every system of every comparison, the fastest first in each."""
    return [
        Bar(
            f"{comparison.model}, {_cap(comparison.memory_cap_bytes)}",
            system.name,
            system.tokens_per_s,
        )
        for comparison in comparisons
        for system in sorted(comparison.systems, key=lambda s: -s.tokens_per_s)
    ]


def copy_lines(copies: Iterable[Copies]) -> list[Line]:
    """GB/s of each route by size; the newest file's, where several tell."""
    points: Points = defaultdict(dict)
    for route in (route for result in copies for route in result.routes):
        key = (f"{route.direction}: {route.name}",)
        points[key][route.nbytes / (1 << 20)] = route.bytes_per_s / 1e9
    return [Line(key[0], list(xy.items())) for key, xy in points.items()]


def timeline(trace: Trace, window_s: tuple[float, float] | None) -> Plot:
    """The lanes of a trace in a window, by default a few tasks amid the device's."""
    begin_s, end_s = window_s or middle_window(trace)
    lanes = []
    for lane, works in trace.lanes.items():
        shown = [w for w in works if w.end_s > begin_s and w.begin_s < end_s]
        rows = assign_rows([_nanoseconds(work) for work in shown])
        stretches = [
            Stretch(
                _KEYWORD.sub("", work.name),
                max(work.begin_s, begin_s) - begin_s,
                min(work.end_s, end_s) - begin_s,
                row,
            )
            for work, row in zip(shown, rows, strict=True)
        ]
        busy = busy_s([(w.begin_s, w.end_s) for w in shown], begin_s, end_s)
        share = busy / (end_s - begin_s)
        lanes.append(LaneRow(lane, max(rows, default=0) + 1, share, stretches))
    name = trace.path.name.removesuffix(".json").removesuffix(".trace")
    title = f"What overlaps: {name}, from {begin_s:.2f} s"
    svg = draw_timeline(title, lanes, end_s - begin_s) if trace.lanes else None
    return Plot(f"timeline-{slug(name)}", title, svg)


def middle_window(trace: Trace) -> tuple[float, float]:
    """From the begin of one task of the device, amid all, to that of a later one."""
    lanes = trace.lanes
    works: Sequence[Work] = lanes.get(Lane.COMPUTE.value, ())
    if len(works) > WINDOW_TASKS:
        first = (len(works) - WINDOW_TASKS) // 2
        return works[first].begin_s, works[first + WINDOW_TASKS].begin_s
    every = [work for works in lanes.values() for work in works]
    return 0.0, max((work.end_s for work in every), default=0.0) or 1.0


def slug(text: str) -> str:
    """`text` as a part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _nanoseconds(work: Work) -> tuple[int, int]:
    return round(work.begin_s * _NS_PER_S), round(work.end_s * _NS_PER_S)


def _cap(cap_bytes: int | None) -> str:
    return "no memory cap" if cap_bytes is None else f"cap {cap_bytes / 1e9:g} GB"
