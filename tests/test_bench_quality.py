import pytest

from bench import quality
from bench.quality import SETTINGS, measure_quality, table
from bench.synthetic import weights_folder
from flexjax.cli import run_command
from flexjax.kernels.products import PRODUCTS
from tests.cells import RUNS_ALL


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    assert weights_folder(None) is None  # the embedded model: nothing to make


def test_outliers_change_nothing_in_16_bits_and_something_in_fewer(monkeypatch):
    monkeypatch.setattr(quality, "SETTINGS", SETTINGS[:1])
    (straight,) = measure_quality(most_windows=2)
    monkeypatch.setattr(quality, "SETTINGS", (*SETTINGS[:1], (4, None, None, 1.0)))
    plain, four = measure_quality(most_windows=2, outliers=32.0)
    assert plain["perplexity"] == pytest.approx(straight["perplexity"], rel=1e-4)
    assert abs(four["increase"]) > 0.01


@pytest.mark.parametrize("outliers", [0, -1, "nan", "inf"])
def test_outliers_that_are_none_are_refused(outliers, capsys):
    words = ["--outliers", str(outliers)]
    assert run_command(quality._main, quality.build_parser(), words) == 2
    assert "expected more than 0" in capsys.readouterr().err


# What is promised is said of these.
SOME_SETTINGS = tuple(SETTINGS[at] for at in (0, 3, 8, 9, 10))


def test_quality_is_measured_in_every_setting_and_costs_what_was_promised(monkeypatch):
    wanted = SETTINGS if RUNS_ALL else SOME_SETTINGS
    monkeypatch.setattr(quality, "SETTINGS", wanted)
    rows = [*measure_quality(most_windows=2)]
    names = "weight_bits", "kv_cache_bits", "activation_bits", "attention_sparsity"
    found = {tuple(row[name] for name in names): row for row in rows}
    can_round = PRODUCTS.is_there()
    settings = [setting for setting in wanted if can_round or setting[2] is None]
    assert list(found) == settings
    plain = found[None, None, None, 1.0]
    assert plain["increase"] == 0
    assert plain["top_1_agreement"] == 1
    assert plain["bits_per_matrix_element"] == pytest.approx(16, rel=0.05)
    for row in rows:
        behind_prompts = 0.75 if row["attention_sparsity"] < 1 else 1
        expected = plain["tokens"] * behind_prompts
        assert row["tokens"] == pytest.approx(expected, rel=0.01)
    for (weights, cache, _, sparsity), row in found.items():
        narrowest = min(weights or 16, cache or 16)
        most = 0.03 if sparsity < 1 else {4: 0.02, 8: 0.002, 16: 0}[narrowest]
        assert abs(row["increase"]) <= most
    agreements = [found[8, 8, None, 1.0], found[4, 4, None, 1.0]]
    eight, four = (row["top_1_agreement"] for row in agreements)
    assert eight > four > 0.8
    lines = table(rows).splitlines()
    assert len(lines) == len(settings) + 1
