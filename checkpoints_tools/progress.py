"""The progress bar of everything here that takes long."""

import sys

from tqdm import tqdm

SILENT_S = 30.0  # how long a log file waits for the first line of a long job


def progress_bar(total_bytes: int, label: str) -> tqdm:
    """A bar on stderr in bytes; in a log file, a line now and then if it takes long."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total_bytes,
        desc=label,
        unit="B",
        unit_scale=True,
        mininterval=0.1 if live else SILENT_S,
        delay=0.0 if live else SILENT_S,
        file=sys.stderr,
    )
