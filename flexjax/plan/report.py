"""A plan as text for people and as JSON for programs."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware, hardware_to_json
from flexjax.plan.job import Job
from flexjax.plan.predict import Prediction, combined, predict
from flexjax.plan.program import STORE, memories
from flexjax.plan.search import Plan, search
from flexjax.policy import Kind, Tier, to_json
from flexjax.schedule.footprint import by_tier
from flexjax.schedule.resources import Resource
from flexjax.sizes import format_bytes

_GIB = 1 << 30


def plan_to_json(
    plan: Plan, hardware: Hardware, saved: Mapping[str, float]
) -> dict[str, Any]:
    """A plan as plain values, with their units in the names; `saved` is `saved_s`'s."""
    return {
        **_plan_values(plan),
        "saved_s": {**saved},
        "hardware": hardware_to_json(hardware),
    }


def parts_to_json(plans: Sequence[Plan], hardware: Hardware) -> dict[str, Any]:
    """Plans that follow one another, and what they will take together."""
    return {
        "parts": [_plan_values(plan) for plan in plans],
        **prediction_to_json(_of_all(plans)),
        "hardware": hardware_to_json(hardware),
    }


def _of_all(plans: Sequence[Plan]) -> Prediction:
    return combined([(1.0, plan.prediction) for plan in plans])


def _plan_values(plan: Plan) -> dict[str, Any]:
    return {
        "policy": to_json(plan.policy),
        "layers_ahead": plan.layers_ahead,
        "job": dataclasses.asdict(plan.job),
        **prediction_to_json(plan.prediction),
        "bytes": {
            tier.value: {kind.value: plan.peak.get((tier, kind), 0) for kind in Kind}
            for tier in Tier
        },
        "budget_bytes": {tier.value: size for tier, size in plan.budgets.items()},
    }


def prediction_to_json(prediction: Prediction) -> dict[str, Any]:
    """What a job will take, as plain values."""
    return {
        "tokens_per_s": prediction.tokens_per_s,
        "block_s": prediction.block_s,
        "prefill_s": prediction.prefill_s,
        "decode_s": prediction.decode_s,
        "total_s": prediction.total_s,
        "bottleneck": prediction.bottleneck.value,
        "terms_s": {
            phase: {resource.value: seconds for resource, seconds in terms.items()}
            for phase, terms in (
                ("prefill", prediction.prefill_terms),
                ("decode", prediction.decode_terms),
            )
        },
    }


def saved_s(
    plan: Plan, model: Model, hardware: Hardware, *, most_block_s: float = math.inf
) -> dict[str, float]:
    """Seconds of the job that more of something would save.

    One more GiB of each memory by a search of its own, since another size of blocks may
    be best then; a disk twice as fast by simulation of the same policy.
    """
    saved: dict[str, float] = {}
    for tiers in memories(device_is_host=hardware.device_is_host):
        if tiers == (Tier.DISK,):
            continue
        larger = _with_a_gib_more(hardware, tiers)
        more = search(model, larger, plan.job, plan.policy, most_block_s=most_block_s)
        gained_s = plan.prediction.total_s - more.prediction.total_s
        name = f"1 GiB more on {' and '.join(tier.value for tier in tiers)}"
        saved[name] = max(0.0, gained_s)
    faster = dataclasses.replace(
        hardware,
        disk_read_bytes_per_s=2 * hardware.disk_read_bytes_per_s,
        disk_write_bytes_per_s=2 * hardware.disk_write_bytes_per_s,
    )
    then = predict(model, plan.policy, faster, plan.job, layers_ahead=plan.layers_ahead)
    saved["disk twice as fast"] = max(0.0, plan.prediction.total_s - then.total_s)
    return saved


def _with_a_gib_more(hardware: Hardware, tiers: tuple[Tier, ...]) -> Hardware:
    names = {Tier.DEVICE: "device_memory_bytes", Tier.HOST: "host_memory_bytes"}
    more = {names[tier]: getattr(hardware, names[tier]) + _GIB for tier in tiers}
    return dataclasses.replace(hardware, **more)


def plan_to_text(
    plan: Plan, model: Model, hardware: Hardware, saved: Mapping[str, float]
) -> str:
    """What `python -m flexjax.plan` prints; `saved` is `saved_s`'s."""
    job = plan.job
    lines = [
        f"machine: {hardware.name}",
        f"job: {job.num_prompts:,} prompts of {tokens_in_words(job)}, {job.gen_len} "
        "new ones each",
        *_lines(plan, model, hardware),
        "",
    ]
    lines += [f"{what} would save {format_seconds(s)}" for what, s in saved.items()]
    return "\n".join(lines)


