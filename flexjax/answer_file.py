"""Answers to a file of prompts, which outlive the run that writes them."""

import array
import contextlib
import fcntl
import functools
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
    a run that was killed, or a disk that was full, left half-written is dropped. While
    it is open, no one else can open it.

    Args of the constructor:
        path: of the finished file.
        count: of the prompts.

    Attributes:
        partial: the path while answers are missing.

    Raises:
        ValueError: there is a finished file, or the partial one is something else, or
            is being written; the message says what to do.
        OSError: the disk failed.
    """

    def __init__(self, path: pathlib.Path, count: int) -> None:
        self.path = pathlib.Path(path).resolve()  # a link's target, if it is one
        self.partial = partial_path(self.path)
        refuse_finished(self.path)
        make_folder(self.path.parent)
        self.count = count
        self._starts = array.array("q", [_UNKNOWN]) * count
        self._end, self._header = 0, b""
        with contextlib.ExitStack() as undo:
            self._file = self._open()
            undo.callback(os.close, self._file)
            self._lock()
            undo.callback(self._remove_if_empty)
            refuse_finished(self.path)  # by who held the lock a moment ago
            self._check_kind()
            self._undo = undo.pop_all()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the file to others; may be called again."""
        self._undo.close()

    def begin(self, task: Mapping[str, Any]) -> None:
        """Finds the answers that are there.

        Args:
            task: what answers depend on, by names that users know, as JSON values.

        Raises:
            ValueError: there are some, and they were begun with another task.
            OSError: the disk failed.
        """
        begun, num_lines = None, 0
        for start, line in self._whole_lines():
            if start == 0:
                begun = _parsed(line).get(_HEADER)
            else:
                self._take(_parsed(line), start)
            self._end, num_lines = start + len(line), num_lines + 1
        if num_lines > 1:
            self._check_task(begun, task)
        else:
            self._end = 0  # there is no answer that could be lost
        os.ftruncate(self._file, self._end)
        self._header = _line(json.dumps({_HEADER: task}, ensure_ascii=False))

    def missing(self) -> list[int]:
        """The prompts without an answer, by their index."""
        return [i for i, start in enumerate(self._starts) if start == _UNKNOWN]

    def add(self, answers: Mapping[int, str]) -> None:
        """Writes answers; they are on the disk then.

        Args:
            answers: JSON objects of a line each that have the "index" of their prompt,
                by that.

        Raises:
            OSError: they are not.
        """
        header = b"" if self._end else self._header
        lines = {index: _line(text) for index, text in answers.items()}
        start = self._end + len(header)
        self._append(header + b"".join(lines.values()))
        if header:
            sync_path(self.path.parent)
        for index, line in lines.items():
            self._starts[index] = start
            start += len(line)

    def finish(self) -> None:
        """Puts all answers into the order of their prompts, under the final name.

        Raises:
            OSError: there is no room for that; nothing is lost.
        """
        assert not self.missing(), "some prompts have no answer"
        self._check_name()
        # One name, so that the next try takes the place of what a kill leaves.
        beside = self.path.with_name(f".{self.path.name}.whole")
        try:
            write_pieces_atomically(self.path, self._ordered(), beside=beside)
        except OSError as error:
            raise OSError(
                f"{error}; all answers are kept in {self.partial}: when the disk takes "
                "as much again, run the same command once more"
            ) from error
        self.partial.unlink()

    def _ordered(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as file:
            for start in self._starts:
                file.seek(start)
                yield file.readline()

    def _open(self) -> int:
        try:
            return os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OSError(
                f"{self.partial} cannot be written: {error.strerror}; name another file"
            ) from error

    def _lock(self) -> None:
        """Keeps out who would write to it too, until it is closed."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.partial} is being written by another process; wait for it, or "
                "name another file"
            ) from error
        except OSError as error:
            raise OSError(
                f"{self.partial} cannot be locked: {error.strerror}; name a file on "
                "another disk"
            ) from error

    def _remove_if_empty(self) -> None:
        if os.fstat(self._file).st_size == 0 and self._has_name():
            self.partial.unlink()

    def _has_name(self) -> bool:
        """Whether the file that is open is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(self._file), self.partial.stat())
        except FileNotFoundError:
            return False

    def _check_name(self) -> None:
        if not self._has_name():
            raise OSError(
                f"{self.partial} was removed or replaced while it was written; its "
                "answers are lost: leave it alone until the run has ended"
            )

    def _check_kind(self) -> None:
        """Refuses a file that is none of answers; but not what a power cut leaves."""
        begin = os.pread(self._file, len(_BEGIN), 0)
        if begin != _BEGIN[: len(begin)] and not self._is_zero():
            raise ValueError(
                f"{self.partial} is no file of answers that was begun; name another "
                "file, or remove it"
            )

    def _is_zero(self) -> bool:
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            pieces = iter(functools.partial(file.read, 1 << 20), b"")
            return not any(piece.strip(b"\0") for piece in pieces)

    def _whole_lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines with where they begin, up to where the writing was stopped."""
        start = 0
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n") or not (start or line.startswith(_BEGIN)):
                    return
                yield start, line
                start += len(line)

    def _check_task(self, begun: Any, task: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(task))
        begun = begun if isinstance(begun, dict) else {}
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
        self._check_name()
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
    """Raises ValueError if there is something of that name."""
    if path.exists():
        also = partial_path(path)
        if also.exists():
            raise ValueError(
                f"{path} is there already; if a run made it, it is whole, and "
                f"{also.name} is what that run left; name another file, or remove both "
                "to begin anew"
            )
        raise ValueError(
            f"{path} is there already; name another file, or remove it to begin anew"
        )


def _line(text: str) -> bytes:
    # Half a surrogate pair, which is no character, becomes the escape that JSON has.
    return text.encode(errors="backslashreplace") + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """The object that a line holds; an empty one if it holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
