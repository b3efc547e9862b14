"""The report's figures, drawn with matplotlib from plain values.

A figure is an SVG whose bytes depend on the values alone. Colours are those of Okabe
and Ito, which colour-blind readers tell apart; lines differ by their markers, too.
"""

import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

_BLUE, _GREY, _LIGHT_GREY = "#0072B2", "#555555", "#D9D9D9"
_COLOURS = (_BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "flexjax",  # ids that do not differ from run to run
    "svg.fonttype": "path",  # the same everywhere, whatever fonts a reader has
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_WIDTH_IN = 8.0
_NAME_CHARS = 105  # of small type that fit across a timeline
_NAMED_ROWS = 2  # rows of a lane that are high enough for names
_EDGE = 0.06  # free space between lanes, as a share of a lane's height


class Line(NamedTuple):
    """One line of a plot."""

    label: str
    points: Sequence[tuple[float, float]]


class Bounded(NamedTuple):
    """A measured time beside the times that each resource alone would take."""

    label: str
    seconds: float
    bound_s: Mapping[str, float]


class Bar(NamedTuple):
    """One system of a comparison."""

    task: str
    system: str
    tokens_per_s: float


class Stretch(NamedTuple):
    """A piece of work in a timeline; times are seconds since the window began."""

    name: str
    begin_s: float
    end_s: float
    row: int


class LaneRow(NamedTuple):
    """A lane of a timeline: its work in the window, and for which share it is busy."""

    label: str
    rows: int
    busy: float
    stretches: Sequence[Stretch]


def draw_lines(
    title: str, lines: Sequence[Line], x: str, y: str, *, doubling: bool = False
) -> bytes:
    """Lines over a shared axis; the y axis begins at 0.

    Args:
        title: of the figure.
        lines: what is drawn.
        x: what the x axis shows.
        y: what the y axis shows.
        doubling: whether each doubling takes the same space on the x axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH_IN, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x, ylabel=y)
        axes.grid(visible=True)
        for (label, points), (colour, marker) in zip(lines, _looks(), strict=False):
            many = len(points) > 40
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=colour,
                marker="" if many else marker,
                markersize=5.5,
                linewidth=1.2 if many else 1.8,
                label=label,
            )
        xs = {point[0] for line in lines for point in line.points}
        if doubling:
            _double(axes, sorted(xs))
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=_are_whole(xs)))
        axes.set_ylim(
            0, 1.08 * max(point[1] for line in lines for point in line.points)
        )
        _legend(figure, axes)
        return _svg(figure)


def draw_bounds(title: str, phases: Mapping[str, Sequence[Bounded]]) -> bytes:
    """A panel a phase, a row a case: each resource's bound over the measured time."""
    labels = list(dict.fromkeys(b.label for rows in phases.values() for b in rows))
    resources = sorted(
        {name for rows in phases.values() for row in rows for name in row.bound_s}
    )
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH_IN, 1.7 + 0.34 * len(labels)), layout="constrained")
        panels = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
        figure.suptitle(title, fontweight="bold", fontsize=11, x=0.01, ha="left")
        for axes, (phase, rows) in zip(panels, phases.items(), strict=True):
            axes.set(title=phase, xlabel="a resource's bound / measured time")
            axes.grid(visible=True, axis="x")
            axes.axvline(1.0, color=_GREY, linewidth=1.2)
            _draw_bound_rows(axes, rows, labels, resources)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.6)
            axes.set_xlim(0, 1.3)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        _legend(figure, panels[0], below=True)
        return _svg(figure)


def _draw_bound_rows(
    axes: Axes, rows: Sequence[Bounded], labels: list[str], resources: list[str]
) -> None:
    for row in rows:
        y = labels.index(row.label)
        axes.plot([0, 1], [y, y], color=_LIGHT_GREY, linewidth=6, zorder=1)
        time = f"{row.seconds:.3g} s"
        axes.text(1.03, y, time, va="center", fontsize=8.5, color=_GREY)
    for resource, (colour, marker) in zip(resources, _looks(), strict=False):
        found = [row for row in rows if resource in row.bound_s]
        axes.plot(
            [row.bound_s[resource] / row.seconds for row in found],
            [labels.index(row.label) for row in found],
            color=colour,
            marker=marker,
            markersize=7.5,
            markeredgecolor="white",
            linestyle="",
            label=resource,
        )


