"""What can go wrong with a tensor's files."""

import pathlib
import shutil

import numpy as np
import pytest

from flexjax.checkpoint import open_store
from flexjax.policy import Tier
from flexjax.store_format import chunk_path
from tests.common import LINKS
from tests.memory.placed_weights import CONFIGS, TABLE, Placed


@pytest.fixture(params=CONFIGS)
def harmed(request, stores, tmp_path):
    """A copy of a store that a test may harm."""
    return shutil.copytree(stores[request.param][0], tmp_path / "store")


def chunk_of(folder: pathlib.Path, name: str, row: int) -> pathlib.Path:
    entry = open_store(folder).tensors[name]
    return chunk_path(folder, name, entry, row // entry.chunk_rows)


def alter(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
def test_an_altered_tensor_is_found_when_it_is_read_at_the_start(harmed, tier):
    alter(chunk_of(harmed, "layers.1.fc1.weight", 47))
    with pytest.raises(ValueError, match=r"'layers\.1\.fc1\.weight' .* was altered"):
        Placed(harmed, tier)


@pytest.mark.parametrize("link_type", LINKS)
def test_an_altered_tensor_is_found_at_its_first_load_and_at_every_other(
    harmed, link_type
):
    path = chunk_of(harmed, "layers.1.fc1.weight", 47)
    whole = path.read_bytes()
    alter(path)
    with Placed(harmed, Tier.DISK, link_type=link_type) as placed:
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"'layers\.1\.fc1\.weight' .* altered"
            ):
                placed.load(1)
        path.write_bytes(whole)
        for loan in placed.load(1).values():
            loan.release()


def test_an_altered_block_of_the_head_is_found_when_it_is_read(harmed):
    table = open_store(harmed).config.head_table
    alter(chunk_of(harmed, table, 66))
    with Placed(harmed, Tier.DISK, blocks=3) as placed:
        for loan in placed.load(2).values():
            loan.release()
        with pytest.raises(ValueError, match=rf"'{table}' .* altered"):
            placed.load(4)


@pytest.mark.parametrize("harmed", ["untied"], indirect=True)
def test_altered_token_rows_are_found_although_no_head_reads_them(harmed):
    """A tied table is verified by the head, which reads all of it."""
    alter(chunk_of(harmed, TABLE, 66))
    with Placed(harmed, Tier.DISK) as placed:
        placed.weights.token_rows(np.array([[0, 1, 2]])).release()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"'{TABLE}' .* altered"):
                placed.weights.token_rows(np.array([[0, 66]]))


@pytest.mark.parametrize("harm", ["truncated", "deleted"])
@pytest.mark.parametrize("link_type", LINKS)
def test_a_chunk_that_goes_while_it_is_used_is_an_error_that_names_it(
    harmed, harm, link_type
):
    name = "layers.0.fc2.weight"
    path = chunk_of(harmed, name, 15)
    whole = path.read_bytes()
    with Placed(harmed, Tier.DISK, link_type=link_type, parts=2) as placed:
        parts = [placed.load(0, part) for part in range(2)]
        (part,) = [i for i in range(2) if name in parts[i]]
        for loans in parts:
            for loan in loans.values():
                loan.release()
        path.write_bytes(whole[:-3]) if harm == "truncated" else path.unlink()
        with pytest.raises(OSError, match=rf"'{name}' of {harmed}"):
            placed.load(0, part)
        path.write_bytes(whole)
        for loan in placed.load(0, part).values():
            loan.release()


@pytest.mark.parametrize("harm", ["truncated", "deleted"])
def test_a_table_that_goes_while_it_is_used_is_an_error_that_names_it(harmed, harm):
    path = chunk_of(harmed, TABLE, 66)
    with Placed(harmed, Tier.DISK) as placed:
        path.write_bytes(b"x") if harm == "truncated" else path.unlink()
        with pytest.raises(OSError, match=str(path)):
            placed.weights.token_rows(np.array([[66]]))
