"""Laws of the rounding rules: placement is true, and true everywhere."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.memory.placement import (
    Rows,
    effective,
    partition,
    place_rows,
    place_tensors,
)
from flexjax.models.config import MODELS, OPTConfig, tensor_shapes
from flexjax.policy import Placement, Tier

TINY = OPTConfig(
    vocab_size=97,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=50,
)
PROJECTED = OPTConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=7,
    ffn_dim=64,
    word_embed_proj_dim=8,
    enable_bias=False,
    tie_word_embeddings=False,
)

fractions = st.floats(0.0, 1.0)
configs = st.sampled_from([TINY, PROJECTED, MODELS["opt-125m"], MODELS["opt-30b"]])


@st.composite
def placements(draw):
    device = draw(
        fractions | st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0])
    )
    host = draw(st.floats(0.0, 1.0) | st.just(1.0)) * (1.0 - device)
    return Placement(device=device, host=host)


def sizes(config):
    return {name: 2 * math.prod(shape) for name, shape in tensor_shapes(config).items()}


def on(tier, tiers):
    return {name for name, where in tiers.items() if where is tier}


def per_layer(config, nbytes, names):
    """Bytes of `names` in each decoder layer."""
    return [
        sum(nbytes[name] for name in names if name.startswith(f"layers.{layer}."))
        for layer in range(config.num_hidden_layers)
    ]


@given(config=configs, placement=placements())
def test_the_effective_placement_is_the_requested_one_to_within_a_tensor(
    config, placement
):
    nbytes = sizes(config)
    held = effective(nbytes, place_tensors(placement, nbytes))
    total, largest = sum(nbytes.values()), max(nbytes.values())
    assert sum(held.values()) == total
    for tier in Tier:
        off = abs(held[tier] - placement.fraction(tier) * total)
        assert off <= largest * (1 + 1e-6)
    assert abs(held[Tier.DEVICE] - placement.device * total) <= largest / 2 * (1 + 1e-6)


@given(placement=placements())
def test_in_a_large_model_it_is_within_one_percent(placement):
    nbytes = sizes(MODELS["opt-30b"])
    held = effective(nbytes, place_tensors(placement, nbytes))
    for tier in Tier:
        share = held[tier] / sum(nbytes.values())
        assert share == pytest.approx(placement.fraction(tier), abs=0.01)


def test_flexgens_own_example_means_what_it_says():
    """`--percent 20 80`, which FlexGen took for 8 % on the device."""
    nbytes = sizes(MODELS["opt-6.7b"])
    held = effective(nbytes, place_tensors(Placement(device=0.2, host=0.8), nbytes))
    assert held[Tier.DEVICE] / sum(nbytes.values()) == pytest.approx(0.2, abs=0.01)
    assert held[Tier.DISK] == 0


@pytest.mark.parametrize("tier", Tier)
@given(config=configs)
def test_all_on_one_tier_is_all_of_it(tier, config):
    placement = {
        Tier.DEVICE: Placement(device=1.0),
        Tier.HOST: Placement(host=1.0),
        Tier.DISK: Placement(),
    }[tier]
    assert set(place_tensors(placement, sizes(config)).values()) == {tier}


@given(device=fractions)
def test_device_and_host_that_sum_to_one_leave_the_disk_empty(device):
    nbytes = sizes(TINY)
    tiers = place_tensors(Placement(device=device, host=1.0 - device), nbytes)
    assert not on(Tier.DISK, tiers)


@given(config=configs, devices=st.tuples(fractions, fractions), share=fractions)
def test_what_a_smaller_request_keeps_near_a_larger_one_keeps_too(
    config, devices, share
):
    nbytes = sizes(config)
    less, more = (
        place_tensors(Placement(device=device, host=(1 - device) * share), nbytes)
        for device in sorted(devices)
    )
    assert on(Tier.DEVICE, less) <= on(Tier.DEVICE, more)
    assert on(Tier.DISK, more) <= on(Tier.DISK, less)


@given(config=configs, placement=placements())
def test_layers_differ_by_one_tensor_of_a_size_at_most(config, placement):
    """So what is streamed is about the same in every layer; the host has two ends."""
    nbytes = sizes(config)
    tiers = place_tensors(placement, nbytes)
    first, last = 1, config.num_hidden_layers - 1  # these have the embedding, the norm
    for tier in Tier:
        names = on(tier, tiers)
        for size in {nbytes[name] for name in nbytes if name.startswith("layers.")}:
            of_size = {name for name in names if nbytes[name] == size}
            held = per_layer(config, nbytes, of_size)[first:last]
            assert max(held) - min(held) <= (2 if tier is Tier.HOST else 1) * size


@given(device=fractions, start=st.integers(0, 95), length=st.integers(1, 96))
def test_any_stretch_of_layers_holds_its_share(device, start, length):
    config = MODELS["opt-175b"]
    nbytes = sizes(config)
    tiers = place_tensors(Placement(device=device, host=1 - device), nbytes)
    held = per_layer(config, nbytes, on(Tier.DEVICE, tiers))
    stretch = held[start : start + length]
    one = nbytes["layers.0.fc1.weight"]
    assert abs(sum(stretch) - len(stretch) * sum(held) / len(held)) <= 3 * one


def test_half_of_a_tensor_in_every_layer_is_every_other_layer():
    nbytes = {f"layers.{layer}.fc1.weight": 4 for layer in range(8)}
    tiers = place_tensors(Placement(device=0.5, host=0.5), nbytes)
    even = {f"layers.{layer}.fc1.weight" for layer in range(0, 8, 2)}
    assert on(Tier.DEVICE, tiers) == even


@given(placement=placements(), batch_size=st.integers(1, 70), count=st.integers(1, 40))
def test_rows_of_every_prefix_are_the_nearest_to_their_share(
    placement, batch_size, count
):
    sums = [0, 0, 0]
    for index in range(count):
        rows = place_rows(placement, batch_size, index)
        assert min(rows) >= 0
        assert sum(rows) == batch_size
        sums = [total + row for total, row in zip(sums, rows, strict=True)]
        in_all = (index + 1) * batch_size
        assert abs(sums[0] - placement.device * in_all) <= 0.5 + 1e-6
        assert abs(sums[1] - placement.host * in_all) <= 1 + 1e-6
        assert abs(sums[2] - placement.disk * in_all) <= 1 + 1e-6


@given(device=fractions, batch_size=st.integers(1, 70), index=st.integers(0, 40))
def test_rows_never_go_where_nothing_was_asked_for(device, batch_size, index):
    host = Placement(device=device, host=1.0 - device)
    assert place_rows(host, batch_size, index).disk == 0
    assert place_rows(Placement(device=device), batch_size, index).host == 0
    assert place_rows(Placement(host=device), batch_size, index).device == 0


def test_what_is_left_over_is_carried_from_batch_to_batch():
    half = Placement(device=0.5, host=0.25)
    rows = [place_rows(half, 1, index) for index in range(4)]
    assert rows == [(1, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1)]
    assert place_rows(half, 8, 0) == (4, 2, 2)


@given(rows=st.builds(Rows, *[st.integers(0, 9)] * 3))
def test_spans_cut_the_batch_without_gaps_fastest_tier_first(rows):
    spans = rows.spans()
    assert [tier for tier in Tier if tier in spans] == list(spans)
    batch = list(range(sum(rows)))
    assert [row for span in spans.values() for row in batch[span]] == batch
    for tier, count in zip(Tier, rows, strict=True):
        assert len(batch[spans.get(tier, slice(0))]) == count


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=20),
    num_parts=st.integers(1, 8),
)
def test_parts_hold_every_tensor_once_in_order_and_about_as_much_each(sizes, num_parts):
    nbytes = {f"t{i}": size for i, size in enumerate(sizes)}
    parts = partition(nbytes, num_parts)
    assert len(parts) == num_parts
    assert [name for part in parts for name in part] == list(nbytes)
    for part in parts:
        held = sum(nbytes[name] for name in part)
        assert abs(held - sum(sizes) / num_parts) <= max(sizes) * (1 + 1e-6)


@pytest.mark.parametrize("near", [Tier.DEVICE, Tier.HOST])
@given(config=configs, placement=placements(), least=st.integers(0, 1 << 14))
def test_what_is_too_small_to_be_sent_stays_near(near, config, placement, least):
    nbytes = sizes(config)
    plain = place_tensors(placement, nbytes)
    tiers = place_tensors(placement, nbytes, small_bytes=least, small_tier=near)
    order = list(Tier)
    for name, tier in plain.items():
        is_kept = order.index(tier) <= order.index(near) or nbytes[name] >= least
        assert tiers[name] is (tier if is_kept else near)
