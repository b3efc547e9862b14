"""Text to token ids and back, from the tokenizer files of a Hugging Face checkpoint.

A checkpoint has either `tokenizer.json` or, as every published OPT does, GPT-2's
`vocab.json` and `merges.txt`, with OPT's own rule that `</s>` stands in front.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, processors

# What OPT's special tokens are where no file says so.
OPT_SPECIAL_TOKENS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns text into token ids and back."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]  # by role, such as "bos_token"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, behind the bos token where the checkpoint wants one.

        It stands there only with `add_special_tokens`.

        Raises:
            ValueError: the text cannot be written as UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt is not valid Unicode text: {error}") from error
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, without special tokens.

        Bytes that are no UTF-8, such as half a character, become U+FFFD.
        """
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    @property
    def checksum(self) -> str:
        """xxh3_128 of its tables, rules and special tokens, in hexadecimal."""
        content = json.dumps([self.backend.to_str(), self.special_tokens])
        return xxhash.xxh3_128_hexdigest(content.encode())

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model may have more rows."""
        return self.backend.get_vocab_size()

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Whether `load_tokenizer` would find files to read in `folder`."""
    names = ("tokenizer.json", "vocab.json")
    return any((folder / name).is_file() for name in names)


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer of the checkpoint in `folder`.

    Raises:
        ValueError: there is none, or a file is malformed; the message names the file.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(folder, settings)
    if (folder / "tokenizer.json").is_file():
        backend = _load_json(folder / "tokenizer.json")
        adds_bos = settings.get("add_bos_token")  # None: as tokenizer.json has it
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        special_tokens = special_tokens or OPT_SPECIAL_TOKENS
        backend = _load_gpt2(folder, settings)
        backend.add_special_tokens(
            [tokenizers.AddedToken(token) for token in special_tokens.values()]
        )
        # Hugging Face's default is no bos; a folder that lost the file is still OPT's.
        adds_bos = settings.get("add_bos_token", not settings)
    else:
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and "
            "merges.txt), so prompts must be given as token ids"
        )
    tokenizer = Tokenizer(backend, special_tokens)
    if adds_bos is not None:
        _set_bos(tokenizer, folder, wanted=adds_bos)
    return tokenizer


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def _special_tokens(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """Special tokens by role; `special_tokens_map.json` decides where both files do."""
    path = folder / "special_tokens_map.json"
    found = {}
    for role, value in (settings | _read_object(path)).items():
        if role not in OPT_SPECIAL_TOKENS or value is None:
            continue
        # Either the token itself, or an object that says how it takes up spaces.
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise ValueError(
                f"{folder}: {role} in special_tokens_map.json or tokenizer_config.json "
                f"is {value!r}, expected a string or an object with 'content'"
            )
        found[role] = content
    return found


def _load_json(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a valid tokenizer file: {error}") from error
    # A file may have been saved with these on; prompts are never cut or padded here.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _load_gpt2(folder: pathlib.Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from `vocab.json` and `merges.txt`."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not all(type(token_id) is int for token_id in _read_object(vocab).values()):
        raise ValueError(f"{vocab} must map every token to an integer id")
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{merges} is not a list of merges for {vocab}: {error}"
        ) from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _set_bos(tokenizer: Tokenizer, folder: pathlib.Path, *, wanted: bool) -> None:
    """Makes `encode` put the bos token in front, or not."""
    bos_id = tokenizer.bos_token_id
    if wanted and bos_id is None:
        raise ValueError(
            f"{folder}/tokenizer_config.json asks for a bos token in front of every "
            "prompt (add_bos_token), but no file names a bos_token"
        )
    if (tokenizer.encode("") == [bos_id]) == wanted:
        return
    bos = tokenizer.special_tokens.get("bos_token", "")
    tokenizer.backend.post_processor = (
        processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, bos_id)]
        )
        if wanted
        else processors.ByteLevel(trim_offsets=False)
    )
