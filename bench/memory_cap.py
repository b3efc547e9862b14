"""Runs a command with a limit on its memory, in a cgroup of its own.

The limit holds for the command and all that it starts, page cache included, so that a
model larger than memory is just that. Versions 1 and 2 of cgroups will do; the user
must be allowed to make one.
"""

import codecs
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from flexjax.sizes import format_bytes

_ROOT = pathlib.Path("/sys/fs/cgroup")
_OWN_GROUPS = pathlib.Path("/proc/self/cgroup")
_PREFIX = "flexjax-cap-"
_STDERR_TAIL = 64 << 10  # characters that are kept
_EMPTIES_WITHIN_S = 5.0
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """How a command ended.

    Attributes:
        returncode: negative where a signal ended it.
        stdout: all of it.
        stderr: its end; the whole was shown while the command ran.
        killed_for_memory: whether a process of it was killed at the limit.
        peak_bytes: the most that the group held, page cache included; None if it had
            none, or if the system does not say.
    """

    returncode: int
    stdout: str
    stderr: str
    killed_for_memory: bool
    peak_bytes: int | None


def result_under_cap(module: str, arguments: Sequence[str], cap_bytes: int) -> Any:
    """The JSON that a module prints last, when it is run under a cap.

    Raises:
        OSError: it failed, or was killed for its memory.
    """
    finished = run_capped([sys.executable, "-m", module, *arguments], cap_bytes)
    if finished.returncode:
        lines = finished.stderr.strip().splitlines() or ["it said nothing"]
        why = (
            "it was killed for its memory" if finished.killed_for_memory else lines[-1]
        )
        raise OSError(f"{module} under {cap_bytes} bytes failed: {why}")
    return json.loads(finished.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class _Version:
    """Names of a cgroup version's files."""

    limit: str
    swap: str  # so that swapping does not get around the limit
    swap_allowance: int | None  # None: the limit itself, memory and swap together
    peak: str
    events: str  # the file that counts kills


_V1 = _Version(
    "memory.limit_in_bytes",
    "memory.memsw.limit_in_bytes",
    None,
    "memory.max_usage_in_bytes",
    "memory.oom_control",
)
_V2 = _Version("memory.max", "memory.swap.max", 0, "memory.peak", "memory.events")


@dataclasses.dataclass(frozen=True)
class _Group:
    """A cgroup that was made."""

    folder: pathlib.Path
    version: _Version

    @property
    def procs(self) -> pathlib.Path:
        return self.folder / "cgroup.procs"

    def limit(self, cap_bytes: int) -> None:
        (self.folder / self.version.limit).write_text(str(cap_bytes))
        swap, allowance = self.folder / self.version.swap, self.version.swap_allowance
        if swap.exists():  # it is not where the system counts no swap
            swap.write_text(str(cap_bytes if allowance is None else allowance))

    def kills(self) -> int:
        text = (self.folder / self.version.events).read_text()
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def peak_bytes(self) -> int | None:
        try:
            return int((self.folder / self.version.peak).read_text())
        except OSError:
            return None  # version 2 counts it since Linux 5.19

    def remove(self) -> None:
        """Ends what still runs in the group, and removes it."""
        give_up_s = time.monotonic() + _EMPTIES_WITHIN_S
        while True:
            for pid in self.procs.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self.folder.rmdir()
                return
            except OSError:  # what was killed is still ending
                if time.monotonic() > give_up_s:
                    raise
                time.sleep(0.01)


def ensure_can_cap(cap_bytes: int) -> None:
    """Raises unless a command can be run under this limit; takes milliseconds.

    Raises:
        ValueError: the limit is no limit.
        OSError: this user, or this system, cannot limit memory.
    """
    if cap_bytes < 1:
        raise ValueError(f"a memory cap of {cap_bytes} bytes leaves nothing to run in")
    with _limited_group(cap_bytes) as group:
        # Moving a process takes a right of its own.
        moved = subprocess.run(
            [*_into(group), "true"], capture_output=True, check=False
        )
        if moved.returncode:
            raise OSError(_refusal(cap_bytes, "no process may be moved into it"))


def run_capped(
    command: Sequence[str],
    cap_bytes: int | None,
    *,
    timeout_s: float | None = None,
) -> Finished:
    """Runs `command` to its end; its stderr is shown while it runs.

    Args:
        command: the program and its arguments.
        cap_bytes: the most memory that it may take; None for no limit.
        timeout_s: after which the command and all that it started is ended.

    Raises:
        OSError: the limit cannot be set, or the command cannot be started.
        TimeoutError: it took too long.
    """
    if cap_bytes is None:
        code, stdout, stderr = _run([], command, timeout_s)
        return Finished(
            returncode=code,
            stdout=stdout,
            stderr=stderr,
            killed_for_memory=False,
            peak_bytes=None,
        )
    with _limited_group(cap_bytes) as group:
        code, stdout, stderr = _run(_into(group), command, timeout_s)
        return Finished(
            returncode=code,
            stdout=stdout,
            stderr=stderr,
            killed_for_memory=group.kills() > 0,
            peak_bytes=group.peak_bytes(),
        )


def _into(group: _Group) -> list[str]:
    """What to put before a command so that it moves into `group` before it starts."""
    return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs)]