def draw_bars(title: str, bars: Sequence[Bar]) -> bytes:
    """Tokens per second of several systems at the same tasks; flexjax stands out."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH_IN, 1.2 + 0.4 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel="tokens/s, each system at its best setting")
        axes.grid(visible=True, axis="x")
        widest = max(bar.tokens_per_s for bar in bars)
        tasks = list(dict.fromkeys(bar.task for bar in bars))
        ys = [i + 0.5 * tasks.index(bar.task) for i, bar in enumerate(bars)]
        for y, bar in zip(ys, bars, strict=True):
            colour = _BLUE if bar.system == "flexjax" else "#999999"
            axes.barh(y, bar.tokens_per_s, color=colour, height=0.66)
            label_at = (bar.tokens_per_s + 0.01 * widest, y)
            axes.text(*label_at, _number(bar.tokens_per_s), va="center", color=_GREY)
        names = [f"{bar.task}: {bar.system}" for bar in bars]
        axes.set_yticks(ys, names)
        axes.invert_yaxis()
        axes.set_xlim(0, widest * 1.1)
        return _svg(figure)


def draw_timeline(title: str, lanes: Sequence[LaneRow], window_s: float) -> bytes:
    """What each lane does at what time; bars in one lane at once lie side by side."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure((_WIDTH_IN, 1.3 + 0.5 * len(lanes)), layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel="ms since the window began")
        axes.grid(visible=True, axis="x")
        for y, (lane, (colour, _)) in enumerate(zip(lanes, _looks(), strict=False)):
            _draw_stretches(axes, y, lane, colour, window_s)
        axes.set_xlim(0, window_s * 1e3)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        labels = [f"{lane.label}\nbusy {lane.busy:.2f}" for lane in lanes]
        axes.set_yticks(range(len(lanes)), labels, fontsize=9)
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def _draw_stretches(
    axes: Axes, y: int, lane: LaneRow, colour: str, window_s: float
) -> None:
    height = (1 - 2 * _EDGE) / lane.rows
    for stretch in lane.stretches:
        begin_ms, long_ms = (
            stretch.begin_s * 1e3,
            (stretch.end_s - stretch.begin_s) * 1e3,
        )
        top = y - 0.5 + _EDGE + stretch.row * height
        axes.broken_barh(
            [(begin_ms, long_ms)],
            (top, height),
            facecolor=colour,
            edgecolor="white",
            linewidth=0.3,
        )
        room = long_ms / (window_s * 1e3) * _NAME_CHARS
        if lane.rows <= _NAMED_ROWS and len(stretch.name) < room:
            axes.text(
                begin_ms + long_ms / 2,
                top + height / 2,
                stretch.name,
                ha="center",
                va="center",
                fontsize=7,
                color="white",
            )


def _looks() -> Iterator[tuple[str, str]]:
    """Pairs of colour and marker without end; the first ones differ in both."""
    for shift in itertools.count():
        for i, colour in enumerate(_COLOURS):
            yield colour, _MARKERS[(i + shift) % len(_MARKERS)]


def _are_whole(values: set[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _double(axes: Axes, xs: list[float]) -> None:
    """An axis on which each doubling takes the same space, with ticks at `xs`."""
    axes.set_xscale("log", base=2)
    ticks: list[float] = []
    for value in xs:  # those that have room
        if not ticks or math.log2(value / ticks[-1]) > 0.06 * math.log2(xs[-1] / xs[0]):
            ticks.append(value)
    axes.set_xticks(ticks, [_number(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, axes: Axes, *, below: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if below or len(labels) > 4 or any(len(label) > 30 for label in labels):
        columns = max(1, min(len(labels), 110 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    elif labels:
        axes.legend()


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": "flexjax"})
    return file.getvalue()
