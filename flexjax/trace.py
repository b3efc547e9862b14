"""A run as a timeline that Perfetto (ui.perfetto.dev) and chrome://tracing show.

One row a lane; work of a lane that overlaps, such as several disk requests in flight,
is spread over as many rows as it needs, since a row of a trace can only nest.
"""

import heapq
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from flexjax.memory.lanes import Lane, Span
from flexjax.safe_files import write_atomically

_PROCESS = 1
_NS_PER_S = 1_000_000_000  # whole nanoseconds: what touches must not seem to overlap
_NS_PER_US = 1_000


def write_trace(path: pathlib.Path, spans: Iterable[Span]) -> None:
    """Writes `spans` as a trace that begins at 0; the file is all there or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    lines = (json.dumps(event) for event in trace_events(list(spans)))
    text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(lines) + "\n]}\n"
    write_atomically(path, text.encode())


def trace_events(spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
    """The trace's events: first the rows' names, then what each lane did, in order."""
    yield _metadata("process_name", 0, name="flexjax")
    start_s = min((span.begin_s for span in spans), default=0.0)
    by_lane: dict[Lane, list[Span]] = defaultdict(list)
    for span in spans:
        by_lane[span.lane].append(span)
    first_row = 1
    for lane in (lane for lane in Lane if lane in by_lane):
        in_order = sorted(by_lane[lane], key=lambda span: (span.begin_s, span.end_s))
        times = [_nanoseconds(span, start_s) for span in in_order]
        rows = assign_rows(times)
        for row in range(max(rows) + 1):
            name = lane.value if row == 0 else f"{lane.value} ({row + 1})"
            yield _metadata("thread_name", first_row + row, name=name)
            yield _metadata(
                "thread_sort_index", first_row + row, sort_index=first_row + row
            )
        for span, (begin_ns, end_ns), row in zip(in_order, times, rows, strict=True):
            yield {
                "ph": "X",
                "pid": _PROCESS,
                "tid": first_row + row,
                "cat": lane.value,
                "name": span.name,
                "ts": begin_ns / _NS_PER_US,
                "dur": (end_ns - begin_ns) / _NS_PER_US,
                "args": _details(span),
            }
        first_row += max(rows) + 1


def assign_rows(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """A row for each interval such that none overlap in a row; as few rows as can be.

    Args:
        intervals: (begin, end), ordered by their begin; they may touch in a row.
    """
    rows: list[int] = []
    taken: list[tuple[int, int]] = []  # (end, row), the earliest end first
    free: list[int] = []
    for begin, end in intervals:
        while taken and taken[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(taken)[1])
        row = heapq.heappop(free) if free else len(taken)
        heapq.heappush(taken, (end, row))
        rows.append(row)
    return rows


def busy_s(
    intervals: Iterable[tuple[float, float]], begin_s: float, end_s: float
) -> float:
    """Seconds between `begin_s` and `end_s` that at least one interval covers.

    Args:
        intervals: (begin, end) in seconds, in any order; they may overlap.
        begin_s: where the window begins.
        end_s: where it ends.
    """
    total_s, covered_s = 0.0, begin_s
    for first_s, last_s in sorted(intervals):
        from_s, to_s = max(first_s, covered_s), min(last_s, end_s)
        if to_s > from_s:
            total_s += to_s - from_s
            covered_s = to_s
    return total_s


def _metadata(kind: str, row: int, **values: str | int) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": row, "name": kind, "args": values}


def _nanoseconds(span: Span, start_s: float) -> tuple[int, int]:
    begin_ns = round((span.begin_s - start_s) * _NS_PER_S)
    return begin_ns, round((span.end_s - start_s) * _NS_PER_S)


def _details(span: Span) -> dict[str, int | float]:
    if span.nbytes <= 0:
        return {}
    seconds = span.end_s - span.begin_s
    rate = {"GB/s": round(span.nbytes / seconds / 1e9, 3)} if seconds > 0 else {}
    return {"bytes": span.nbytes} | rate