@contextlib.contextmanager
def _limited_group(cap_bytes: int) -> Iterator[_Group]:
    group = _make_group(cap_bytes)
    try:
        yield group
    finally:
        group.remove()


def _make_group(cap_bytes: int) -> _Group:
    reason = "no cgroup with memory in it is mounted"
    for parent, version in _parents():
        _sweep(parent)
        group = _Group(parent / f"{_PREFIX}{os.getpid()}-{next(_numbers)}", version)
        try:
            group.folder.mkdir()
        except OSError as error:
            reason = f"no cgroup may be made: {error.strerror}"
            continue
        try:
            group.limit(cap_bytes)
        except OSError as error:
            group.remove()
            reason = f"the cgroup takes no limit: {error.strerror}"
            continue
        return group
    raise OSError(_refusal(cap_bytes, reason))


def _refusal(cap_bytes: int, reason: str) -> str:
    return (
        f"memory cannot be capped at {format_bytes(cap_bytes)} ({reason}); run as a "
        "user who may make cgroups, or leave the cap out"
    )


def _parents() -> Iterator[tuple[pathlib.Path, _Version]]:
    """Folders that may take a new group, the nearest to this process's own first."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version = _V1 if controllers else _V2
        own = pathlib.PurePosixPath(path.strip("/"))
        for group in (own, *own.parents):
            folder = _ROOT / controllers / group
            if version is _V1 or _hands_memory_down(folder):
                yield folder, version


def _hands_memory_down(folder: pathlib.Path) -> bool:
    """Whether groups in a group of version 2 can limit memory; tries to let them."""
    control = folder / "cgroup.subtree_control"
    try:
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
    except OSError:
        return False  # no right, or the group has processes of its own
    return True


def _sweep(parent: pathlib.Path) -> None:
    """Removes groups whose makers were killed; one with processes in it stays."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if not pathlib.Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _run(
    prefix: Sequence[str],
    command: Sequence[str],
    timeout_s: float | None,
) -> tuple[int, str, str]:
    """Exit status, stdout and the end of stderr of `command`."""
    process = subprocess.Popen(
        [*prefix, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that all of it can be ended
    )
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = _Reader(process.stdout), _Reader(process.stderr, sys.stderr)
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"{' '.join(command)} was ended: it took more than {timeout_s:g} s"
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        texts = stdout.text(), stderr.text()
    return code, *texts


class _Reader:
    """Reads a pipe to its end in a thread of its own.

    What is also shown, on `shown`, is only kept as far as its end.
    """

    def __init__(self, pipe: IO[bytes], shown: IO[str] | None = None) -> None:
        self._pipe, self._shown, self._text = pipe, shown, ""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def text(self) -> str:
        """All that was read, once the pipe has ended."""
        self._thread.join()
        self._pipe.close()
        return self._text

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts: list[str] = []
        while piece := os.read(self._pipe.fileno(), 1 << 16):
            parts.append(decoder.decode(piece))
            if self._shown is not None:
                # Whoever looks may have gone; the pipe must be emptied all the same.
                with contextlib.suppress(OSError, ValueError):
                    self._shown.write(parts[-1])
                    self._shown.flush()
                parts = ["".join(parts)[-_STDERR_TAIL:]]
        self._text = "".join(parts)
