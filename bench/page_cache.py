"""The system's cache of files: a run that reads from memory measures no disk."""

import contextlib
import os
import pathlib
from collections.abc import Iterable

_DROP = pathlib.Path("/proc/sys/vm/drop_caches")
_EVERYTHING = "3"


def drop_page_cache(paths: Iterable[pathlib.Path]) -> str:
    """Drops all cached files, or those at `paths` where this user may do no more.

    Returns:
        What was done, in a word or three.
    """
    os.sync()  # a page that is not written yet stays
    try:
        _DROP.write_text(_EVERYTHING)
    except OSError:
        for path in paths:
            _forget(path)
        return "cold (the store only)"
    return "cold"


def may_drop_everything() -> bool:
    """Whether this user may drop all cached files."""
    return os.access(_DROP, os.W_OK)


def _forget(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
