import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from flexjax.memory.lanes import Lane, Span
from flexjax.trace import assign_rows, busy_s, write_trace

TIMES_S = st.integers(0, 40).map(lambda tick: 1000.0 + tick * 0.00137)


@st.composite
def drawn_spans(draw) -> list[Span]:
    def span(lane, one_s, other_s, nbytes):
        return Span(
            lane, f"{lane.value} work", min(one_s, other_s), max(one_s, other_s), nbytes
        )

    parts = (st.sampled_from(Lane), TIMES_S, TIMES_S, st.integers(0, 10**9))
    return draw(st.lists(st.builds(span, *parts), max_size=30))


def written(path, spans) -> list[dict]:
    write_trace(path, spans)
    return json.loads(path.read_text())["traceEvents"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("trace") / "trace.json"


@hypothesis.given(drawn_spans())
def test_every_span_is_an_event_in_a_named_row_and_rows_do_not_overlap(path, spans):
    events = written(path, spans)
    work = [event for event in events if event["ph"] == "X"]
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    assert sorted((s.lane.value, s.name) for s in spans) == sorted(
        (event["cat"], event["name"]) for event in work
    )
    ends_ns: dict[int, int] = {}
    for event in work:
        assert names[event["tid"]].startswith(event["cat"])
        assert {type(event["ts"]), type(event["dur"])} == {float}
        begin_ns, long_ns = round(event["ts"] * 1000), round(event["dur"] * 1000)
        assert begin_ns >= ends_ns.get(event["tid"], 0)
        assert long_ns >= 0
        ends_ns[event["tid"]] = begin_ns + long_ns
    assert min((event["ts"] for event in work), default=0) == 0


@hypothesis.given(drawn_spans())
def test_rows_come_in_the_order_of_the_lanes(path, spans):
    rows = [e for e in written(path, spans) if e["name"] == "thread_sort_index"]
    assert [row["tid"] for row in rows] == [row["args"]["sort_index"] for row in rows]
    assert [row["tid"] for row in rows] == list(range(1, len(rows) + 1))


def test_what_is_in_flight_at_once_gets_rows_of_its_own(path):
    lane = Lane.WEIGHTS
    spans = [Span(lane, "a", 5.0, 7.0), Span(lane, "b", 6.0, 8.0)]
    spans.append(Span(lane, "c", 7.0, 9.0))  # begins where `a` ends
    events = written(path, spans)
    rows = {e["name"]: e["tid"] for e in events if e["ph"] == "X"}
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {span: names[row] for span, row in rows.items()} == {
        "a": "weights in",
        "b": "weights in (2)",
        "c": "weights in",
    }


def test_a_transfer_tells_its_rate(path):
    spans = [
        Span(Lane.WEIGHTS, "fast", 10.0, 10.5, 1_000_000_000),
        Span(Lane.WEIGHTS, "instant", 11.0, 11.0, 10),
        Span(Lane.COMPUTE, "no transfer", 10.0, 12.0),
    ]
    events = written(path, spans)
    assert {e["name"]: e["args"] for e in events if e["ph"] == "X"} == {
        "fast": {"bytes": 1_000_000_000, "GB/s": 2.0},
        "instant": {"bytes": 10},
        "no transfer": {},
    }
    (fast,) = [event for event in events if event["name"] == "fast"]
    assert (fast["ts"], fast["dur"]) == (0.0, 500_000.0)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot write .*missing/trace.json"):
        write_trace(tmp_path / "missing" / "trace.json", [])
    assert not list(tmp_path.iterdir())


INTERVALS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda x: (x[0], sum(x))),
    max_size=20,
)


@hypothesis.given(INTERVALS)
def test_no_more_rows_than_intervals_are_ever_open_at_once(intervals):
    intervals = sorted(i for i in intervals if i[0] < i[1])
    open_at_once = max(
        (
            sum(begin <= moment < end for begin, end in intervals)
            for moment, _ in intervals
        ),
        default=0,
    )
    assert len(set(assign_rows(intervals))) == open_at_once


@hypothesis.given(INTERVALS, st.integers(0, 40), st.integers(0, 40))
def test_busy_time_is_counted_once_and_inside_the_window(intervals, one, other):
    first, last = min(one, other), max(one, other)
    covered = {tick for begin, end in intervals for tick in range(begin, end)}
    expected = len(covered & set(range(first, last)))
    assert math.isclose(busy_s(intervals, first, last), expected)
