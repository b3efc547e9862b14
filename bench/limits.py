"""The limits of a machine for one run, measured beside it: disk, compute and copies."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.bounds import DISK_READ, DISK_WRITE, FROM_DEVICE, TO_DEVICE
from bench.cases import Case
from bench.compute_limit import ComputeLimit, mean_limit, measure_compute
from bench.copy_routes import compare_routes
from bench.disk_limit import DiskRate, measure_read, measure_write
from flexjax.arrangement import shape_of
from flexjax.checkpoint import WeightStore
from flexjax.memory.layout import WeightLayout, lay_out
from flexjax.memory.link import Device, processor_of
from flexjax.policy import Policy, Tier
from flexjax.quant import cache_quantization, cache_slot_bytes
from flexjax.workload import Workload

_COPY_BYTES = 256 << 20  # of one copy between host and device
_HOW = {
    "disk": "raw O_DIRECT requests from several threads, the best of a few sizes and "
    "depths; reads are of the weight store's own files; the mean of a measurement "
    "before the run and one after it; in the decode, that of several in pauses of the "
    "run that do not count and read what a step reads, since a disk changes; writes "
    "go over a file that is there, and do not wait for the disk's own cache; reads and "
    "writes bound a phase apart",
    "compute": "the run's own jitted steps in the run's own shapes with everything in "
    "memory, two layers taking turns, the median of some repetitions, the mean of a "
    "measurement before the run and one after it; a phase's bound is the sum over its "
    "steps, batches and layers, and leaves out what only moves data",
    "copies": "the best route of bench.copy_routes in each direction",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What limits are measured for: a run, and where it reads and spills."""

    store: WeightStore
    policy: Policy
    work: Workload
    layout: WeightLayout
    disk_tensors: Sequence[str]  # what the run reads from the store while it runs
    device: Device
    offload_dir: pathlib.Path

    @property
    def spill_bytes(self) -> int:
        """About what the run has on disk in the end, beside the store."""
        config, work = self.store.config, self.work
        dtype, policy = self.store.dtype, self.policy
        layers_slots = config.num_hidden_layers * work.cache_slots(work.gen_len - 1)
        how = cache_quantization(policy, config, dtype)
        cached_bytes = layers_slots * cache_slot_bytes(config, dtype, how)
        hidden_bytes = work.prompt_len * config.hidden_size * dtype.itemsize
        row_bytes = policy.kv_cache.disk * cached_bytes
        row_bytes += policy.activations.disk * hidden_bytes
        return round(self.policy.block_size * row_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """One measurement of each limit; None, or nothing, where a run has no use for it.

    Attributes:
        disk_read: of the weight store's files.
        disk_write: where the run spills, over a file that is there.
        compute: of the layer steps.
        copies: bytes per second between host and device, by resource.
    """

    disk_read: DiskRate
    disk_write: DiskRate | None
    compute: ComputeLimit
    copies: Mapping[str, float]


def setting_of(
    case: Case, store: WeightStore, device: Device, offload_dir: pathlib.Path
) -> Setting:
    """The setting of a case's run, as the engine will run it."""
    layout = lay_out(
        store.config,
        store.dtype,
        store.tensors,
        case.policy,
        processor=processor_of(device, is_quantized=store.quantization is not None),
    )
    on_disk = [name for name, tier in layout.tiers.items() if tier is Tier.DISK]
    return Setting(
        store=store,
        policy=case.policy,
        work=layout.workload(
            case.policy,
            shape_of(case.policy, case.policy.block_size),
            prompt_len=case.prompt_len,
            gen_len=case.gen_len,
        ),
        layout=layout,
        disk_tensors=on_disk or [*layout.tiers],
        device=device,
        offload_dir=offload_dir,
    )


def measure_limits(setting: Setting) -> Limits:
    """Measures everything once."""
    spill_bytes = setting.spill_bytes
    return Limits(
        disk_read=measure_read(setting.store, setting.disk_tensors),
        disk_write=(
            measure_write(setting.offload_dir, spill_bytes) if spill_bytes else None
        ),
        compute=measure_compute(
            setting.store,
            setting.policy,
            setting.work,
            layout=setting.layout,
            device=setting.device,
        ),
        copies=_measure_copies(setting.device),
    )


def _measure_copies(device: Device) -> dict[str, float]:
    if device.platform == "cpu":
        return {}  # one memory
    best: dict[str, float] = {}
    for row in compare_routes(device, [_COPY_BYTES]):
        if "error" not in row:
            direction = row["direction"]
            best[direction] = max(best.get(direction, 0.0), row["bytes_per_s"])
    return {name: best[name] for name in (TO_DEVICE, FROM_DEVICE) if name in best}


def mean_rates(limits: Sequence[Limits]) -> dict[str, float]:
    """Bytes per second of each resource that moves bytes.

    Reads that may come from the page cache are not bounded by the disk.
    """
    rates: dict[str, float] = {}
    if all(one.disk_read.direct for one in limits):
        reads = (one.disk_read.bytes_per_s for one in limits)
        rates[DISK_READ] = statistics.mean(reads)
    writes = [one.disk_write.bytes_per_s for one in limits if one.disk_write]
    if writes:
        rates[DISK_WRITE] = statistics.mean(writes)
    for resource in limits[0].copies:
        rates[resource] = statistics.mean(one.copies[resource] for one in limits)
    return rates


def decode_rates(
    rates: Mapping[str, float], in_pauses: Sequence[DiskRate]
) -> dict[str, float]:
    """The rates of a decode that was paused to measure the disk.

    The disk's is the mean over the pauses: the quickest one shows the quietest moment.
    """
    if DISK_READ not in rates or not in_pauses:
        return dict(rates)
    mean = statistics.mean(rate.bytes_per_s for rate in in_pauses)
    return {**rates, DISK_READ: mean}


def mean_compute(limits: Sequence[Limits]) -> ComputeLimit:
    """Seconds of the steps."""
    return mean_limit([one.compute for one in limits])


def limits_report(
    limits: Sequence[Limits], in_pauses: Sequence[DiskRate]
) -> dict[str, Any]:
    """What counted, each measurement that it came from, and how they were made."""
    rates = mean_rates(limits)
    return {
        "bytes_per_s": rates,
        "decode_bytes_per_s": decode_rates(rates, in_pauses),
        "in_pauses": [dataclasses.asdict(rate) for rate in in_pauses],
        "compute": dataclasses.asdict(mean_compute(limits)),
        "measured": [dataclasses.asdict(one) for one in limits],
        "how": _HOW,
    }
