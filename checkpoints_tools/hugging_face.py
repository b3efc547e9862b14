"""Finding the weights in a folder with a Hugging Face checkpoint."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

from checkpoints_tools.safetensors_file import open_safetensors
from checkpoints_tools.source import Source, SourceTensor, make_source
from checkpoints_tools.torch_bin import open_bin
from flexjax.models.config import read_config
from flexjax.safe_files import write_atomically

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)

Opener = Callable[[pathlib.Path], dict[str, SourceTensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """One format of weights: how its files are called and what opens one."""

    pattern: str
    single: str
    opener: Opener

    @property
    def index(self) -> str:
        """Name of the file that says which shard holds a tensor."""
        return f"{self.single}.index.json"


KINDS = (  # the better one first
    Kind(pattern="*.safetensors", single="model.safetensors", opener=open_safetensors),
    Kind(pattern="pytorch_model*.bin", single="pytorch_model.bin", opener=open_bin),
)
PATTERNS = " nor ".join(kind.pattern for kind in KINDS)


def open_hugging_face(folder: pathlib.Path) -> Source:
    """The checkpoint in `folder`: `*.safetensors`, or else `pytorch_model*.bin`.

    Raises:
        ValueError: no config, no weights, or weights that are not whole.
    """
    config = read_config(folder)
    for kind in KINDS:
        table = _read_index(folder / kind.index)
        if (folder / kind.single).is_file():
            files, table = [folder / kind.single], None
        elif table is None:
            files = sorted(folder.glob(kind.pattern))
        else:
            files = sorted(set(table.values()))
        if files:
            tensors = _open_all(files, kind.opener)
            _check_index(table or {}, tensors, folder / kind.index)
            return make_source(
                folder, config, tensors, [folder / "config.json", *files]
            )
    raise ValueError(
        f"{folder} has a config.json but no weights: neither {PATTERNS} is there; give "
        "a folder with a whole checkpoint"
    )


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `target` have the small files that turn text into ids as `source` has them.

    Each is all there at any time, since another process may be reading it.
    """
    for name in TOKENIZER_FILES:
        wanted, found = (
            path.read_bytes() if path.is_file() else None
            for path in (source / name, target / name)
        )
        if wanted is None:
            (target / name).unlink(missing_ok=True)
        elif wanted != found:
            write_atomically(target / name, wanted)


def _open_all(files: list[pathlib.Path], opener: Opener) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; download it again")
        for name, tensor in opener(path).items():
            if name in tensors:
                raise ValueError(
                    f"tensor {name!r} is in {tensors[name].file.name} and in "
                    f"{path.name} of {path.parent}; remove one of the files"
                )
            tensors[name] = tensor
    return tensors


def _read_index(path: pathlib.Path) -> dict[str, pathlib.Path] | None:
    """The file of every tensor; None if the checkpoint has no index."""
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): path.parent / file for name, file in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); download it again") from error
    for file in files.values():
        if file.parent != path.parent or file.name in ("", ".."):
            raise ValueError(f"{path} points at {file}, which is outside its folder")
    return files


def _check_index(
    table: Mapping[str, pathlib.Path],
    tensors: Mapping[str, SourceTensor],
    index: pathlib.Path,
) -> None:
    for name, file in table.items():
        if name not in tensors or tensors[name].file != file:
            raise ValueError(
                f"{index} says that tensor {name!r} is in {file.name}, but it is not; "
                "download the checkpoint again"
            )
