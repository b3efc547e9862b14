"""Prompts that are read from a file when they are wanted."""

import array
import json
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import IO, overload

import xxhash

from flexjax.prompts import Prompt

_JSON_LINES = (".jsonl", ".ndjson")
_MARK = "\ufeff"  # what some editors put in front of the first line
_EXPECTED = (
    "expected a text in quotes, a list of token ids, or an object that has one of them "
    'as "prompt", on a line of its own'
)


class PromptFile(Sequence[Prompt]):
    """A prompt a line; blank lines are left out.

    A line is a text; or in a `.jsonl` or `.ndjson` file, and where the first line is
    such an object or list, JSON: a text, a list of token ids, or an object that has one
    of them as "prompt". Of each line no more is kept in memory than where it begins,
    and a checksum.

    Attributes:
        path: of the file.
        checksum: xxh3_128 of its bytes, in hexadecimal.

    Raises:
        ValueError: the file cannot be read, has no prompt, or a line is none; the
            message counts lines from 1.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path = pathlib.Path(path)
        self._is_json = path.suffix.lower() in _JSON_LINES
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
        text = self._text(index)
        return _prompt_of(text) if self._is_json else text

    def name(self, index: int) -> str:
        """Where a prompt stands, for messages."""
        return f"line {self._numbers[index]} of {self.path}"

    def json(self, index: int) -> str:
        """The whole line of a prompt as JSON, with whatever else it has, as it is.

        Raises:
            ValueError: it has changed.
            OSError: it cannot be read any more.
        """
        text = self._text(index)
        return text.strip() if self._is_json else json.dumps(text, ensure_ascii=False)

    def _text(self, index: int) -> str:
        self._file.seek(self._starts[index])
        line = self._file.readline()
        if xxhash.xxh3_64_intdigest(line) != self._checksums[index]:
            raise ValueError(
                f"{self.name(index)} has changed since it was first read; leave the "
                "file alone until the run has ended"
            )
        return _decoded(line, self._numbers[index])

    def _read_lines(self) -> None:
        checksum, start = xxhash.xxh3_128(), 0
        try:
            for number, line in enumerate(self._file, 1):
                checksum.update(line)
                if self._is_prompt(line, number):
                    self._starts.append(start)
                    self._numbers.append(number)
                    self._checksums.append(xxhash.xxh3_64_intdigest(line))
                start += len(line)
        except OSError as error:
            raise self._unreadable(error) from error
        if not self._starts:
            raise ValueError(f"{self.path} is empty; write one prompt a line")
        self.checksum = checksum.hexdigest()

    def _is_prompt(self, line: bytes, number: int) -> bool:
        """Whether a line is no blank one; refuses one that cannot be used."""
        try:
            text = _decoded(line, number)
            if not text.strip():
                return False
            if not self._starts:
                self._is_json = self._is_json or _looks_like_json(text)
            if self._is_json:
                _prompt_of(text)
        except ValueError as error:
            raise ValueError(f"line {number} of {self.path} {error}") from error
        return True

    def _unreadable(self, error: OSError) -> ValueError:
        return ValueError(
            f"{self.path} cannot be read: {error.strerror}; name a file with one "
            "prompt a line"
        )


def prompts_path(name: str) -> pathlib.Path:
    """The file that a command line names; `-` is what is piped in."""
    return pathlib.Path("/dev/stdin" if name == "-" else name)


def _decoded(line: bytes, number: int) -> str:
    """The text of a line, without its end.

    Raises:
        ValueError: it is none; the message goes on from the line's name.
    """
    try:
        # Not `splitlines`, which also ends a line at characters that texts contain.
        text = line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not UTF-8 text ({error}); if the file is compressed, unpack it"
        ) from error
    return text.removeprefix(_MARK) if number == 1 else text


def _prompt_of(text: str) -> Prompt:
    """The prompt in a line of JSON.

    Raises:
        ValueError: there is none; the message goes on from the line's name.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is no JSON ({error.msg}, column {error.colno}); {_EXPECTED}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON that can be read; {_EXPECTED}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, (str, list)):
        raise ValueError(f"is no prompt; {_EXPECTED}")
    return prompt


def _looks_like_json(text: str) -> bool:
    """Whether a line is what nobody would want to be continued as it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict):
        return "prompt" in value
    return isinstance(value, list) and {type(item) for item in value} == {int}


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _copied(pipe: IO[bytes]) -> IO[bytes]:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    with pipe:
        shutil.copyfileobj(pipe, copy)
    copy.seek(0)
    return copy
