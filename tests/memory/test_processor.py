"""Rounding that cannot be had is refused with the reason, before anything is made."""

import types

import jax
import numpy as np
import pytest

from checkpoints_tools.resolve import resolve_for
from flexjax import Placement, Policy
from flexjax.arrangement import shape_of
from flexjax.kernels.products import fitting_groups, is_multiplied
from flexjax.memory import link
from flexjax.memory.layout import lay_out
from flexjax.memory.processor import Processor
from flexjax.models.config import OPTConfig, named_config
from flexjax.plan.planner import Found
from flexjax.quant import Quantization
from flexjax.store_format import planned_entries
from flexjax.workload import bucket

NO_COMPILER = "CXX is 'icc', and there is no such program"
HERE = Processor(is_host=True, multiplies_quantized=True)
CONFIG = OPTConfig(vocab_size=64, hidden_size=192, ffn_dim=256, num_hidden_layers=1)


def laid_out(config=CONFIG, processor=HERE, *, bits=4, group_size=64, dtype="bfloat16"):
    how = None
    if bits is not None:
        how = Quantization(bits=bits, group_size=group_size, dtype=dtype)
    wide = np.dtype(dtype)
    tensors = planned_entries(config, wide, how)
    policy = Policy(activation_bits=8)
    return lay_out(config, wide, tensors, policy, processor=processor)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": None}, "is bfloat16 and not quantized: give weight_bits"),
        (
            {"dtype": "float32"},
            "is quantized from float32: quantize a checkpoint in dtype bfl",
        ),
        (
            {"group_size": 64},
            "in groups of 64: quantize a checkpoint with group_size 32",
        ),
        (
            {"bits": 8, "group_size": 16},
            "of 8 bits, are in groups of 16: .* group_size 32, or l",
        ),
    ],
)
def test_weights_that_no_kernel_takes_are_refused_with_a_remedy(settings, reason):
    message = r"^activation_bits=8 cannot be had with layers.0.self_attn.q_proj.weight,"
    with pytest.raises(ValueError, match=f"{message}.*{reason}"):
        laid_out(**settings)


def test_where_no_group_would_do_that_is_said():
    config = OPTConfig(hidden_size=48, ffn_dim=64, num_attention_heads=4)
    with pytest.raises(
        ValueError, match="groups of 16, and no others would do: take anothe"
    ):
        laid_out(config, group_size=16)


def test_a_device_that_makes_weights_wide_is_refused():
    with pytest.raises(ValueError, match="which is made wide before products here"):
        laid_out(processor=Processor(is_host=False))


def test_what_is_recommended_is_taken():
    matrices = [(4, 192), (4, 768), (8, 1920)]
    for size in range(1, 200):
        ways = [
            (Quantization(bits=bits, group_size=size, dtype="bfloat16"), inputs)
            for bits, inputs in matrices
        ]
        taken = all(is_multiplied(how, inputs) for how, inputs in ways)
        assert (size in fitting_groups(ways)) == taken


@pytest.mark.parametrize(
    ("changes", "attends", "reserves"),
    [
        ({}, True, True),
        ({"kv_cache": Placement(device=0.5, host=0.5)}, True, True),
        ({"kv_cache": Placement(device=0.99)}, True, False),
        ({"kv_cache_bits": 4}, True, True),
        ({"kv_cache_bits": 4, "group_size": 8}, False, False),
        ({"attention_sparsity": 0.5}, False, False),
    ],
)
def test_a_cache_has_room_at_once_where_the_kernel_attends_to_all_of_it(
    changes, attends, reserves
):
    policy = Policy(**changes)
    model = Found(named_config("opt-1.3b"), np.dtype("bfloat16")).model(Policy())
    for has_kernel in (True, False):
        processor = Processor(is_host=True, has_attention_kernel=has_kernel)
        layout = model.layout(policy, processor)
        work = layout.workload(policy, shape_of(policy, 8), prompt_len=100, gen_len=100)
        assert layout.attends_by_kernel(policy) == (attends and has_kernel)
        assert work.reserves == (reserves and has_kernel)
        assert work.cache_slots(0) == (bucket(227) if work.reserves else bucket(129))


def kernel(why_missing):
    return types.SimpleNamespace(
        is_there=lambda: why_missing is None, why_missing=lambda: why_missing
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(link, "PRODUCTS", kernel(None))
    monkeypatch.setattr(link, "DECODE_ATTENTION", kernel(None))
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "group_size", "reason"),
    [
        ("float32", 32, "which is quantized from float32: quantize a checkpoint"),
        ("auto", 64, "of 4 bits, are in groups of 64: .* group_size 32, or leave"),
        ("auto", 24, "cannot be quantized: a group_size of 24 does not divide 64 el"),
    ],
)
def test_what_cannot_be_had_is_refused_before_weights_are_converted(
    dtype, group_size, reason, golden, cache
):
    policy = Policy(weight_bits=4, activation_bits=8, group_size=group_size)
    with pytest.raises(ValueError, match=reason):
        resolve_for(policy, golden("opt-bf16").folder, dtype, device=jax.devices()[0])


@pytest.mark.parametrize(
    ("platform", "reason"),
    [("cpu", NO_COMPILER), ("gpu", "the device is a gpu")],
)
def test_why_a_machine_cannot_round_is_said_first(platform, reason, cache, monkeypatch):
    monkeypatch.setattr(link, "PRODUCTS", kernel(NO_COMPILER))
    policy = Policy(weight_bits=4, activation_bits=8)
    device = types.SimpleNamespace(
        platform=platform, client=None, memory_stats=lambda: None
    )
    with pytest.raises(
        ValueError, match=f"^activation_bits=8 cannot be had here: {reason}. It is"
    ):
        resolve_for(policy, "/nowhere", device=device)
