"""A job that is run in two ways, each in a process of its own, under the same cap.

Both compile as they go, as a user's run does.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bench.machine import describe_machine
from bench.memory_cap import ensure_can_cap, result_under_cap
from bench.synthetic import weights_folder
from checkpoints_tools.resolve import resolve_model
from flexjax.cache_folder import default_cache
from flexjax.checkpoint import EMBEDDED_MODEL, WeightStore, open_store
from flexjax.plan.calibrate import calibrated
from flexjax.safe_files import ensure_writable, write_atomically
from flexjax.sizes import parse_bytes


def measure_machine(folder: pathlib.Path) -> None:
    """Measures this machine, if it never was before, so that neither way does."""
    calibrated(folder, jax.devices()[0], lambda text: print(text, file=sys.stderr))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoWays:
    """A job, and two ways to do it.

    Attributes:
        module: whose command line this is.
        names: of both ways, as keys of the JSON; the second is a switch too.
        switch_help: what the second way is.
        run: runs a model's job in this process, given a folder to spill to and whether
            in the second way; what it took, as JSON values, `seconds` among them.
        settings: of the job, as JSON values.
        in_words: of both results, in a line.
        prepare: whatever is done once for both.
    """

    module: str
    names: tuple[str, str]
    switch_help: str
    run: Callable[[WeightStore, pathlib.Path, bool], dict[str, Any]]
    settings: Callable[[], dict[str, Any]]
    in_words: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    prepare: Callable[[pathlib.Path], object] = lambda folder: None

    @property
    def switch(self) -> str:
        return f"--{self.names[1].replace('_', '-')}"

    def parser(self, description: str) -> argparse.ArgumentParser:
        """The command line."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}", description=description
        )
        parser.add_argument("model", help="a published model, such as opt-1.3b")
        parser.add_argument(
            "--memory-cap",
            metavar="SIZE",
            help="memory of the machine; without, one run is made here, as it is",
        )
        parser.add_argument(
            self.switch,
            dest="is_second",
            action="store_true",
            help=f"of one run: {self.switch_help}",
        )
        parser.add_argument(
            "--json", type=pathlib.Path, metavar="FILE", help="write the result here"
        )
        return parser

    def main(self, args: argparse.Namespace) -> None:
        """Runs the parsed command line."""
        if args.memory_cap is None and args.json is not None:
            raise ValueError("--json is for what --memory-cap compares; give a cap")
        if args.memory_cap is not None and args.is_second:
            raise ValueError(f"{self.switch} is of one run; --memory-cap makes both")
        folder = default_cache()
        if args.memory_cap is None:  # the process that a cap holds for
            weights = resolve_model(weights_folder(args.model) or EMBEDDED_MODEL)
            print(json.dumps(self.run(open_store(weights), folder, args.is_second)))
            return
        cap_bytes = parse_bytes(args.memory_cap)
        ensure_can_cap(cap_bytes)
        if args.json is not None:
            ensure_writable("--json", args.json)
        resolve_model(weights_folder(args.model) or EMBEDDED_MODEL)  # once for both
        self.prepare(folder)
        first = result_under_cap(self.module, [args.model], cap_bytes)
        second = result_under_cap(self.module, [args.model, self.switch], cap_bytes)
        ratio = second["seconds"] / first["seconds"]
        in_words = self.in_words(first, second)
        print(f"{in_words}: {ratio:.2f} times as long")
        if args.json is None:
            return
        command = f"python -m {self.module} {args.model} --memory-cap {args.memory_cap}"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report = {
            "model": args.model,
            **self.settings(),
            "memory_cap_bytes": cap_bytes,
            **dict(zip(self.names, (first, second), strict=True)),
            "in_words": in_words,
            "ratio": ratio,
            "machine": describe_machine(folder),
            "date": now,
            "command": command,
        }
        write_atomically(args.json, json.dumps(report, indent=1).encode() + b"\n")
