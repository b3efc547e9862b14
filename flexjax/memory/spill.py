"""The folder on disk that a run spills to, which never outlives it for long."""

import fcntl
import os
import pathlib
import shutil
import tempfile
import time
import weakref

from flexjax.safe_files import make_folder, unwritable

PREFIX = "flexjax-spill-"
_LOCK = "lock"
_GETS_ITS_LOCK_WITHIN_S = 60.0


class SpillFolder:
    """A folder of this process alone, below `parent`, that `close` removes.

    It also goes when the process ends without `close`. While it is open its lock file
    is locked. What a killed process left behind is not, and goes by a `sweep`, which
    comes before each new folder, and each new engine.
    """

    def __init__(self, parent: pathlib.Path) -> None:
        make_folder(parent)
        sweep(parent)
        try:
            self.path, lock = _make_locked(parent)
        except OSError as error:
            raise unwritable(parent, error) from error
        self._remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Removes the folder and all that lies in it."""
        self._remove()


def _remove(path: pathlib.Path, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it that ends
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: pathlib.Path) -> tuple[pathlib.Path, int]:
    """A new folder, and its lock file's descriptor.

    Another process may sweep the folder before it is locked: then a next one is made.
    """
    while True:
        path = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_nlink:
                return path, lock
        except BlockingIOError:
            pass
        except OSError:
            os.close(lock)
            shutil.rmtree(path, ignore_errors=True)
            raise
        os.close(lock)


def sweep(parent: pathlib.Path) -> None:
    """Removes the spill folders below `parent` whose processes are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            _remove_if_abandoned(folder)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # its process lives, or nobody can tell
        finally:
            os.close(lock)


def _remove_if_abandoned(folder: pathlib.Path) -> None:
    """Removes a folder that got no lock, unless it may just be getting one."""
    try:
        if time.time() - folder.stat().st_mtime > _GETS_ITS_LOCK_WITHIN_S:
            folder.rmdir()
    except OSError:
        pass  # removed by another process, or not empty: then it is not a spill
