"""Makes a checkpoint of random weights in a published model's shapes, for benchmarks.

    python -m checkpoints_tools.synthesize facebook/opt-6.7b OUT [--format hf]

The weights depend on the seed and the tensor's name alone: both formats hold the same.
"""

import argparse
import os
import pathlib
import sys

import numpy as np

from checkpoints_tools.progress import progress_bar
from checkpoints_tools.random_weights import random_blocks
from checkpoints_tools.safetensors_writer import plan_shards, write_hugging_face
from flexjax.cache_folder import default_cache
from flexjax.cli import run_command
from flexjax.models.config import (
    OPTConfig,
    named_config,
    published_name,
    read_config,
    tensor_shapes,
)
from flexjax.store_format import DTYPES
from flexjax.store_writer import StoreWriter


def synthesize_store(
    folder: str | os.PathLike[str], config: OPTConfig, dtype: np.dtype, *, seed: int
) -> None:
    """Writes random weights as a weight store; nothing to do if it is there already.

    Raises:
        ValueError: `folder` cannot take this store.
        OSError: the disk is full, or fails.
    """
    with StoreWriter(
        folder, config=config, dtype=dtype, source=_source(dtype, seed)
    ) as writer:
        if writer.complete:
            return
        total_bytes = sum(entry.nbytes for entry in writer.planned.values())
        with progress_bar(total_bytes, "synthesizing") as bar:
            for name, entry in writer.planned.items():
                if not writer.has(name):
                    blocks = random_blocks(name, entry.shape, dtype, seed)
                    writer.write(name, blocks)
                bar.update(entry.nbytes)
        writer.finish()


def random_folder(model: str) -> pathlib.Path:
    """Where the cache has the random weights of a published model, by its name."""
    return default_cache() / f"random-{published_name(model)}"


def random_store(model: str) -> pathlib.Path:
    """The random weights of a published model in bfloat16, made the first time.

    Raises:
        ValueError: there is no such model.
        OSError: the disk is full, or fails.
    """
    config, folder = named_config(model), random_folder(model)
    synthesize_store(folder, config, DTYPES["bfloat16"], seed=0)
    return folder


def synthesize_hugging_face(
    folder: str | os.PathLike[str], config: OPTConfig, dtype: np.dtype, *, seed: int
) -> None:
    """Writes the same weights as sharded safetensors that transformers loads."""
    source, shapes = _source(dtype, seed), tensor_shapes(config)
    shards = plan_shards(config, dtype, source)
    total_bytes = sum(shard.data_bytes for shard in shards.values())
    with progress_bar(total_bytes, "synthesizing") as bar:
        write_hugging_face(
            pathlib.Path(folder),
            config,
            dtype,
            source=source,
            blocks=lambda name: random_blocks(name, shapes[name], dtype, seed),
            progress=bar.update,
        )


def _source(dtype: np.dtype, seed: int) -> str:
    return f"random weights, seed {seed}, {dtype.name}, version 1"


FORMATS = {"store": synthesize_store, "hf": synthesize_hugging_face}


def _synthesize(args: argparse.Namespace) -> None:
    folder = pathlib.Path(args.model)
    config = read_config(folder) if folder.is_dir() else named_config(args.model)
    FORMATS[args.format](args.out, config, DTYPES[args.dtype], seed=args.seed)
    print(f"{args.out}: {args.format}, {args.dtype}, random weights")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.synthesize",
        description="Writes random weights of a published OPT model's true shapes, "
        "with little memory, for benchmarks.",
    )
    parser.add_argument(
        "model",
        metavar="NAME",
        help="a published model such as facebook/opt-6.7b, or a folder with a "
        "config.json",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="store",
        help="flexjax's own store, or Hugging Face safetensors for other systems "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random weights (default: 0)"
    )
    return run_command(_synthesize, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
