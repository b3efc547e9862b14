"""The same random weights in the formats that the systems read, made once."""

import math
import pathlib
from collections.abc import Collection, Mapping

from checkpoints_tools.synthesize import (
    random_folder,
    random_store,
    synthesize_hugging_face,
)
from flexjax.checkpoint import is_store
from flexjax.models.config import named_config, tensor_shapes
from flexjax.quant import cache_slot_bytes
from flexjax.safe_files import ensure_space, make_folder
from flexjax.store_format import DTYPES

STORE, HUGGING_FACE = "store", "hf"  # flexjax's format and everybody's
DTYPE = DTYPES["bfloat16"]
SEED = 0  # the store's


def weights_bytes(model: str) -> int:
    """Size of a published model's weights."""
    return DTYPE.itemsize * sum(
        map(math.prod, tensor_shapes(named_config(model)).values())
    )


def kv_cache_bytes(model: str, length: int) -> int:
    """Size of the keys and values of one row of `length` tokens."""
    config = named_config(model)
    return config.num_hidden_layers * length * cache_slot_bytes(config, DTYPE, None)


def make_weights(model: str, formats: Collection[str]) -> Mapping[str, pathlib.Path]:
    """Folders with the random weights of a published model, by format.

    Raises:
        ValueError: there is no such model.
        OSError: there is no room for all that has to be made.
    """
    config, store = named_config(model), random_folder(model)
    make_folder(store.parent)
    checkpoint = store.with_name(f"{store.name}-{HUGGING_FACE}")
    made = {
        STORE: is_store(store),
        HUGGING_FACE: (checkpoint / "config.json").exists(),
    }
    missing = [name for name in formats if not made[name]]
    ensure_space(store.parent, len(missing) * weights_bytes(model))
    folders: dict[str, pathlib.Path] = {}
    if STORE in formats:
        folders[STORE] = random_store(model)
    if HUGGING_FACE in formats:
        synthesize_hugging_face(checkpoint, config, DTYPE, seed=SEED)
        folders[HUGGING_FACE] = checkpoint
    return folders
