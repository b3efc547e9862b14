"""One whole run, and the limits of the machine before and after it.

    python -m bench.measure JOB

JOB is what `job_to_json` writes: so `bench.run` can put the run into a process of its
own. The report is written to stdout, as JSON.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bench.bounds import fraction, phase_report
from bench.cases import Case, case_from_json, case_to_json
from bench.disk_limit import DiskRate, store_files
from bench.limits import (
    Limits,
    decode_rates,
    limits_report,
    mean_compute,
    mean_rates,
    measure_limits,
    setting_of,
)
from bench.machine import describe_machine
from bench.page_cache import drop_page_cache
from bench.pauses import DiskPauses
from checkpoints_tools.resolve import resolve_for
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import WeightStore, open_store
from flexjax.cli import run_command
from flexjax.llm import EMBEDDED_MODEL, LLM
from flexjax.memory.link import Device
from flexjax.policy import to_json
from flexjax.prompts import random_prompts
from flexjax.safe_files import make_folder
from flexjax.sampling_params import SamplingParams
from flexjax.trace import write_trace
from flexjax.workload import Workload

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is ready to go.

    Attributes:
        case: with a validated policy.
        weights: the folder of its weights; None is the embedded model.
        offload_dir: where it spills to; the cache folder, if None.
        trace: where to write its trace to; nowhere, if None.
    """

    case: Case
    weights: str | None
    offload_dir: str | None = None
    trace: str | None = None


def job_to_json(job: Job) -> str:
    """A text that `job_from_json` reads back."""
    return json.dumps(dataclasses.asdict(job) | {"case": case_to_json(job.case)})


def job_from_json(text: str) -> Job:
    """Reads what `job_to_json` wrote."""
    values = json.loads(text)
    return Job(**{**values, "case": case_from_json(values["case"])})


def measure(job: Job) -> dict[str, Any]:
    """Runs a job and measures its limits; the report, as JSON values.

    The limits are measured while the model is closed, so that they take no memory from
    it; and the steps that they time are compiled by then.

    Raises:
        ValueError: the model or the policy cannot be used.
        OSError: the disk failed.
    """
    device: Device = jax.devices()[0]
    weights = EMBEDDED_MODEL if job.weights is None else job.weights
    folder = resolve_for(job.case.policy, weights, device=device)
    store = open_store(folder)
    job.case.ensure_fits(store.config)
    offload_dir = pathlib.Path(job.offload_dir or default_cache())
    make_folder(offload_dir)
    setting = setting_of(job.case, store, device, offload_dir)
    before = measure_limits(setting)
    pauses = DiskPauses(
        store, setting.disk_tensors, setting.work.num_batches, offload_dir
    )
    run = _run(job, store, offload_dir, pauses)
    limits = [before, measure_limits(setting)]
    return {
        "case": job.case.name or None,
        "model": pathlib.Path(job.case.model or "embedded").name,
        "note": job.case.note,
        "policy": to_json(job.case.policy),
        "prompt_len": job.case.prompt_len,
        "gen_len": job.case.gen_len,
        **run_report(run, setting.work, limits),
        "memory_cap_bytes": job.case.memory_cap_bytes,
        "projected": False,
        "machine": describe_machine(store.folder),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run once it is over."""

    metrics: Mapping[str, Any]
    placement: Mapping[str, Any]
    page_cache: str
    peak_rss_bytes: int
    in_pauses: Sequence[DiskRate]


def run_report(run: Run, work: Workload, limits: list[Limits]) -> dict[str, Any]:
    """The part of a report that says how a run went, beside its bounds."""
    metrics, rates, compute = run.metrics, mean_rates(limits), mean_compute(limits)
    phases = {
        "prefill": phase_report(metrics["prefill"], rates, compute.prefill_s(work)),
        "decode": phase_report(
            metrics["decode"],
            decode_rates(rates, run.in_pauses),
            compute.decode_s(work),
        ),
    }
    bound_s = sum(phase["bound_s"][phase["bound_by"]] for phase in phases.values())
    return {
        "placement": run.placement,
        "page_cache": run.page_cache,
        "tokens_per_s": metrics["tokens_per_s"],
        "num_tokens": metrics["num_tokens"],
        "seconds": metrics["seconds"],
        "fraction_of_bound": fraction(bound_s, metrics["seconds"]),
        **phases,
        "step_s": metrics["step_s"],
        "bytes_moved": metrics["bytes_moved"],
        "limits": limits_report(limits, run.in_pauses),
        "peak_rss_bytes": run.peak_rss_bytes,
        "peak_bytes": metrics["peak_bytes"],
        "predicted_peak_bytes": metrics["predicted_peak_bytes"],
    }


def _run(
    job: Job, store: WeightStore, offload_dir: pathlib.Path, pauses: DiskPauses
) -> Run:
    case = job.case
    params = SamplingParams(max_tokens=case.gen_len, temperature=0.0, ignore_eos=True)
    with contextlib.suppress(OSError):  # else the peak is that of the whole process
        _CLEAR.write_text(_CLEAR_PEAK)
    with LLM(
        store.folder,
        policy=case.policy,
        offload_dir=offload_dir,
        trace=job.trace is not None,
    ) as llm:
        rows, vocab_size = case.policy.block_size, llm.config.vocab_size
        prompts = random_prompts(vocab_size, rows, case.prompt_len)
        state = "warm"
        if case.cold:
            state = drop_page_cache(store_files(store, list(store.tensors)))
        llm.generate(prompts, params, on_tokens=pauses)
        if job.trace is not None:
            write_trace(pathlib.Path(job.trace), llm.trace)
        return Run(
            metrics=pauses.without(llm.metrics),
            placement=llm.placement,
            page_cache=f"{state}, {'direct' if store.direct_io else 'buffered'}",
            peak_rss_bytes=_peak_rss_bytes() or llm.metrics["peak_rss_bytes"],
            in_pauses=pauses.rates,
        )


def _peak_rss_bytes() -> int | None:
    """The largest resident size since the peak was cleared; None if nobody knows."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _main(args: argparse.Namespace) -> None:
    json.dump(measure(job_from_json(args.job)), sys.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.measure", description="Runs what bench.run hands over."
    )
    parser.add_argument("job", metavar="JOB", help="as JSON")
    sys.exit(run_command(_main, parser))
