import pathlib

import pytest

from flexjax.memory import disk_queue
from flexjax.plan import scratch
from tests.common import flexjax_threads

PIECE_BYTES = 4096
MOST_PARTS = 4


@pytest.fixture
def small_scratch(monkeypatch):
    """A scratch file of a few pieces."""
    monkeypatch.setattr(disk_queue, "REQUEST_BYTES", PIECE_BYTES)
    for name, value in {
        "SCRATCH_BYTES": MOST_PARTS * 2 * PIECE_BYTES,
        "PART_BYTES": 2 * PIECE_BYTES,
        "BUFFER_BYTES": 4 * PIECE_BYTES,
        "PARTS_AHEAD": 2,
    }.items():
        monkeypatch.setattr(scratch, name, value)


def assert_nothing_is_left(folder: pathlib.Path) -> None:
    assert list(folder.iterdir()) == []
    assert not flexjax_threads()
