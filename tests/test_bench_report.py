import json
import math
import pathlib
import re
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("matplotlib")

from bench import report
from bench.report_figures import lines_by_rows, machine_figures, middle_window, timeline
from bench.report_files import machine_name, read_results
from bench.report_values import Comparison, Run
from flexjax.cli import BAD_INPUT, run_command
from flexjax.memory.lanes import Lane, Span
from flexjax.trace import write_trace

XEON = {
    "cpu": {"model": "Intel(R) Xeon(R) Processor @ 2.10GHz", "cores": 2},
    "memory_bytes": 25 * 10**9,
    "accelerator": None,
}
GPU = XEON | {"accelerator": {"model": "NVIDIA H200", "count": 1}}


def phase(seconds, bound_by):
    bound_s = {"compute": 0.1 * seconds, bound_by: 0.9 * seconds}
    return {
        "seconds": seconds,
        "bound_s": bound_s,
        "bound_by": bound_by,
        "fraction_of_bound": 0.9 if seconds else None,
    }


def run_result(case="case", batch_size=64, machine=XEON, **other):
    return {
        "case": case,
        "model": "facebook/opt-1.3b",
        "prompt_len": 128,
        "gen_len": 32,
        "policy": {
            "weights": {"device": 0.25, "host": 0.25},
            "kv_cache": {"device": 1.0},
            "activations": {"device": 1.0, "host": 0.0},
            "batch_size": batch_size,
            "num_batches": 2,
        },
        "tokens_per_s": 12.5 * batch_size,
        "prefill": phase(10.0, "matrix work"),
        "decode": phase(20.0, "disk read"),
        "step_s": [0.5, 0.6, 0.55],
        "peak_rss_bytes": 2_000_000_000,
        "memory_cap_bytes": None,
        "machine": machine,
    } | other


def comparison(cap_bytes=2 * 10**9, **other):
    def tried(size, tokens_per_s):
        setting = f"--batch-size {size} --layers disk"
        return {"setting": setting, "num_rows": size, "tokens_per_s": tokens_per_s}

    whole = {"projected": False}
    ours = {"name": "flexjax", "setting": "--batch-size 64", "tokens_per_s": 30.0}
    peer = {"name": "peer", "setting": "--batch-size 8", "tokens_per_s": 20.0}
    broken = {"name": "broken", "setting": "", "tokens_per_s": None, "tried": []}
    return {
        "model": "opt-1.3b",
        "prompt_len": 128,
        "gen_len": 32,
        "memory_cap_bytes": cap_bytes,
        "ratio": 1.5,
        "machine": XEON,
        "systems": [
            peer
            | {"projected": True}
            | {"tried": [tried(8, 20.0), tried(16, 19.0), tried(32, None)]},
            ours | whole | {"tried": [tried(64, 30.0)]},
            broken | whole,
        ],
    } | other


def copies():
    route = {"direction": "host to device", "route": "pageable"}
    return {
        "benchmark": "copy_routes",
        "machine": GPU,
        "routes": [
            route | {"nbytes": 4 << 20, "bytes_per_s": 10e9},
            route | {"nbytes": 8 << 20, "bytes_per_s": 12e9},
            route | {"route": "refused", "nbytes": 8 << 20, "error": "no"},
        ],
    }


