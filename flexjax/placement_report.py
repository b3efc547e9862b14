"""Requested beside effective placement, by kind of tensor and tier."""

from typing import Any

from flexjax.memory.layout import WeightLayout
from flexjax.memory.placement import place_rows
from flexjax.memory.routes import cache_routes
from flexjax.policy import Kind, Policy, Tier


def placement_report(weights: WeightLayout, policy: Policy) -> dict[str, Any]:
    """For each kind and tier: the fraction that was asked for, and the effective one.

    Weights also have their bytes. Cache and activations are split by rows, so their
    effective fractions hold for full batches; their bytes depend on the prompts and are
    in the metrics of a run.
    """
    config = weights.config
    cells = {
        Kind.KV_CACHE: config.num_hidden_layers * policy.num_batches,
        Kind.ACTIVATIONS: policy.num_batches,
    }
    report: dict[str, Any] = {
        Kind.WEIGHTS.value: _weights(weights, policy),
    }
    for kind, count in cells.items():
        # Rounding is carried from batch to batch: all of them together are as one.
        totals = place_rows(policy.placement(kind), count * policy.batch_size, 0)
        report[kind.value] = {
            tier.value: {
                "requested": policy.placement(kind).fraction(tier),
                "effective": rows / (count * policy.batch_size),
            }
            for tier, rows in zip(Tier, totals, strict=True)
        }
    routes = cache_routes(policy, device_is_host=weights.device_is_host)
    return report | {
        "weight_bits": weights.bits,
        "kv_cache_bits": policy.kv_cache_bits or 8 * weights.dtype.itemsize,
        "activation_bits": policy.activation_bits or 8 * weights.dtype.itemsize,
        "attention_sparsity": policy.attention_sparsity,
        "attention": {
            tier.value: "host" if route.on_host else "device"
            for tier, route in routes.items()
        },
    }


def _weights(weights: WeightLayout, policy: Policy) -> dict[str, dict[str, float]]:
    held = weights.home_bytes
    total = sum(held.values())
    return {
        tier.value: {
            "requested": policy.weights.fraction(tier),
            "effective": held[tier] / total,
            "bytes": held[tier],
        }
        for tier in Tier
    }
