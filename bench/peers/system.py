"""What a comparison asks of a system, and what a run of one tells."""

import dataclasses
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every system has to do: greedy tokens after random prompts.

    Attributes:
        weights_bytes: size of the model's weights.
        kv_cache_bytes: size of the keys and values of one prompt and its tokens.
        weights: folders with the same weights, by format.
    """

    prompt_len: int
    gen_len: int
    memory_cap_bytes: int | None
    weights_bytes: int
    kv_cache_bytes: int
    weights: Mapping[str, pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a system is told to do a job, and how many prompts it then runs at once."""

    arguments: tuple[str, ...]
    num_rows: int

    def __str__(self) -> str:
        return " ".join(self.arguments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The figures of a run that came to its end.

    Attributes:
        prefill_s: seconds until the first token of every row.
        step_s: seconds of each step after that.
        peak_rss_bytes: the largest resident size of the process.
        versions: of the packages that count.
    """

    prefill_s: float
    step_s: tuple[float, ...]
    peak_rss_bytes: int
    versions: Mapping[str, str]

    def is_projected(self, gen_len: int) -> bool:
        """Whether a run of `gen_len` tokens is more than was measured."""
        return len(self.step_s) < gen_len - 1

    def decode_s(self, gen_len: int) -> float:
        """Seconds of all steps after prefill in a run of `gen_len` tokens.

        Steps that were not run take as long as those that were. The first does not
        count for that: it still pays for what prefill pushed out of the page cache.
        """
        if self.is_projected(gen_len):
            return statistics.mean(self.step_s[1:]) * (gen_len - 1)
        return sum(self.step_s)


@dataclasses.dataclass(frozen=True)
class Failed:
    """Why a run came to no end."""

    reason: str
    killed_for_memory: bool = False


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One run of a system, as the whole or a part of a run of `gen_len` tokens."""

    setting: Setting
    gen_len: int
    outcome: Measured | Failed

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens / (prefill + decode seconds); none a second if it failed."""
        match self.outcome:
            case Failed():
                return 0.0
            case Measured() as measured:
                seconds = measured.prefill_s + measured.decode_s(self.gen_len)
                return self.setting.num_rows * self.gen_len / seconds

    @property
    def counts(self) -> bool:
        """Whether it is a whole run that came to its end."""
        return isinstance(self.outcome, Measured) and not self.outcome.is_projected(
            self.gen_len
        )


class System(Protocol):
    """A system that can do a job: one small class each."""

    @property
    def name(self) -> str: ...

    @property
    def weights_format(self) -> str:
        """The key of `Job.weights` that it reads."""
        ...

    def check(self) -> None:
        """Raises ValueError, with what to do, if the system is not installed."""

    def ladders(self, job: Job) -> Sequence[Sequence[Setting]]:
        """Settings worth trying, in lists that ask for more and more memory."""
        ...

    def command(self, job: Job, setting: Setting, report: pathlib.Path) -> list[str]:
        """The process that does `job` and writes `report`."""
        ...

    def read(self, report: Mapping[str, Any]) -> Measured:
        """The figures in a report."""
        ...
