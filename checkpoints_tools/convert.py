"""Makes a weight store or an Orbax checkpoint of an OPT checkpoint.

python -m checkpoints_tools.convert SRC OUT [--dtype bfloat16] [--to orbax]
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from checkpoints_tools.open_source import open_source
from checkpoints_tools.orbax_checkpoint import write_orbax
from checkpoints_tools.source import Source
from checkpoints_tools.store_conversion import convert_to_store
from flexjax.cli import run_command
from flexjax.store_format import DTYPES


def _convert(args: argparse.Namespace) -> None:
    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out} is the source itself; choose another folder")
    checkpoint = open_source(source)
    dtype = checkpoint.dtype if args.dtype is None else DTYPES[args.dtype]
    WRITERS[args.to](checkpoint, out, dtype, f"converting {source.resolve().name}")
    print(f"{out}: {args.to}, {dtype.name}")


WRITERS: dict[str, Callable[[Source, pathlib.Path, np.dtype, str], None]] = {
    "store": convert_to_store,
    "orbax": write_orbax,
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_tools.convert",
        description="Converts an OPT checkpoint into the store that flexjax runs from, "
        "or into an Orbax checkpoint. An interrupted conversion goes on where it "
        "stopped when it is run again.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with *.safetensors or pytorch_model*.bin, an Orbax checkpoint "
        "with a config.json, or a weight store",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--to",
        choices=WRITERS,
        default="store",
        help="what to write (default: %(default)s)",
    )
    return run_command(_convert, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
