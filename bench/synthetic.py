"""Random weights in a published model's shapes, made once and kept in the cache."""

import pathlib

from checkpoints_tools.synthesize import random_store
from flexjax.models.config import MODELS, OPTConfig, named_config, published_name


def published_config(model: str | None) -> OPTConfig | None:
    """The configuration of a published model; None for a folder or the embedded model.

    Raises:
        ValueError: neither a folder nor a published model.
    """
    if model is None or pathlib.Path(model).expanduser().is_dir():
        return None
    if published_name(model) is None:
        raise ValueError(
            f"{model!r} is neither a folder nor a published model; known are "
            f"{', '.join(sorted(MODELS))}"
        )
    return named_config(model)


def weights_folder(model: str | None) -> pathlib.Path | None:
    """The folder of a model's weights; None for the embedded model.

    Those of a published model are random, and are made the first time.

    Raises:
        ValueError: no such model.
        OSError: the disk has no room for them.
    """
    config = published_config(model)
    if model is None:
        return None
    if config is None:
        return pathlib.Path(model).expanduser()
    return random_store(model)
