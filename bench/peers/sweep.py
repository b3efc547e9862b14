"""Finds a system's best setting by short runs, then runs that one in full."""

import dataclasses
from collections.abc import Callable, Iterable

from bench.peers.system import Attempt, Failed, Job, Setting, System

PATIENCE = 2  # settings in a row, no faster than one before, that end a ladder
# Makes a run of so many tokens, as a part or the whole of the job.
Run = Callable[[Setting, int], Attempt]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a system came to.

    Attributes:
        name: of the system.
        attempts: every run, in their order.
        best: the one that stands for the system; None if all failed.
    """

    name: str
    attempts: tuple[Attempt, ...]
    best: Attempt | None


def find_best(
    system: System, job: Job, run: Run, *, sweep_len: int, projected: bool = False
) -> Result:
    """Sweeps the settings of `system` in runs of `sweep_len` tokens; the best runs on.

    A setting that is too large for a whole run, if not for a short one, gives way to
    the next best. Where there is but one setting, no short run is made.

    Args:
        system: what has settings.
        job: what it does.
        run: runs a setting.
        sweep_len: tokens of the short runs, at least 3.
        projected: let the best short run stand for the system.
    """
    ladders = system.ladders(job)
    settings = [setting for ladder in ladders for setting in ladder]
    attempts: list[Attempt] = []
    if projected or len(settings) > 1:
        short_len = min(sweep_len, job.gen_len)
        for ladder in ladders:
            attempts += climb(ladder, lambda setting: run(setting, short_len))
        done = [a for a in attempts if not isinstance(a.outcome, Failed)]
        done.sort(key=lambda attempt: attempt.tokens_per_s, reverse=True)
        if done and (projected or done[0].counts):
            return Result(system.name, tuple(attempts), done[0])
        settings = [attempt.setting for attempt in done]
    for setting in settings:
        attempts.append(run(setting, job.gen_len))
        if attempts[-1].counts:
            return Result(system.name, tuple(attempts), attempts[-1])
    return Result(system.name, tuple(attempts), None)


def climb(
    ladder: Iterable[Setting], run: Callable[[Setting], Attempt]
) -> list[Attempt]:
    """Runs settings until one fails or larger ones stop being faster."""
    attempts: list[Attempt] = []
    best, tries_since_best = 0.0, 0
    for setting in ladder:
        attempt = run(setting)
        attempts.append(attempt)
        if isinstance(attempt.outcome, Failed):
            break
        if attempt.tokens_per_s > best:
            best, tries_since_best = attempt.tokens_per_s, 0
        else:
            tries_since_best += 1
        if tries_since_best == PATIENCE:
            break
    return attempts
