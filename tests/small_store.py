"""A weight store of tiny tensors, for tests of what reads and writes one."""

import mmap
import pathlib

import numpy as np

from flexjax.models.config import OPTConfig, tensor_shapes
from flexjax.store_format import DTYPES, chunk_path, plan_entry
from flexjax.store_writer import StoreWriter

CONFIG = OPTConfig(
    vocab_size=67,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=48,
    max_position_embeddings=20,
    word_embed_proj_dim=16,
)
BIG = "embed_tokens.weight"


def weights(dtype: np.dtype, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in tensor_shapes(CONFIG).items()
    }


def writer(folder, dtype=DTYPES["bfloat16"], source="test") -> StoreWriter:
    return StoreWriter(folder, config=CONFIG, dtype=dtype, source=source)


def write(folder, tensors: dict[str, np.ndarray], rows: int = 5) -> None:
    dtype = next(iter(tensors.values())).dtype
    with writer(folder, dtype) as out:
        for name, data in tensors.items():
            out.write(name, (data[i : i + rows] for i in range(0, len(data), rows)))
        out.finish()


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape))
    pages = mmap.mmap(-1, max(1, size * dtype.itemsize))
    return np.frombuffer(pages, dtype, size).reshape(shape)


def big_chunk(folder: pathlib.Path, index: int = 1) -> pathlib.Path:
    entry = plan_entry((67, 16), DTYPES["bfloat16"])
    return chunk_path(folder, BIG, entry, index)
