import dataclasses
import pathlib
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.checkpoint import open_store
from flexjax.extents import read_extent
from flexjax.memory import weights as memory_weights
from flexjax.memory.lanes import Lane
from flexjax.memory.layout import HeadBlocks, WeightLayout
from flexjax.memory.link import DeviceLink
from flexjax.memory.processor import Processor
from flexjax.memory.weights import PlacedWeights
from flexjax.models.config import OPTConfig, layer_tensors, tensor_shapes
from flexjax.policy import Kind, Tier
from flexjax.store_format import chunk_path
from tests.common import (
    LINKS,
    ApartLink,
    assert_nothing_held,
    in_time,
    make_transport,
    poison_buffers,
    random_tensors,
    write_store,
)

TIED = OPTConfig(
    vocab_size=67,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=48,
    max_position_embeddings=20,
    word_embed_proj_dim=8,
    do_layer_norm_before=False,
)
UNTIED = dataclasses.replace(
    TIED, word_embed_proj_dim=16, tie_word_embeddings=False, do_layer_norm_before=True
)
CONFIGS = {"tied": TIED, "untied": UNTIED}
TABLE, HEAD = "embed_tokens.weight", "lm_head.weight"
DTYPE = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of every config; and its tensors."""
    tensors = {name: random_tensors(config, DTYPE) for name, config in CONFIGS.items()}
    parent = tmp_path_factory.mktemp("stores")
    return {
        name: (write_store(parent / name, config, tensors[name]), tensors[name])
        for name, config in CONFIGS.items()
    }


class Placed:
    """Weights under some tiers, and everything around them."""

    def __init__(self, folder, tiers, *, link_type=DeviceLink, parts=1, blocks=1):
        self.transport = make_transport(link_type)
        self.ledger = self.transport.ledger
        store = open_store(folder)
        self.config = store.config
        rows = -(-self.config.vocab_size // blocks)
        try:
            self.weights = PlacedWeights(
                store,
                WeightLayout(
                    config=store.config,
                    dtype=store.dtype,
                    tensors=store.tensors,
                    tiers=tiers
                    if isinstance(tiers, dict)
                    else dict.fromkeys(store.tensors, tiers),
                    head=HeadBlocks(blocks, rows),
                    num_parts=parts,
                    processor=Processor(is_host=self.transport.link.is_shared),
                ),
                transport=self.transport,
            )
        except BaseException:
            in_time(self.transport.close)
            raise
        self.home = self.held()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        in_time(self.transport.lanes.drain)
        self.weights.close()
        in_time(self.transport.close)
        assert_nothing_held(self.ledger)

    def held(self) -> dict[Tier, int]:
        return {tier: self.ledger.held(tier, Kind.WEIGHTS) for tier in Tier}

    def load(self, layer: int, part: int = 0):
        return in_time(self.weights.load(layer, part).result)


def mixes(config: OPTConfig) -> st.SearchStrategy[dict[str, Tier]]:
    return st.fixed_dictionaries(
        {name: st.sampled_from(Tier) for name in tensor_shapes(config)}
    )


@pytest.mark.parametrize("link_type", LINKS)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8)
@given(st.data())
def test_every_mix_of_tiers_gives_the_tensors_of_the_store(
    stores, name, link_type, data
):
    folder, tensors = stores[name]
    config = CONFIGS[name]
    tiers = data.draw(mixes(config))
    parts, blocks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    with pytest.MonkeyPatch.context() as patch:
        poison_buffers(patch)
        options = {"link_type": link_type, "parts": parts, "blocks": blocks}
        with Placed(folder, tiers, **options) as placed:
            for layer in range(config.num_hidden_layers):
                loans = {}
                for part in range(parts):
                    part_loans = placed.load(layer, part)
                    assert not loans.keys() & part_loans.keys()
                    loans |= part_loans
                assert sorted(loans) == sorted(layer_tensors(config, layer))
                for tensor, loan in loans.items():
                    found = np.asarray(loan.array)
                    assert found.tobytes() == tensors[tensor].tobytes(), tensor
                    loan.release()
            rows = []
            for block in range(blocks):
                layer = config.num_hidden_layers + block
                loans = placed.load(layer)
                rows.append(np.array(loans[config.head_table].array))
                for part in range(1, parts):
                    assert placed.load(layer, part) == {}
                for loan in loans.values():
                    loan.release()
            table = np.concatenate(rows)
            assert table.tobytes() == tensors[config.head_table].tobytes()
            placed.weights.clear()
            assert placed.held() == placed.home


@pytest.mark.parametrize("vocab_size", [1, 7, 67])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_head_blocks_cover_the_table_once(vocab_size, rows):
    head = HeadBlocks(-(-vocab_size // rows), rows)
    covered = [
        row
        for block in range(head.num_blocks)
        for row in range(vocab_size)[head.span(block, vocab_size)]
    ]
    assert covered == list(range(vocab_size))


@pytest.mark.parametrize("link_type", LINKS)
@settings(max_examples=10)
@given(st.data())
def test_staged_bytes_are_what_a_load_takes(stores, link_type, data):
    folder, _ = stores["untied"]
    tiers = data.draw(mixes(UNTIED))
    parts = data.draw(st.integers(1, 3))
    with Placed(folder, tiers, link_type=link_type, parts=parts, blocks=3) as placed:
        for layer in range(UNTIED.num_hidden_layers + 3):
            for part in range(parts):
                loans = placed.load(layer, part)
                staged = placed.weights.layout.staged_bytes(layer, part)
                for tier, home in placed.home.items():
                    expected = staged.get((tier, Kind.WEIGHTS), 0)
                    assert placed.held()[tier] - home == expected, (layer, part, tier)
                for loan in loans.values():
                    loan.release()
                placed.weights.clear()
        assert placed.weights.layout.home_bytes() == {
            tier: sum(
                open_store(folder).tensors[tensor].nbytes
                for tensor, where in tiers.items()
                if where is tier
            )
            for tier in Tier
        }


@pytest.mark.parametrize("link_type", LINKS)
@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("name", CONFIGS)
def test_token_rows_are_rows_of_the_table(stores, name, tier, link_type):
    folder, tensors = stores[name]
    ids = np.array([[0, 66, 5], [5, 1, 30]], np.int32)
    with Placed(folder, tier, link_type=link_type) as placed:
        loan = placed.weights.token_rows(ids)
        assert np.array_equal(loan.array, tensors[TABLE][ids])
        loan.release()
        placed.weights.clear()
        for other in Tier:
            assert placed.ledger.held(other, Kind.ACTIVATIONS) == 0


def test_what_is_read_is_counted_once(stores):
    folder, tensors = stores["untied"]
    with Placed(folder, Tier.DISK) as placed:
        placed.weights.token_rows(np.array([[3, 3, 4]], np.int32)).release()
        moved = placed.ledger.moved()
        assert sum(moved.values()) == 2 * tensors[TABLE][0].nbytes
        placed.ledger.start()
        for loan in placed.load(1).values():
            loan.release()
        layer = sum(tensors[name].nbytes for name in layer_tensors(UNTIED, 1))
        assert sum(placed.ledger.moved().values()) == layer


def test_what_lies_on_disk_is_asked_for_whatever_the_lane_waits_for(
    stores, monkeypatch
):
    folder, tensors = stores["untied"]
    go, read = threading.Event(), threading.Semaphore(0)

    def count(extent) -> None:
        read_extent(extent)
        read.release()

    monkeypatch.setattr(memory_weights, "read_extent", count)
    with Placed(folder, Tier.DISK) as placed:
        placed.transport.lanes.submit(Lane.WEIGHTS, go.wait, 60)
        loads = [placed.weights.load(layer, 0) for layer in range(3)]
        chunks = sum(
            open_store(folder).tensors[name].num_chunks
            for name in tensors
            if name.startswith("layers.") or name == HEAD
        )
        for _ in range(chunks):
            assert read.acquire(timeout=60)
        assert not any(load.done() for load in loads)
        go.set()
        for load in loads:
            for name, loan in in_time(load.result).items():
                assert np.asarray(loan.array).tobytes() == tensors[name].tobytes()
                loan.release()


# What can go wrong with a tensor's files.


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


def test_an_upload_that_fails_gives_everything_back(stores, monkeypatch):
    folder, _ = stores["untied"]

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with Placed(folder, Tier.DISK, link_type=ApartLink) as placed:
        monkeypatch.setattr(jax, "device_put", fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="EXHAUSTED"):
            placed.load(1)
        placed.weights.clear()
        assert placed.held() == placed.home