def spans():
    for layer in range(20):
        begin_s = 50 + layer * 0.1
        yield Span(Lane.WEIGHTS, f"Load({layer})", begin_s, begin_s + 0.1, 10**8)
        yield Span(Lane.COMPUTE, f"layer {layer}", begin_s + 0.1, begin_s + 0.15)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Results of two machines and a trace."""
    for name, values in {
        "a": run_result("a"),
        "b": run_result("b", 32),
        "c": run_result("c", machine=GPU, note="half | of it", command="sh c.sh"),
        "one-token": run_result("one", decode=phase(0.0, "disk"), step_s=[]),
        "compare": comparison(),
        "compare-4": comparison(4 * 10**9),
        "copies": copies(),
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    write_trace(tmp_path / "a.trace.json", spans())
    return tmp_path


def make_report(*args: object) -> int:
    return run_command(report._main, report.build_parser(), list(map(str, args)))


def test_the_page_shows_every_result_and_only_figures_that_are_there(folder, capsys):
    assert make_report("--out", folder) == 0
    page = (folder / "README.md").read_text()
    shown = re.findall(r"^!\[.+\]\((.+)\)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.svg"))
    for name in shown:
        assert ET.parse(folder / name).getroot().tag.endswith("svg")
    assert page.index("## Intel Xeon, 2 cores, 23 GiB") < page.index("## NVIDIA H200")
    assert "| a | 800.0 | 0.90 (matrix work) | 0.90 (disk read) | 2.00 GB |" in page
    assert "`python -m bench.run a`" in page
    assert "| c: half \\| of it |" in page
    assert "`sh c.sh`" in page
    assert "| one | 800.0 | 0.90 (matrix work) | - |" in page
    assert (
        "peer 20.0 (--batch-size 8 (projected)); flexjax 30.0 (--batch-size 64) | 1.50"
        in page
    )
    kinds = {re.split("-(intel|nvidia|a.svg)", name)[0] for name in shown}
    assert kinds == {
        *("throughput-batch", "throughput-cap", "bounds", "comparison"),
        *("steps", "copies", "timeline"),
    }
    said = capsys.readouterr().out.splitlines()
    assert "left out, for want of results: Beside other systems: NVIDIA H200" in said
    assert len([line for line in said if line.startswith("left out")]) == 6


def test_the_same_results_make_the_same_bytes(folder):
    def made():
        assert make_report("--out", folder) == 0
        return {path.name: path.read_bytes() for path in folder.glob("*.svg")}

    once = made()
    assert made() == once
    assert all(len(svg) < 100_000 for svg in once.values())
    assert not any(b"<dc:date>" in svg for svg in once.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        (json.dumps(run_result(tokens_per_s=math.nan)), "NaN is no number"),
        ("[1]", "neither a trace nor a result"),
        ('{"other": 1}', "neither a trace nor a result"),
        ('{"tokens_per_s": 3}', "'policy' is missing"),
        ('{"traceEvents": [{"ph": "X"}]}', "'tid' is missing"),
        ('{"traceEvents": 5}', "damaged"),
        ('{"routes": [{}], "machine": {}}', "'cpu' is missing"),
        (json.dumps(run_result(decode={"seconds": 1})), "'bound_s' is missing"),
        (json.dumps(run_result(tokens_per_s=-1)), "-1 stands where a number above 0"),
        (json.dumps(run_result(step_s=["x"])), "could not convert"),
        (json.dumps(comparison(systems=[5])), "damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(folder, capsys, text, message):
    (folder / "bad.json").write_text(text)
    assert make_report("--out", folder) == BAD_INPUT
    error = capsys.readouterr().err
    assert "bad.json" in error
    assert message in error
    assert not list(folder.glob("*.svg"))


def test_files_may_be_named_and_the_page_go_elsewhere(folder, tmp_path):
    out = tmp_path / "new" / "page"
    assert make_report(folder / "c.json", "--out", out) == 0
    assert "| a |" not in (out / "README.md").read_text()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_not_there_is_said(tmp_path, capsys, what):
    missing = tmp_path / "missing"
    args = ["--out", missing] if what == "folder" else [missing / "x.json"]
    assert make_report(*args) == BAD_INPUT
    assert str(missing) in capsys.readouterr().err


def test_a_run_without_a_case_goes_by_its_files_name(folder):
    path = folder / "mine.json"
    path.write_text(json.dumps(run_result(case=None)))
    (run,) = read_results([path])
    assert isinstance(run, Run)
    assert run.case == "mine"
    assert run.placement == "weights device=0.25,host=0.25,disk=0.5"


def test_machines_have_short_names():
    assert machine_name(XEON) == "Intel Xeon, 2 cores, 23 GiB"
    less = "Intel Xeon without AVX-512"
    for more, name in (([], less), (["avx512f"], "Intel Xeon")):
        cpu = XEON["cpu"] | {"flags": ["avx2", *more]}
        assert machine_name(XEON | {"cpu": cpu}) == f"{name}, 2 cores, 23 GiB"
    two = GPU | {"accelerator": {"model": "NVIDIA H200", "count": 2}}
    assert machine_name(two) == "2 NVIDIA H200"


def test_lines_are_told_apart_by_what_differs(folder):
    results = read_results(sorted(folder.glob("*.json")))
    runs = [r for r in results if isinstance(r, Run)]
    comparisons = [r for r in results if isinstance(r, Comparison)]
    (alone,) = lines_by_rows(runs, [])
    assert alone.label == "opt-1.3b"
    assert sorted(alone.points) == [(64, 400.0), (128, 800.0)]
    labels = [line.label for line in lines_by_rows(runs, comparisons)]
    assert labels == [
        "opt-1.3b, flexjax, no memory cap, weights device=0.25,host=0.25,disk=0.5",
        "opt-1.3b, peer, cap 2 GB, layers disk",
        "opt-1.3b, peer, cap 4 GB, layers disk",
    ]


def test_without_results_every_figure_is_left_out():
    assert all(plot.svg is None for plot in machine_figures("none", []))


def test_a_timeline_shows_a_few_layers_amid_the_run(folder):
    (trace,) = read_results([folder / "a.trace.json"])
    begin_s, end_s = middle_window(trace)
    assert begin_s == pytest.approx(0.7)
    assert end_s == pytest.approx(1.5)
    assert timeline(trace, None).svg != timeline(trace, (0.0, 0.4)).svg


@pytest.mark.parametrize("number", [0, 3])
def test_a_short_trace_is_shown_whole(tmp_path, number):
    path = tmp_path / "short.json"
    write_trace(path, list(spans())[:number])
    (trace,) = read_results([path])
    assert middle_window(trace) == (0.0, pytest.approx(0.2 if number else 1.0))
    assert (timeline(trace, None).svg is None) == (number == 0)
