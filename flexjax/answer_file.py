"""Answers to a file of prompts, which outlive the run that writes them."""

import array
import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from flexjax.safe_files import make_folder, sync_path, write_pieces_atomically

_HEADER = "answers_to"
_BEGIN = f'{{"{_HEADER}": '.encode()  # of a partial file
_UNKNOWN = -1


class AnswerFile:
    """A JSON line for each prompt, in their order, once all are there.

    Until then they are in `<path>.partial`, in the order in which they came, behind a
    line that says what they answer. Whoever opens it again goes on where it ended: what
    a run that was killed, or a disk that was full, left half-written is dropped.

    Args of the constructor:
        path: of the finished file.
        task: what the answers depend on, by names that users know, as JSON values.
        count: of the prompts.

    Attributes:
        partial: the path while answers are missing.

    Raises:
        ValueError: there is a finished file, or the partial one answers something else
            or is being written; the message says what to do.
        OSError: the disk failed.
    """

    def __init__(self, path: pathlib.Path, task: Mapping[str, Any], count: int) -> None:
        self.path = path.absolute()
        self.partial = partial_path(self.path)
        refuse_finished(self.path)
        make_folder(self.path.parent)
        self._starts = array.array("q", [_UNKNOWN]) * count
        self._file = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            refuse_finished(self.path)  # by who held the lock a moment ago
            self._end = self._read(task)
            os.ftruncate(self._file, self._end)
            if self._end == 0:
                self._append(_line({_HEADER: task}))
                sync_path(self.path.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the file to others."""
        os.close(self._file)

    def missing(self) -> list[int]:
        """The prompts without an answer, by their index."""
        return [i for i, start in enumerate(self._starts) if start == _UNKNOWN]

    def add(self, answers: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes answers, by the index of their prompt; they are on the disk then.

        Raises:
            OSError: they are not.
        """
        lines = {index: _line({"index": index, **a}) for index, a in answers.items()}
        start = self._end
        self._append(b"".join(lines.values()))
        for index, line in lines.items():
            self._starts[index] = start
            start += len(line)

    def finish(self) -> None:
        """Puts all answers into the order of their prompts, under the final name.

        Raises:
            OSError: there is no room for that; nothing is lost.
        """
        assert not self.missing(), "some prompts have no answer"
        try:
            write_pieces_atomically(self.path, self._lines())
        except OSError as error:
            raise OSError(
                f"{error}; all answers are in {self.partial}: make room for "
                "as much again, and run the same command once more"
            ) from error
        self.partial.unlink()

    def _lines(self) -> Iterator[bytes]:
        with open(self.partial, "rb") as file:
            for start in self._starts:
                file.seek(start)
                yield file.readline()

    def _lock(self) -> None:
        """Keeps out who would write to it too, until it is closed."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.partial} is being written by another process; wait for it, or "
                "name another file"
            ) from error

    def _read(self, task: Mapping[str, Any]) -> int:
        """Finds the answers that are there; returns where the last whole line ends."""
        end = 0
        with open(self.partial, "rb") as file:
            for line in file:
                if end == 0 and line[: len(_BEGIN)] != _BEGIN[: len(line)]:
                    raise ValueError(
                        f"{self.partial} is no file of answers that was begun; name "
                        "another file, or remove it"
                    )
                if not line.endswith(b"\n"):  # it was stopped here
                    break
                if end == 0:
                    self._check_task(_parsed(line).get(_HEADER, {}), task)
                else:
                    self._take(_parsed(line), end)
                end += len(line)
        return end

    def _check_task(self, begun: dict[str, Any], task: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(task))
        for name in wanted | begun:
            if begun.get(name) != wanted.get(name):
                raise ValueError(
                    f"{self.partial} was begun with {name} {begun.get(name)!r}, and "
                    f"this run has {wanted.get(name)!r}; run it as it was begun, name "
                    "another file, or remove it"
                )

    def _take(self, values: dict[str, Any], start: int) -> None:
        index = values.get("index")
        # What is no answer is passed over: its prompt will be answered again.
        if type(index) is int and 0 <= index < len(self._starts):
            self._starts[index] = start

    def _append(self, data: bytes) -> None:
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise OSError(
                f"cannot write {self.partial}: {error.strerror}; what it has is kept: "
                "when there is room, run the same command once more"
            ) from error
        self._end += len(data)


def partial_path(path: pathlib.Path) -> pathlib.Path:
    """Where answers are until all are there."""
    return path.with_name(f"{path.name}.partial")


def refuse_finished(path: pathlib.Path) -> None:
    """Raises ValueError if there is such a file, or what is no file."""
    if path.exists():
        raise ValueError(
            f"{path} is there already; name another file, or remove it to begin anew"
        )


def _line(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=False)
    # Half a surrogate pair, which is no character, becomes the escape that JSON has.
    return text.encode(errors="backslashreplace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The object that a line holds; an empty one if it holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
