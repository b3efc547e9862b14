"""The one way in which every command line of the project starts and fails."""

import argparse
import sys
from collections.abc import Callable, Sequence

BAD_INPUT = 2  # argparse's own status for a wrong command line
INTERRUPTED = 130  # what a shell reports after Ctrl-C


def run_command(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv`, runs `main` and returns the exit status.

    What `main` raises about its input (ValueError) or the machine (OSError,
    MemoryError) becomes one line on stderr and status 2; `--debug`, added here, shows
    the traceback instead. Options are taken by their whole names alone: argparse would
    take `--policy FILE` for `--policy-json FILE`, and so write where it should read.
    """
    parser.allow_abbrev = False
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    args = parser.parse_args(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MemoryError) as error:
        if args.debug:
            raise
        message = str(error) or "out of memory"  # Python's own MemoryError is empty
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return BAD_INPUT
    return 0
