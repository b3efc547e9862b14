"""The policy of a run that names none: all on the device, or what a search finds."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from flexjax.checkpoint import WeightStore
from flexjax.memory.capacity import free_bytes
from flexjax.memory.link import Device, is_shared, processor_of
from flexjax.plan.calibrate import calibrated
from flexjax.plan.closed_form import Model
from flexjax.plan.hardware import Hardware
from flexjax.plan.job import Job
from flexjax.plan.parts import Asked, plan_parts
from flexjax.plan.planner import allowed_policies, template_of
from flexjax.plan.program import memories
from flexjax.plan.report import format_seconds, policy_in_words, tokens_in_words
from flexjax.plan.scratch import store_read_rate
from flexjax.plan.search import Plan, fits, memory_budgets
from flexjax.policy import Policy, Tier
from flexjax.sizes import format_bytes

# Rows of a batch that leave nothing to be gained by more, and the most that are tried.
ENOUGH_ROWS, MOST_ROWS = 64, 256


class Choice(NamedTuple):
    """A policy, the job that it is for, and why it was chosen, in two lines.

    Where it was searched for, its plan comes along.
    """

    policy: Policy
    job: Job
    reason: str
    plan: Plan | None = None


def on_device(
    store: WeightStore,
    asked: Asked,
    *,
    device: Device,
    offload_dir: pathlib.Path,
    held: Mapping[Tier, int],
) -> Choice | None:
    """The policy for prompts with which all of a model is on the device, if it fits.

    Args: as of `choose_policies`.
    """
    job, free = asked.job, _free(device, offload_dir, held)
    model = Model(config=store.config, dtype=store.dtype, tensors=store.tensors)
    template = template_of(store.quantization)
    processor = processor_of(device, is_quantized=store.quantization is not None)
    budgets = memory_budgets(free, device_is_host=processor.is_host)
    for batch_size in _device_sizes(job.rows_per_prefix or job.num_prompts):
        policy = dataclasses.replace(template, batch_size=batch_size)
        if fits(model, policy, budgets, job, processor):
            return Choice(policy, job, _all_on_device(policy, job))
    return None


def choose_policies(
    store: WeightStore,
    asked: Asked,
    *,
    device: Device,
    offload_dir: pathlib.Path,
    held: Mapping[Tier, int],
    progress: Callable[[str], object],
) -> list[Choice]:
    """The best policies for prompts and a model that is there, one after the other.

    Where all of it fits on the device there is nothing to plan. Otherwise the machine
    is measured, if it never was before, and policies are searched: one, or more where
    prompts are of so different lengths that each wants its own.

    Args:
        store: the model's weights.
        asked: the longest prompt first; each choice is for as many as its job says.
        device: that computes.
        offload_dir: where a run would spill to.
        held: bytes of each tier that are not free, but would be for this run.
        progress: is told what takes long, in a few words.

    Raises:
        ValueError: not even one prompt fits, or none is done in time.
        OSError: the disk failed while it was measured.
    """
    choice = on_device(store, asked, device=device, offload_dir=offload_dir, held=held)
    if choice is not None:
        return [choice]
    free = _free(device, offload_dir, held)
    hardware = dataclasses.replace(
        calibrated(offload_dir, device, progress),
        device_memory_bytes=free[Tier.DEVICE],
        host_memory_bytes=free[Tier.HOST],
        disk_bytes=free[Tier.DISK],
        disk_read_bytes_per_s=store_read_rate(store),
    )
    model = Model(config=store.config, dtype=store.dtype, tensors=store.tensors)
    allowed = allowed_policies(
        quantized=False,
        host_attention=not hardware.device_is_host,
        base=template_of(store.quantization),
    )
    models = [(model, policy) for policy in allowed]
    wanted = asked._replace(lengths=asked.lengths or [1])
    plans = plan_parts(models, hardware, wanted)
    return [
        Choice(plan.policy, plan.job, _as_planned(plan, hardware), plan)
        for plan in plans
    ]


def _free(
    device: Device, offload_dir: pathlib.Path, held: Mapping[Tier, int]
) -> dict[Tier, int]:
    """Bytes that a run may take, with what it would give back."""
    free = free_bytes(device, offload_dir)
    for tiers in memories(device_is_host=is_shared(device)):
        more = sum(held[tier] for tier in tiers)
        free |= {tier: free[tier] + more for tier in tiers}
    return free


def _device_sizes(num_rows: int) -> list[int]:
    """Batch sizes to try, the larger first, where so many rows may be one batch."""
    enough = min(num_rows, ENOUGH_ROWS)
    return sorted({enough, min(num_rows, MOST_ROWS)}, reverse=True)


def _all_on_device(policy: Policy, job: Job) -> str:
    return (
        f"policy: everything on the device, batches of {policy.batch_size}\n"
        f"because {job.num_prompts} prompts of up to {tokens_in_words(job)} and "
        f"{job.gen_len} new ones fit there with the whole model"
    )


def _as_planned(plan: Plan, hardware: Hardware) -> str:
    prediction = plan.prediction
    memory = (
        hardware.host_memory_bytes
        if hardware.device_is_host
        else hardware.device_memory_bytes
    )
    return (
        f"policy: {policy_in_words(plan)}\n"
        f"because {format_bytes(memory)} of the device are free for "
        f"{plan.job.num_prompts:,} prompts of up to {tokens_in_words(plan.job)}; "
        f"expect {format_seconds(prediction.total_s)} ({prediction.tokens_per_s:.3g} "
        f"tokens/s), bounded by {prediction.bottleneck.value}"
    )
