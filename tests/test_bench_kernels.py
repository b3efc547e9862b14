import dataclasses
import json

import pytest

from bench import kernels
from bench.kernels import measure_kernels
from bench.report_files import read_results
from bench.report_values import Kernels
from flexjax.cli import run_command
from flexjax.kernels.products import PRODUCTS
from flexjax.models.config import OPTConfig

TINY = OPTConfig(
    vocab_size=11,
    hidden_size=8,
    num_attention_heads=2,
    ffn_dim=16,
    num_hidden_layers=1,
    max_position_embeddings=kernels.PROMPT_LEN,
)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr("flexjax.plan.step_rates.MOST_REPEATS", 1)
    monkeypatch.setattr(kernels, "MEMORY_BYTES", 1 << 16)
    monkeypatch.setattr(kernels, "PEAK_S", 1e-3)


def test_rates_are_work_over_time():
    rows = list(measure_kernels(TINY, batch_size=2))
    products = [row for row in rows if row["kernel"].startswith("product")]
    for count, row in zip(kernels.ROWS, products, strict=True):
        assert row["flops_per_s"] * row["seconds"] == pytest.approx(2 * count * 8 * 16)
        assert row["bytes_per_s"] * row["seconds"] == pytest.approx(2 * 8 * 16)
    rows = rows[len(products) :]
    if PRODUCTS.is_there():
        for dtype in ("bfloat16", "int8"):
            peak = rows.pop(0)
            assert peak["kernel"] == f"the instruction alone, {dtype}"
            assert peak["flops_per_s"] > max(row["flops_per_s"] for row in products)
    layer, memory, *rest = rows
    weights = 4 * 8 * 8 + 2 * 8 * 16
    flops = 2 * 2 * kernels.PROMPT_LEN * weights
    assert layer["flops_per_s"] * layer["seconds"] == pytest.approx(flops)
    nbytes = memory["bytes_per_s"] * memory["seconds"]
    assert nbytes == pytest.approx(kernels.MEMORY_BYTES)
    attention, widening = rest[:5], rest[5:]
    # Two heads of 4 elements, each with a scale and a minimum if quantized.
    for width, row in zip(
        (16, 32, 16, 2 * (2 + 4), 2 * (4 + 4)), attention, strict=True
    ):
        nbytes = 2 * 2 * kernels.PAST_SLOTS * width
        assert row["bytes_per_s"] * row["seconds"] == pytest.approx(nbytes)
    for bits, row in zip((4, 8), widening, strict=True):
        assert row["kernel"] == f"dequantization, {bits} bits"
        assert row["bytes_per_s"] * row["seconds"] == pytest.approx(2 * 8 * 16)


def test_what_is_written_is_what_the_report_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "named_config", lambda name: TINY)
    path = tmp_path / "kernels.json"
    argv = ["tiny", "--json", str(path)]
    assert run_command(kernels._main, kernels.build_parser(), argv) == 0
    printed = capsys.readouterr().out
    (result,) = read_results([path])
    assert isinstance(result, Kernels)
    assert len(result.rates) == len(json.loads(path.read_text())["kernels"])
    assert all(rate.kernel in printed for rate in result.rates)


def test_an_unknown_model_is_refused(capsys):
    assert run_command(kernels._main, kernels.build_parser(), ["opt-9000b"]) == 2
    assert "opt-9000b" in capsys.readouterr().err


@pytest.mark.skipif(
    not PRODUCTS.is_there(), reason="no processor for the kernel, or no compiler"
)
def test_quantized_products_are_measured_where_there_is_a_kernel():
    wider = dataclasses.replace(TINY, hidden_size=128, ffn_dim=256)
    rows = [
        row
        for row in measure_kernels(wider, batch_size=2)
        if row["kernel"].startswith("product") and "bits" in row["kernel"]
    ]
    assert len(rows) == 4 * len(kernels.ROWS)
    assert sum("rows in 8" in row["kernel"] for row in rows) == 2 * len(kernels.ROWS)
    for count, row in zip(4 * kernels.ROWS, rows, strict=True):
        flops = row["flops_per_s"] * row["seconds"]
        assert flops == pytest.approx(2 * count * 128 * 256)
    four, eight = (rows[at]["bytes_per_s"] * rows[at]["seconds"] for at in (0, -1))
    assert four == pytest.approx(256 * (64 + 8))
    assert eight == pytest.approx(256 * (128 + 8))
