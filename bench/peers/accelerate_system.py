"""Hugging Face accelerate, with decoder layers on disk or in host memory."""

import dataclasses
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.system import Job, Measured, Setting
from bench.peers.weights import HUGGING_FACE

PYTHON = pathlib.Path(__file__).parents[2] / ".venv-peers/bin/python"
SCRIPT = pathlib.Path(__file__).with_name("accelerate_offload.py")
BATCH_SIZES = (8, 16, 32, 40, 48, 64, 96, 128, 192, 256)
PACKAGES = ("accelerate", "torch", "transformers")
LAYERS = ("disk", "host")
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Accelerate:
    """Accelerate in an environment of its own, whose interpreter is `python`."""

    batch_sizes: Sequence[int] = BATCH_SIZES
    layers: Sequence[str] = LAYERS
    python: pathlib.Path = PYTHON
    name: str = "accelerate"
    weights_format: str = HUGGING_FACE

    def check(self) -> None:
        find = f"import importlib.util as u; all(map(u.find_spec, {PACKAGES})) or 1 / 0"
        command = [str(self.python), "-c", find]
        try:
            subprocess.run(command, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"accelerate is not installed at {self.python}; run `make peers`, or "
                "leave the peers out with --only flexjax"
            ) from error

    def ladders(self, job: Job) -> Sequence[Sequence[Setting]]:
        return [
            [
                Setting(("--batch-size", str(size), "--layers", layers), size)
                for size in self.batch_sizes
            ]
            for layers in self.layers
        ]

    def command(self, job: Job, setting: Setting, report: pathlib.Path) -> list[str]:
        return [
            *(str(self.python), str(SCRIPT)),
            *("--checkpoint", str(job.weights[HUGGING_FACE])),
            *("--prompt-len", str(job.prompt_len), "--gen-len", str(job.gen_len)),
            *("--json", str(report)),
            *setting.arguments,
        ]

    def read(self, report: Mapping[str, Any]) -> Measured:
        if report["dtype"] != DTYPE:
            raise ValueError(f"accelerate ran in {report['dtype']}, not in {DTYPE}")
        return Measured(
            prefill_s=report["prefill_s"],
            step_s=tuple(report["step_s"]),
            peak_rss_bytes=report["peak_rss_bytes"],
            versions=report["versions"],
        )
