import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax.checkpoint import open_store
from flexjax.extents import read_extent
from flexjax.memory import weights as memory_weights
from flexjax.memory.head_blocks import HeadBlocks
from flexjax.memory.lanes import Lane
from flexjax.models.config import OPTConfig, layer_tensors, tensor_shapes
from flexjax.policy import Kind, Tier
from tests.common import LINKS, ApartLink, in_time, poison_buffers
from tests.memory.placed_weights import CONFIGS, HEAD, TABLE, UNTIED, Placed


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
        assert placed.weights.layout.home_bytes == {
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
