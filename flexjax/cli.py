"""The one way in which every command line of the project starts and fails."""

import argparse
import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

BAD_INPUT = 2  # argparse's own status for a wrong command line
INTERRUPTED = 130  # what a shell reports after Ctrl-C
_BY_SIGNAL = 128  # what a shell adds to a signal's number
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_CLEANS_UP_WITHIN_S = 10.0


class _Ended(BaseException):
    """A signal asked the process to end; nothing but `run_command` takes it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def run_command(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv`, runs `main` and returns the exit status.

    What `main` raises about its input (ValueError) or the machine (OSError,
    MemoryError) becomes one line on stderr and status 2; `--debug`, added here, shows
    the traceback instead. SIGTERM and SIGHUP end it as Ctrl-C does: files are removed
    that would else be left.

    Options are taken by their whole names alone: argparse would take `--policy FILE`
    for `--policy-json FILE`, and so write where it should read.
    """
    parser.allow_abbrev = False
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )
    args = parser.parse_args(argv)
    try:
        with _ended_by_signals():
            main(args)
    except _Ended as ended:
        print(f"ended by {ended.signal.name}", file=sys.stderr)
        return _BY_SIGNAL + ended.signal
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


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Lets signals that would kill the process raise, unless they are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which alone may say what a signal does
        return
    taken = [one for one in _ENDING if signal.getsignal(one) is signal.SIG_DFL]
    heard_s = -math.inf

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal heard_s
        now_s = time.monotonic()
        # What cleans up is not to be cut short; but an exception may have been lost, in
        # a place where Python ignores them.
        if now_s - heard_s > _CLEANS_UP_WITHIN_S:
            heard_s = now_s
            raise _Ended(number)

    for one in taken:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)
