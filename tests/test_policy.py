"""A policy is an immutable pytree, its JSON says the same, and bad ones are refused."""

import dataclasses
import json
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.policy import (
    Kind,
    Placement,
    Policy,
    Schedule,
    Tier,
    from_json,
    parse_placement,
    read_policy,
    to_json,
    validate,
)

fractions = st.floats(0.0, 1.0)
placements = st.tuples(fractions, fractions).map(
    lambda pair: Placement(device=pair[0], host=(1.0 - pair[0]) * pair[1])
)
policies = st.builds(
    Policy,
    weights=placements,
    kv_cache=placements,
    activations=placements,
    batch_size=st.integers(1, 1000),
    num_batches=st.integers(1, 100),
    schedule=st.sampled_from(Schedule),
)


@given(policies)
def test_a_policy_survives_json(policy):
    assert from_json(json.loads(json.dumps(to_json(policy)))) == policy


@given(policies)
def test_a_policy_survives_its_file(tmp_path_factory, policy):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    path.write_text(json.dumps(to_json(policy)))
    assert read_policy(path) == policy


def test_what_a_file_leaves_out_is_the_default():
    assert from_json({}) == Policy()
    assert from_json({"weights": {"host": 1}}) == Policy(weights=Placement(host=1))
    assert from_json({"weights": {}}).weights == Placement()
    assert from_json({"schedule": "serial"}).schedule is Schedule.SERIAL


@given(policies)
def test_the_leaves_are_the_six_fractions(policy):
    leaves = jax.tree.leaves(policy)
    assert leaves == [
        policy.placement(kind).fraction(tier)
        for kind in Kind
        for tier in (Tier.DEVICE, Tier.HOST)
    ]
    assert len(leaves) == 6


@given(policies)
def test_flattening_and_unflattening_is_the_identity(policy):
    leaves, structure = jax.tree.flatten(policy)
    assert jax.tree.unflatten(structure, leaves) == policy
    assert jax.tree.map(lambda leaf: leaf, policy) == policy


def test_everything_but_the_fractions_is_structure():
    structure = jax.tree.structure(Policy())
    moved = Policy(weights=Placement(host=0.5), kv_cache=Placement(device=0.25))
    assert jax.tree.structure(moved) == structure
    assert jax.tree.structure(Policy(batch_size=3)) != structure
    assert jax.tree.structure(Policy(schedule=Schedule.SERIAL)) != structure


def test_a_policy_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().batch_size = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().weights.device = 0.5


@given(placements)
def test_the_tiers_of_a_placement_hold_all_of_it(placement):
    shares = [placement.fraction(tier) for tier in Tier]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares) >= 0.0


@given(policies)
def test_a_valid_policy_is_returned_as_it_is(policy):
    assert validate(policy) == policy
    assert policy.block_size == policy.batch_size * policy.num_batches


def test_a_schedule_may_be_given_by_its_name():
    policy = validate(Policy(schedule="row_by_row"))
    assert policy.schedule is Schedule.ROW_BY_ROW


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
@pytest.mark.parametrize(
    "fraction", [-0.01, 1.01, 20, math.nan, math.inf, -math.inf, "0.5", None, True]
)
def test_what_is_no_fraction_is_refused(kind, tier, fraction):
    placement = Placement(**{tier.value: fraction})
    message = (
        f"^{kind.value}: the fraction on {tier.value} is {fraction!r}, "
        "expected a number between 0 and 1$"
    )
    with pytest.raises(ValueError, match=message):
        validate(Policy(**{kind.value: placement}))


def test_fractions_that_sum_past_one_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^kv_cache: device=0.7 and host=0.4 sum to 1.1, expected at most 1 "
        r"\(the rest is on disk\)$",
    ):
        validate(Policy(kv_cache=Placement(device=0.7, host=0.4)))


def test_a_rounding_error_past_one_is_no_error():
    placement = Placement(device=0.3 + 1e-9, host=0.7)
    assert placement.device + placement.host > 1.0
    assert validate(Policy(weights=placement)).weights.disk == 0.0


@pytest.mark.parametrize("name", ["batch_size", "num_batches", "group_size"])
@pytest.mark.parametrize("count", [0, -1, 1.5, 2.0, "3", None, True])
def test_what_is_no_count_is_refused(name, count):
    message = f"^{name} is {count!r}, expected an integer of at least 1$"
    with pytest.raises(ValueError, match=message):
        validate(Policy(**{name: count}))


@pytest.mark.parametrize("sparsity", [0, 0.0, -0.1, 1.1, float("nan"), True, "0.1"])
def test_a_sparsity_that_is_no_fraction_is_refused(sparsity):
    message = f"^attention_sparsity is {sparsity!r}, expected the fraction of the past"
    with pytest.raises(ValueError, match=message):
        validate(Policy(attention_sparsity=sparsity))


def test_groups_of_nothing_are_refused():
    message = "^group_size=32 does nothing where nothing is quantized: give weight_bits"
    with pytest.raises(ValueError, match=message):
        validate(Policy(group_size=32))
    for name in ("weight_bits", "kv_cache_bits"):
        assert validate(Policy(group_size=32, **{name: 8}))
    assert validate(Policy(group_size=64))


