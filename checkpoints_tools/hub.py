"""Fetching a checkpoint from the Hugging Face Hub, or finding it in the Hub's cache."""

import pathlib
from collections.abc import Callable

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from checkpoints_tools.hugging_face import KINDS, PATTERNS, TOKENIZER_FILES
from flexjax.models.config import OPTConfig, read_config

SMALL_FILES = ["config.json", *TOKENIZER_FILES]


def download(
    model: str, check: Callable[[OPTConfig], object] = lambda config: None
) -> pathlib.Path:
    """The folder with a Hub model's config, tokenizer and one kind of weights.

    Reads the config before the weights, so that `check` may refuse it, and fetches
    `.bin` weights only where there are no safetensors. Without a connection, or with
    HF_HUB_OFFLINE=1, what an earlier download left in the Hub's cache is used.

    Raises:
        ValueError: no such model, not an OPT model, or not to be had.
        OSError: the Hub failed.
    """
    check(read_config(_fetch(model, SMALL_FILES)))
    for kind in KINDS:
        folder = _fetch(model, [*SMALL_FILES, kind.pattern, kind.index])
        if any(folder.glob(kind.pattern)):
            return folder
    raise ValueError(
        f"{model} has no weights that can be read: neither {PATTERNS} is there, on the "
        "Hub or, without a connection, in its cache; choose another model or connect"
    )


def download_config(model: str) -> pathlib.Path:
    """The folder with a Hub model's config.json, before anything else is fetched.

    Raises:
        ValueError: no such model, or not to be had.
        OSError: the Hub failed.
    """
    return _fetch(model, SMALL_FILES[:1])


def download_tokenizer(model: str) -> pathlib.Path:
    """The folder with a Hub model's tokenizer, without weights.

    Raises: as `download_config`.
    """
    return _fetch(model, [*TOKENIZER_FILES])


def _fetch(model: str, names: list[str]) -> pathlib.Path:
    try:
        folder = snapshot_download(
            model,
            allow_patterns=names,
            ignore_patterns=["*/*"],  # folders hold other formats of the weights
        )
    except GatedRepoError as error:
        raise ValueError(
            f"{model} is gated on the Hugging Face Hub; accept its terms there and log "
            "in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{model} is neither a folder nor a model on the Hugging Face Hub; check "
            "the name, or log in with `hf auth login` if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{model} is not a folder, and as a model of the Hugging Face Hub it is "
            "not whole in the local cache while the Hub cannot be reached; connect, or "
            "give a folder"
        ) from error
    except Exception as error:  # the client lets its HTTP library's errors through
        raise OSError(
            f"cannot fetch {model} from the Hugging Face Hub: {error}; try again, or "
            "give a folder"
        ) from error
    return pathlib.Path(folder)
