import json

import jax
import numpy as np
import pytest

from bench import copy_routes
from flexjax.cli import BAD_INPUT, run_command

DEVICE = jax.devices()[0]
HAS_OWN_MEMORY = DEVICE.platform != "cpu"
SIZES_BYTES = [4096, 1 << 16]


@pytest.fixture(scope="module")
def rows():
    return copy_routes.compare_routes(DEVICE, SIZES_BYTES, copy_routes.SOURCES)


def test_every_route_and_size_has_a_rate_or_an_error(rows):
    routes = len(copy_routes.SOURCES) + len(copy_routes.READS) + 1
    assert len(rows) == routes * len(SIZES_BYTES)
    assert len({(r["direction"], r["route"], r["nbytes"]) for r in rows}) == len(rows)
    for row in rows:
        assert ("error" in row) != ("bytes_per_s" in row), row
        if "error" not in row:
            assert 0 < row["bytes_per_s"] <= row["best_bytes_per_s"]
    json.dumps(rows)


def test_what_every_backend_has_is_measured(rows):
    measured = {(r["direction"], r["route"]) for r in rows if "error" not in r}
    assert measured >= {
        ("host to device", "pageable"),
        ("host to device", "pinned_host, kept"),
        ("host to host", "new pinned_host"),
        ("device to host", "numpy"),
        ("device to host", "pinned_host"),
    }


@pytest.mark.accelerator
@pytest.mark.skipif(not HAS_OWN_MEMORY, reason="a CPU maps no memory for DMA")
def test_an_accelerator_takes_memory_that_is_mapped_for_dma(rows):
    measured = {r["route"] for r in rows if "error" not in r}
    assert "dma_map" in measured


def test_a_route_that_is_refused_does_not_end_the_comparison(monkeypatch):
    def refuse(array):
        raise NotImplementedError("not\nhere")

    monkeypatch.setattr(copy_routes, "READS", {"none": refuse})
    *_, last = copy_routes.compare_routes(DEVICE, [4096])
    assert last["error"] == "NotImplementedError: not here"


def test_a_route_that_delivers_other_bytes_is_not_timed(monkeypatch):
    monkeypatch.setattr(copy_routes, "READS", {"bad": lambda x: np.asarray(x)[::-1]})
    *_, last = copy_routes.compare_routes(DEVICE, [4096])
    assert last["error"] == "ValueError: other bytes arrived than were sent"


@pytest.mark.skipif(HAS_OWN_MEMORY, reason="here there is something to compare")
def test_without_an_accelerator_there_is_nothing_to_compare(capsys, tmp_path):
    file = tmp_path / "routes.json"
    args = ["--json", str(file)]
    status = run_command(copy_routes._main, copy_routes.build_parser(), args)
    assert status == BAD_INPUT
    assert "nothing to compare" in capsys.readouterr().err
    assert not file.exists()
