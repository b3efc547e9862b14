"""Folders and files that are either all there or not there, even after a crash."""

import fcntl
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from flexjax.sizes import format_bytes

LOCK = ".lock"


def ensure_space(folder: pathlib.Path, needed_bytes: int) -> None:
    """Raises OSError if the file system of `folder` has less free space."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OSError(
            f"not enough space in {folder}: {format_bytes(needed_bytes)} are needed, "
            f"{format_bytes(free_bytes)} are free; free some space or choose a folder "
            "on another disk"
        )


def make_folder(folder: pathlib.Path) -> None:
    """Makes `folder` if needed.

    Raises:
        ValueError: it is a file, or cannot be made or written; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def ensure_writable(flag: str, path: pathlib.Path) -> None:
    """Refuses a file that could not be written after a long run.

    Args:
        flag: the argument that names the file.
        path: of the file; its folder is made if needed.

    Raises:
        ValueError: it is no ordinary file, or cannot be made.
    """
    path = path.absolute()
    make_folder(path.parent)
    refusal = f"{flag} {path} cannot be written; name a file that can"
    if path.exists() and not path.is_file():
        raise ValueError(refusal)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(refusal) from error


def ensure_distinct(files: Mapping[str, str | None]) -> None:
    """Refuses two arguments that name one file, of which one would be lost.

    Args:
        files: by the argument that names them; None is not given.

    Raises:
        ValueError: two are the same.
    """
    seen: dict[pathlib.Path, str] = {}
    for flag, name in files.items():
        if name is None:
            continue
        other = seen.setdefault(pathlib.Path(name).resolve(), flag)
        if other != flag:
            raise ValueError(
                f"{other} and {flag} both name {name}; give each a file of its own"
            )


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that is either all there or not there, even after a power cut.

    Of several writers the last one wins.

    Raises:
        OSError: it could not be written; the message names it.
    """
    write_pieces_atomically(path, (data,))


def write_pieces_atomically(
    path: pathlib.Path,
    pieces: Iterable[bytes],
    *,
    beside: pathlib.Path | None = None,
) -> None:
    """`write_atomically` of data that need not be in memory all at once.

    Args:
        path: of the file.
        pieces: its content.
        beside: where to write it first, in the same folder, if nobody else does; a
            name of its own, if not given.

    Raises:
        OSError: as `write_atomically`.
    """
    partial = beside or path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync_path(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def sync_tree(folder: pathlib.Path) -> None:
    """Waits until every file and folder under `folder` has reached the disk."""
    paths = [folder]
    for parent, folders, files in os.walk(folder):
        paths += [pathlib.Path(parent, name) for name in folders + files]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(sync_path, paths):
            pass


def sync_path(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def unwritable(folder: pathlib.Path, error: OSError) -> ValueError:
    """The one sentence about a folder that cannot be written."""
    return ValueError(
        f"cannot write into {folder}: {error.strerror}; choose a folder that you may "
        "write to"
    )


def lock_folder(folder: pathlib.Path) -> int:
    """Makes and locks `folder`; the lock goes when the process does."""
    make_folder(folder)
    path = folder / LOCK
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who was refused before us has removed it
            make_folder(folder)
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
            os.close(lock)
            raise ValueError(
                f"{folder} is being written by process {holder}; wait for it, or "
                "choose another folder"
            ) from error
        # The holder before us may have deleted the file between our open and our lock.
        if os.fstat(lock).st_nlink:
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        os.close(lock)


def unlock_folder(folder: pathlib.Path, lock: int) -> None:
    """Gives back what `lock_folder` returned."""
    (folder / LOCK).unlink(missing_ok=True)
    os.close(lock)
