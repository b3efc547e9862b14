"""Random weights of a model: the same for a seed, in whatever order they are asked for.

A weight is one of 65536 quantiles of a normal distribution, drawn with equal chance:
16 random bits and one table look-up each, ten times faster than drawing from the
distribution itself, and finer than a 16 bit float can tell. Blocks of rows have random
streams of their own, so that two threads can work ahead of the writer.
"""

import functools
import hashlib
import math
import statistics
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

BLOCK_ELEMENTS = 1 << 21
STD = 0.02  # of weights, `init_std` of Hugging Face's OPT configurations
SMALL_STD = 0.002  # of biases, and of norms' weights around 1
LEVELS = 1 << 16
THREADS = 2


def random_blocks(
    name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int
) -> Iterator[np.ndarray]:
    """The rows of tensor `name` in order, drawn ahead by two threads."""
    step = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    table = _quantiles(name, dtype)

    def draw(first: int) -> np.ndarray:
        rows = min(step, shape[0] - first)
        return _draw(table, name, seed, first, (rows, *shape[1:]))

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for first in range(0, shape[0], step):
            ahead.append(pool.submit(draw, first))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        for block in ahead:
            yield block.result()


def _draw(
    table: np.ndarray, name: str, seed: int, first: int, shape: tuple[int, ...]
) -> np.ndarray:
    key = hashlib.sha256(f"{seed}/{name}/{first}".encode()).digest()
    bits = np.random.SFC64(np.frombuffer(key, np.uint32))
    count = math.prod(shape)
    words = bits.random_raw(math.ceil(count / 4)).astype("<u8", copy=False)
    return table[words.view("<u2")[:count]].reshape(shape)


def _quantiles(name: str, dtype: np.dtype) -> np.ndarray:
    """The values that a tensor's elements take, in `dtype`."""
    part = name.rpartition(".")[2]
    is_norm = "layer_norm" in name
    mean = 1.0 if is_norm and part == "weight" else 0.0
    std = SMALL_STD if is_norm or part == "bias" else STD
    return (mean + std * _standard_quantiles()).astype(np.float32).astype(dtype)


@functools.cache
def _standard_quantiles() -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS)])
