"""Files: locks on what processes share, whether something can be written before hours of work, where packages lie."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from duo_jax.errors import UserError

_log = logging.getLogger("duo_jax.files")

# What some networks' disks answer where a lock is asked for.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def package_folder(package: str) -> Path | None:
    """Returns the folder of an installed package without importing it (data packages may lack dependencies)."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turns the disk's errors inside into one sentence about `path`, a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; put that right, or use another --workdir (to evaluate or "
            "sample, a copy of this one)."
        ) from error


def check_folder(folder: Path) -> None:
    """Makes a folder if need be.

    Raises:
        UserError: it cannot be made, or no file can be written in it.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permissions do not tell of a read-only or a remote disk


def check_file(path: Path) -> None:
    """Leaves a file as it is, or as it is not yet.

    Raises:
        UserError: it cannot be written.
    """
    check_folder(path.parent)
    with written(path):
        if path.exists():
            path.open("r+b").close()


@dataclasses.dataclass(frozen=True)
class Lock:
    """A lock's file; closing it, or the end of the process, releases the lock.

    Attributes:
        file: the open file.
        exclusive: whether no other process has the lock; False on a disk without locks, where nobody can tell.
    """

    file: IO[str]
    exclusive: bool

    def close(self) -> None:
        """Releases the lock."""
        self.file.close()


def acquire(path: Path, *, block: bool) -> Lock | None:
    """Returns a lock, its file made if need be, or None where another process has it and `block` is not set.

    On a disk without locks, such as some network disks, work goes on without protection; a warning says so.
    """
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            # Whoever held the lock before may have removed its file, and then this is a lock on nothing.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return Lock(file, exclusive=True)
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning("The disk of %s has no locks: see to it that no other process works there.", path.parent)
                return Lock(file, exclusive=False)
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Holds a lock, and removes its file at the end; the kernel releases it however the process ends.

    Args:
        path: the lock's file.
        busy: called where another process has the lock; if it returns, that process is waited for.
    """
    lock = acquire(path, block=False)
    if lock is None:
        busy()
        lock = acquire(path, block=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        if lock is not None:
            lock.close()
