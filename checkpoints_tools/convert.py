"""Makes a weight store or an Orbax checkpoint of an OPT checkpoint.

python -m checkpoints_tools.convert SRC OUT [--dtype bfloat16] [--weight-bits 4]
"""

import argparse
import pathlib
import sys

import numpy as np

from checkpoints_tools.open_source import open_source
from checkpoints_tools.orbax_checkpoint import write_orbax
from checkpoints_tools.store_conversion import convert_to_store
from flexjax.cli import run_command
from flexjax.policy import BITS, Policy
from flexjax.quant import Quantization
from flexjax.store_format import DTYPES


def _convert(args: argparse.Namespace) -> None:
    source, out = pathlib.Path(args.source), pathlib.Path(args.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out} is the source itself; choose another folder")
    checkpoint = open_source(source)
    dtype = checkpoint.dtype if args.dtype is None else DTYPES[args.dtype]
    label = f"converting {source.resolve().name}"
    if args.to == "orbax":
        for flag in ("weight_bits", "group_size"):
            if getattr(args, flag) is not None:
                flag = f"--{flag.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is of quantized stores, not of Orbax checkpoints; leave "
                    f"out --to orbax or {flag}"
                )
        write_orbax(checkpoint, out, dtype, label)
    else:
        convert_to_store(checkpoint, out, dtype, label, _quantization(args, dtype))
    bits = "" if args.weight_bits is None else f", {args.weight_bits} bits"
    print(f"{out}: {args.to}, {dtype.name}{bits}")


def _quantization(args: argparse.Namespace, dtype: np.dtype) -> Quantization | None:
    if args.weight_bits is None:
        if args.group_size is not None:
            raise ValueError(
                "--group-size does nothing without --weight-bits: give that too, or "
                "leave --group-size out"
            )
        return None
    group_size = Policy.group_size if args.group_size is None else args.group_size
    if group_size < 1:
        raise ValueError(f"--group-size is {group_size}, expected at least 1")
    return Quantization(bits=args.weight_bits, group_size=group_size, dtype=dtype.name)


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
        choices=("store", "orbax"),
        default="store",
        help="what to write (default: %(default)s)",
    )
    parser.add_argument(
        "--weight-bits",
        type=int,
        choices=BITS,
        help="quantize the decoder layers' matrices to so many bits, and the tables of "
        "tokens to 8",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="elements that share a scale and a minimum (default: "
        f"{Policy.group_size})",
    )
    return run_command(_convert, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
