"""The progress bar of everything here that takes long."""

import sys

from tqdm import tqdm

BRIEF_S = 0.5  # what takes less shows no bar
SILENT_S = 30.0  # between the lines in a log file, and before the first


def progress_bar(
    total: int, label: str, unit: str = "B", *, is_shown: bool = True
) -> tqdm:
    """A bar on stderr; in a log file, a line now and then if it takes long."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        mininterval=0.1 if live else SILENT_S,
        delay=BRIEF_S if live else SILENT_S,
        disable=not is_shown,
        file=sys.stderr,
    )
