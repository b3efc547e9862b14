"""A policy on a command line, in flexjax's words and in FlexGen's."""

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.policy import Kind, Placement, Policy, Schedule, to_json
from flexjax.policy_args import (
    add_policy_arguments,
    is_planned,
    policy_from_args,
)


def read(*arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_policy_arguments(parser)
    return policy_from_args(parser.parse_args([str(word) for word in arguments]))


@pytest.fixture
def policy_file(tmp_path):
    path = tmp_path / "policy.json"
    policy = Policy(weights=Placement(host=1.0), batch_size=3, schedule=Schedule.SERIAL)
    path.write_text(json.dumps(to_json(policy)))
    return path


def test_no_argument_is_the_default():
    assert read() == Policy()


def test_every_word_of_ours():
    assert read(
        *("--weights", "device=0.2,host=0.8"),
        *("--kv-cache", "disk=1"),
        *("--activations", "host=1"),
        *("--batch-size", 48),
        *("--num-batches", 3),
        *("--schedule", "row_by_row"),
        *("--weight-bits", 8),
        *("--kv-cache-bits", 4),
        *("--activation-bits", 8),
        *("--group-size", 32),
        "--host-attention",
        *("--attention-sparsity", 0.5),
    ) == Policy(
        weights=Placement(device=0.2, host=0.8),
        kv_cache=Placement(),
        activations=Placement(host=1.0),
        batch_size=48,
        num_batches=3,
        schedule=Schedule.ROW_BY_ROW,
        weight_bits=8,
        kv_cache_bits=4,
        activation_bits=8,
        group_size=32,
        host_attention=True,
        attention_sparsity=0.5,
    )


def test_every_word_of_flexgen_s():
    assert read(
        *("--compress-weight", "--compress-cache"),
        *("--percent", 20, 80, 0, 50, 100, 0),
        *("--gpu-batch-size", 48),
        *("--num-gpu-batches", 3),
        *("--overlap", "false"),
        *("--attn-sparsity", 0.1),
        "--cpu-cache-compute",
    ) == Policy(
        weights=Placement(device=0.2, host=0.8),
        kv_cache=Placement(host=0.5),
        activations=Placement(device=1.0),
        batch_size=48,
        num_batches=3,
        schedule=Schedule.SERIAL,
        host_attention=True,
        attention_sparsity=0.1,
        weight_bits=4,
        kv_cache_bits=4,
    )


@given(st.tuples(*[st.integers(0, 100)] * 3))
def test_percent_means_a_hundredth_and_the_rest_is_on_disk(shares):
    percent = [value for share in shares for value in (share, 100 - share)]
    policy = read("--percent", *percent)
    for kind, share in zip(Kind, shares, strict=True):
        assert policy.placement(kind).device == pytest.approx(share / 100)
        assert policy.placement(kind).disk == pytest.approx(0.0)


@pytest.mark.parametrize("word", ["true", "True", "1"])
def test_overlap_is_what_the_default_does(word):
    assert read("--overlap", word) == Policy()


@pytest.mark.parametrize("word", ["false", "False", "0"])
def test_no_overlap_is_the_serial_schedule(word):
    assert read("--overlap", word).schedule is Schedule.SERIAL


def test_arguments_change_what_the_file_says(policy_file):
    assert read("--policy", policy_file).batch_size == 3
    changed = read("--policy", policy_file, "--batch-size", 5, "--kv-cache", "host=1")
    assert changed == Policy(
        weights=Placement(host=1.0),
        kv_cache=Placement(host=1.0),
        batch_size=5,
        schedule=Schedule.SERIAL,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--group-size 0", "group_size is 0, expected an integer of at least 1"),
        ("--compress-weight --weight-bits 8", "weight_bits is given twice, once by"),
        ("--attn-sparsity 1.5", "attention_sparsity is 1.5, expected the fraction"),
        ("--percent 120 0 0 0 0 0", "weights: the fraction on device is"),
        ("--percent 0 0 70 40 0 0", "kv_cache: device=0.7 and host=0.4"),
        ("--percent 0 0 0 0 nan 0", "activations: the fraction on devi"),
        ("--weights device=2", "--weights: the fraction on device is 2.0"),
        ("--kv-cache gpu=1", "--kv-cache has no 'gpu'; known are device, disk"),
        ("--activations all", "--activations: cannot read 'all', expected"),
        ("--batch-size 0", "batch_size is 0, expected an integer of at least 1"),
        ("--num-gpu-batches -1", "num_batches is -1, expected an integer of"),
        ("--policy none.json", "policy none.json cannot be read: No such file"),
        (
            "--weights device=1 --percent 100 0 100 0 100 0",
            "weights is given twice, once by one of FlexGen's names; give it once",
        ),
        (
            "--schedule zigzag --overlap false",
            "schedule is given twice, once by one of FlexGen's names; give it once",
        ),
        (
            "--schedule serial --overlap true",
            "--overlap true asks for transfers during computation, but the schedule is",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=r".") as caught:
        read(*arguments.split())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_overlap_contradicts_a_serial_schedule_of_a_file(policy_file):
    with pytest.raises(ValueError, match=r"--overlap true asks .* is serial"):
        read("--policy", policy_file, "--overlap", "true")


@pytest.mark.parametrize(
    "arguments",
    [
        "--overlap maybe",
        "--schedule fastest",
        "--batch-size many",
        "--percent a 0 0 0 0 0",
    ],
)
def test_words_that_cannot_be_read_are_refused_by_the_parser(arguments):
    with pytest.raises(argparse.ArgumentError, match=arguments.split()[0]):
        read(*arguments.split())


def test_the_help_names_every_argument_of_a_policy():
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser)
    text = parser.format_help()
    for word in ("--weights", "--kv-cache", "--activations", "--num-batches", "zigzag"):
        assert word in text


def planned(*words) -> bool:
    parser = argparse.ArgumentParser()
    add_policy_arguments(parser, can_plan=True)
    return is_planned(parser.parse_args([str(word) for word in words]))


def test_a_policy_is_planned_where_nothing_is_said_of_one():
    assert planned()
    assert planned("--policy", "auto")
    assert planned("--offload-dir", "x")


@pytest.mark.parametrize(
    "words",
    [
        ("--overlap", "false"),
        ("--batch-size", 0),
        ("--attention-sparsity", 0),
        ("--compress-weight",),
        ("--weights", "disk=1"),
        ("--host-attention",),
    ],
)
def test_whatever_is_said_is_not_planned_over(words):
    assert not planned(*words)
    with pytest.raises(ValueError, match=f"{words[0]} says some of it"):
        planned("--policy", "auto", *words)


def test_auto_is_refused_where_nothing_is_planned():
    with pytest.raises(ValueError, match="--policy auto is for generating"):
        read("--policy", "auto")
