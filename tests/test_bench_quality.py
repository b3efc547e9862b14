import pytest

from bench.quality import SETTINGS, measure_quality, table
from bench.synthetic import weights_folder


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    assert weights_folder(None) is None  # the embedded model: nothing to make
    return [*measure_quality(most_windows=2)]


def test_quality_is_measured_in_every_setting_and_costs_what_was_promised(rows):
    found = {(row["weight_bits"], row["kv_cache_bits"]): row for row in rows}
    assert list(found) == list(SETTINGS)
    plain = found[None, None]
    assert plain["increase"] == 0
    assert plain["top_1_agreement"] == 1
    assert plain["bits_per_matrix_element"] == pytest.approx(16, rel=0.05)
    assert all(row["tokens"] == plain["tokens"] > 0 for row in rows)
    assert abs(found[8, 8]["increase"]) <= 0.002
    assert abs(found[4, 4]["increase"]) <= 0.02
    assert found[8, 8]["top_1_agreement"] > found[4, 4]["top_1_agreement"] > 0.8
    lines = table(rows).splitlines()
    assert len(lines) == len(SETTINGS) + 1
