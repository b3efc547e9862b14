"""flexjax itself, through `python -m bench.run`."""

import argparse
import dataclasses
import math
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.system import Job, Measured, Setting
from bench.peers.weights import STORE
from flexjax.host_facts import physical_memory_bytes
from flexjax.policy_args import add_policy_arguments, policy_from_args

BLOCKS = ((64, 1), (64, 2), (64, 4))  # batch_size, num_batches
# Of the memory there is: how large weights may be to stay in it, and the cache.
WEIGHTS_SHARE = 0.5
CACHE_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class Flexjax:
    """flexjax with the given settings, or else those of `default_ladders`."""

    settings: Sequence[Setting] = ()
    name: str = "flexjax"
    weights_format: str = STORE

    def check(self) -> None:
        """It is here."""

    def ladders(self, job: Job) -> Sequence[Sequence[Setting]]:
        return [[s] for s in self.settings] or default_ladders(job)

    def command(self, job: Job, setting: Setting, report: pathlib.Path) -> list[str]:
        return [
            *(sys.executable, "-m", "bench.run", "--cold"),
            *("--model", str(job.weights[STORE])),
            *("--prompt-len", str(job.prompt_len), "--gen-len", str(job.gen_len)),
            *("--json", str(report)),
            *setting.arguments,
        ]

    def read(self, report: Mapping[str, Any]) -> Measured:
        return Measured(
            prefill_s=report["prefill"]["seconds"],
            step_s=tuple(report["step_s"]),
            peak_rss_bytes=report["peak_rss_bytes"],
            versions=report["machine"]["versions"],
        )


def default_ladders(job: Job) -> list[list[Setting]]:
    """Blocks of growing size, for a machine whose device is its CPU.

    Weights are on disk unless they leave half of the memory free. A byte of cache saves
    as much reading as a byte of weights does, so the cache takes what memory there is;
    the second ladder does with less, all of its cache being on disk.
    """
    memory_bytes = job.memory_cap_bytes or physical_memory_bytes()
    fits = job.weights_bytes <= WEIGHTS_SHARE * memory_bytes
    weights = "device=1" if fits else "disk=1"

    def setting(batch_size: int, num_batches: int, host: float) -> Setting:
        num_rows = batch_size * num_batches
        arguments = (
            *("--batch-size", str(batch_size), "--num-batches", str(num_batches)),
            *("--weights", weights),
            *("--kv-cache", f"host={host:g}" if host else "disk=1"),
            *("--activations", "device=1"),
        )
        return Setting(arguments, num_rows)

    def host_share(num_rows: int) -> float:
        share = CACHE_SHARE * memory_bytes / (num_rows * job.kv_cache_bytes)
        return min(1.0, math.floor(100 * share) / 100)

    return [
        [setting(size, count, host_share(size * count)) for size, count in BLOCKS],
        [setting(size, count, 0.0) for size, count in BLOCKS],
    ]


def parse_setting(text: str) -> Setting:
    """A setting from arguments of `bench.run` that say a policy.

    Raises:
        ValueError: they do not.
    """
    parser = argparse.ArgumentParser(
        add_help=False, exit_on_error=False, allow_abbrev=False
    )
    add_policy_arguments(parser)
    try:
        words = shlex.split(text)
        args, unknown = parser.parse_known_args(words)
        if unknown:
            raise ValueError(f"{unknown[0]} says nothing about a policy")
        return Setting(tuple(words), policy_from_args(args).block_size)
    except (argparse.ArgumentError, ValueError) as error:
        raise ValueError(f"--our-settings {text!r}: {error}") from error