@pytest.mark.parametrize("bits", [4, 16, 8.0, True, "8"])
def test_activations_have_8_bits_or_what_they_have(bits):
    message = f"^activation_bits is {bits!r}, expected 8 or None, which rounds nothing$"
    with pytest.raises(ValueError, match=message):
        validate(Policy(weight_bits=4, activation_bits=bits))
    assert validate(Policy(weight_bits=4, activation_bits=8))


def test_host_attention_without_a_cache_to_attend_to_is_refused():
    message = "^host_attention does nothing where the whole KV cache is on the device"
    with pytest.raises(ValueError, match=message):
        validate(Policy(host_attention=True))


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_host_attention_is_yes_or_no(value):
    message = f"^host_attention is {value!r}, expected True or False$"
    with pytest.raises(ValueError, match=message):
        validate(Policy(host_attention=value))


@pytest.mark.parametrize("name", ["weight_bits", "kv_cache_bits"])
@pytest.mark.parametrize("bits", [0, 2, 3, 5, 16, 4.0, "4", True])
def test_bits_other_than_4_and_8_are_refused(name, bits):
    message = f"^{name} is {bits!r}, expected 4, 8 or None, which is as stored$"
    with pytest.raises(ValueError, match=message):
        validate(Policy(**{name: bits}))
    for known in (4, 8, None):
        assert getattr(validate(Policy(**{name: known})), name) == known


@pytest.mark.parametrize("schedule", ["fastest", "ZIGZAG", "", None, 3, []])
def test_an_unknown_schedule_is_refused_with_those_there_are(schedule):
    with pytest.raises(
        ValueError,
        match=r"^schedule is .*, expected one of serial, row_by_row, zigzag$",
    ):
        from_json({"schedule": schedule})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"weight": {"device": 1}},
            "policy has no 'weight'; known are activation_bits, activations, ",
        ),
        ({"weights": {"gpu": 1}}, "weights has no 'gpu'; known are device, disk, host"),
        ({"weights": 0.5}, 'weights is 0.5, expected an object such as {"device": '),
        ({"weights": [20, 80]}, "weights is [20, 80], expected an object"),
        ({"kv_cache": None}, "kv_cache is None, expected an object"),
        ({"weights": {"disk": "all"}}, "weights: the fraction on disk is 'all', "),
        ({"weights": {"disk": -0.5}}, "weights: the fraction on disk is -0.5, "),
        ({"weights": {"disk": math.nan}}, "weights: the fraction on disk is nan, "),
        (
            {"weights": {"device": 0.5, "disk": 0.2}},
            "weights: disk=0.2 does not bring device=0.5 and host=0.0 to a sum of 1; ",
        ),
    ],
)
def test_json_that_is_no_policy_is_refused(values, message):
    with pytest.raises(ValueError, match=r".") as caught:
        from_json(values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_value_that_is_no_placement_is_refused():
    with pytest.raises(ValueError, match=r"^weights is 0.5, expected a Placement$"):
        validate(Policy(weights=0.5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ('{"batch_size": 4', "Expecting ',' delimiter"),
        ("[]", "it holds a list, expected an object"),
        ("null", "it holds a NoneType, expected an object"),
        ('{"batch_size": 0}', "batch_size is 0, expected an integer of at least 1"),
        (b"\xff\xfe\xfa", "codec can't decode"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong_in_it(tmp_path, content, message):
    path = tmp_path / "policy.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_policy(path)
    assert str(caught.value).startswith(f"policy {path}: ")


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"none.json cannot be read: No such file"):
        read_policy(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"cannot be read: Is a directory"):
        read_policy(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("device=0.2,host=0.8", Placement(device=0.2, host=0.8)),
        ("host=0.8 , device=0.2", Placement(device=0.2, host=0.8)),
        ("disk=1", Placement()),
        ("device=1", Placement(device=1.0)),
        ("device=.25,host=.25,disk=.5", Placement(device=0.25, host=0.25)),
    ],
)
def test_placements_are_read_as_command_lines_write_them(text, expected):
    assert parse_placement("--weights", text) == expected


@given(placements)
def test_every_placement_can_be_written_as_text(placement):
    text = f"device={placement.device},host={placement.host}"
    assert parse_placement("--weights", text) == placement
    with_disk = f"{text},disk={placement.disk}"
    assert parse_placement("--weights", with_disk) == placement


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read '', expected fractions such as device=0.2,host=0.8"),
        ("device", "cannot read 'device', expected"),
        ("0.2,0.8", "cannot read '0.2', expected"),
        ("device=most", "cannot read 'device=most', expected"),
        ("device=0.2,", "cannot read '', expected"),
        ("device=nan", "the fraction on device is nan, expected"),
        ("device=20,host=80", "the fraction on device is 20.0, expected"),
        ("device=0.2,device=0.3", "device is given twice; give it once"),
        ("device=0.8,host=0.8", "device=0.8 and host=0.8 sum to 1.6, expected at most"),
        ("device=0.5,disk=0.6", "disk=0.6 does not bring device=0.5 and host=0.0 to"),
    ],
)
def test_text_that_is_no_placement_is_refused(text, message):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_placement("--weights", text)
    assert str(caught.value).startswith(f"--weights: {message}")


def test_a_tier_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"^--weights has no 'gpu'; known are device, disk, host$"
    ):
        parse_placement("--weights", "gpu=1")
