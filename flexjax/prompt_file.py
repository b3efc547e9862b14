"""Prompts that are read from a file when they are wanted."""

import array
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import IO, Any, overload

import xxhash

from flexjax.prompts import Prompt

_JSON_LINES = (".jsonl", ".ndjson")
_UTF8_MARK = b"\xef\xbb\xbf"  # what some editors put in front


class PromptFile(Sequence[Prompt]):
    """A prompt a line; blank lines are left out.

    A line of a `.jsonl` or `.ndjson` file is a text, a list of token ids, or an object
    that has one of them as "prompt"; a line of any other file is a text. Of each line
    no more is kept in memory than where it begins, and a checksum.

    Attributes:
        path: of the file.
        checksum: xxh3_128 of its bytes, in hexadecimal.

    Raises:
        ValueError: the file cannot be read, has no prompt, or a line is none; the
            message counts lines from 1.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self._is_json = path, path.suffix.lower() in _JSON_LINES
        self._starts, self._numbers = array.array("q"), array.array("q")
        self._checksums = array.array("Q")
        try:
            # Kept open: another file that takes its name then changes nothing.
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115
            if not self._file.seekable():  # a pipe, which can be read once
                self._file = _copied(self._file)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._read_lines()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "PromptFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading of it."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        value = self.line(index)
        return value["prompt"] if isinstance(value, dict) else value

    def line(self, index: int) -> Any:
        """The whole line of a prompt, whatever else it has.

        Raises:
            ValueError: it has changed.
            OSError: it cannot be read any more.
        """
        number = self._numbers[index]
        self._file.seek(self._starts[index])
        line = self._file.readline()
        if xxhash.xxh3_64_intdigest(line) != self._checksums[index]:
            raise ValueError(
                f"line {number} of {self.path} has changed since it was first read; "
                "leave the file alone until the run has ended"
            )
        return self._value(line, number)

    def _read_lines(self) -> None:
        checksum, start = xxhash.xxh3_128(), 0
        try:
            for number, line in enumerate(self._file, 1):
                checksum.update(line)
                if self._value(line, number) is not None:
                    self._starts.append(start)
                    self._numbers.append(number)
                    self._checksums.append(xxhash.xxh3_64_intdigest(line))
                start += len(line)
        except OSError as error:
            raise self._unreadable(error) from error
        if not self._starts:
            raise ValueError(f"{self.path} is empty; write one prompt a line")
        self.checksum = checksum.hexdigest()

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.path} cannot be read: {error.strerror}; name a file with one "
            "prompt a line"
        )

    def _value(self, line: bytes, number: int) -> Any:
        """What a line holds; None if it is blank."""
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        try:
            # Not `splitlines`, which also ends a line at characters that texts contain.
            text = line.decode().removesuffix("\n").removesuffix("\r")
            if not text.strip():
                return None
            value = json.loads(text) if self._is_json else text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {self.path}: {error}") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, (str, list)):
            raise ValueError(
                f"line {number} of {self.path} is no prompt; expected a text, a list "
                'of token ids, or an object with one of them as "prompt"'
            )
        return value


def _copied(pipe: IO[bytes]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with pipe:
        shutil.copyfileobj(pipe, copy)
    copy.seek(0)
    return copy
