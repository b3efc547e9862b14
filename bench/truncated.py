"""Makes random weights of the first layers of a published model, as a weight store.

    python -m bench.truncated opt-30b 12 OUT

A model's layers are alike: so a few of them show how a model runs that would take too
long to write.
"""

import argparse
import dataclasses
import pathlib
import sys

from checkpoints_tools.synthesize import synthesize_store
from flexjax.cli import run_command
from flexjax.models.config import OPTConfig, named_config
from flexjax.store_format import DTYPES

_DTYPE = "bfloat16"


def truncated_config(name: str, num_layers: int) -> OPTConfig:
    """The configuration of a published model's first layers.

    Raises:
        ValueError: the model is unknown, or has fewer layers.
    """
    config = named_config(name)
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"{num_layers} layers of {name} were asked for, which has "
            f"{config.num_hidden_layers}; ask for 1 to {config.num_hidden_layers}"
        )
    return dataclasses.replace(config, num_hidden_layers=num_layers)


def _main(args: argparse.Namespace) -> None:
    config = truncated_config(args.model, args.layers)
    synthesize_store(args.out, config, DTYPES[_DTYPE], seed=0)
    print(f"{args.out}: {args.layers} layers of {args.model}, random weights, {_DTYPE}")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.truncated",
        description="Makes random weights of the first layers of a published model.",
    )
    parser.add_argument("model", metavar="NAME", help="a model such as opt-30b")
    parser.add_argument("layers", metavar="N", type=int, help="how many layers")
    parser.add_argument("out", metavar="OUT", type=pathlib.Path, help="folder to write")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(_main, build_parser()))