def parts_to_text(parts: Sequence[tuple[Plan, Model]], hardware: Hardware) -> str:
    """What is printed of plans that follow one another, each with its model."""
    lines = [f"machine: {hardware.name}"]
    for number, (plan, model) in enumerate(parts, 1):
        name = f"part {number} of {len(parts)}" if len(parts) > 1 else "job"
        lines += [
            *([""] if len(parts) > 1 else []),
            f"{name}: prompts: {plan.job.num_prompts:,}, padded to at most "
            f"{tokens_in_words(plan.job)}; {plan.job.gen_len} new ones each",
            *_lines(plan, model, hardware),
        ]
    whole = _of_all([plan for plan, _ in parts])
    if len(parts) > 1:
        lines += [
            "",
            f"all parts {format_seconds(whole.total_s)}: {whole.tokens_per_s:.3g} "
            "tokens/s; the time to load what stays in memory, for each, is not counted",
        ]
    return "\n".join(lines)


def _lines(plan: Plan, model: Model, hardware: Hardware) -> Iterator[str]:
    prediction = plan.prediction
    yield f"policy: {policy_in_words(plan)}"
    yield ""
    yield (
        f"{'':12}"
        + "".join(f"{kind.value:>14}" for kind in Kind)
        + (f"{'in all':>14}{'may use':>14}")
    )
    held = by_tier({key: size for key, size in plan.peak.items() if key != STORE})
    for tier in Tier:
        sizes = [plan.peak.get((tier, kind), 0) for kind in Kind]
        cells = [format_bytes(size) for size in (*sizes, held[tier])]
        shared = hardware.device_is_host and tier is Tier.HOST
        cells.append("(device's)" if shared else format_bytes(plan.budgets[tier]))
        yield f"{tier.value:12}" + "".join(f"{cell:>14}" for cell in cells)
    store = sum(entry.nbytes for entry in model.tensors.values())
    yield f"(on disk, the weights are the store's, {format_bytes(store)}, not spilled)"
    yield ""
    yield (
        f"prefill {format_seconds(prediction.prefill_s)}, decode "
        f"{format_seconds(prediction.decode_s)}, in all "
        f"{format_seconds(prediction.total_s)}: {prediction.tokens_per_s:.3g} tokens/s"
    )
    if plan.policy.block_size < plan.job.num_prompts:
        yield (
            f"a block of {plan.policy.block_size} prompts takes "
            f"{format_seconds(prediction.block_s)}"
        )
    yield f"{'seconds of':16}{'prefill':>10}{'decode':>10}{'idle':>8}"
    for resource in Resource:
        terms = [
            phase.get(resource, 0.0)
            for phase in (prediction.prefill_terms, prediction.decode_terms)
        ]
        if any(terms):
            mark = "  <- bottleneck" if resource is prediction.bottleneck else ""
            yield (
                f"{resource.value:16}{terms[0]:10.1f}{terms[1]:10.1f}"
                f"{prediction.idle_share(resource):8.0%}{mark}"
            )


def tokens_in_words(job: Job) -> str:
    """How long a job's prompts are."""
    alike = f"about {job.rows_per_prefix}" if job.rows_per_prefix else "all"
    shared = f" behind {job.num_shared} that {alike} share" if job.num_shared else ""
    return f"{job.prompt_len} tokens{shared}"


def policy_in_words(plan: Plan) -> str:
    """The policy in one line."""
    policy = plan.policy
    batches = "1 batch" if policy.num_batches == 1 else f"{policy.num_batches} batches"
    words = [f"{batches} of {policy.batch_size}"]
    for kind in Kind:
        shares = ", ".join(
            f"{policy.placement(kind).fraction(tier):.1%} {tier.value}"
            for tier in Tier
            if policy.placement(kind).fraction(tier) >= 0.0005
        )
        words.append(f"{kind.value} {shares}")
    words += [
        f"{name} {bits}"
        for name in ("weight_bits", "kv_cache_bits", "activation_bits")
        if (bits := getattr(policy, name)) is not None
    ]
    if policy.host_attention:
        words.append("host attention")
    return "; ".join(words)


def format_seconds(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
