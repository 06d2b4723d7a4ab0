"""Files: checks before hours of work that results can be written, locks between processes, folders of packages."""

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

# The errors that network disks without locks raise.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_ADVICE = "put that right, or use another --workdir (to evaluate or sample, a copy of this one)"


def package_folder(package: str) -> Path | None:
    """Returns the folder of an installed package without importing it (data packages may lack dependencies)."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


@contextlib.contextmanager
def written(path: Path | str, advice: str = _ADVICE) -> Iterator[None]:
    """Turns an OSError inside the block into a UserError that names `path`, gives the reason and ends in the advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; {advice}.") from error


def check_folder(folder: str | Path, *, flag: str = "", keep: bool = True) -> Path:
    """Makes a folder if it is missing, writes a test file in it, and returns its path with `~` expanded.

    Args:
        folder: its path.
        flag: the flag that named it, such as `--out`, for the message.
        keep: leave the folders that were made; False removes them again, so that a later mistake leaves nothing behind.

    Raises:
        UserError: it cannot be made, or no file can be written in it.
    """
    path = Path(folder).expanduser()
    made: list[Path] = []
    with written(f"{flag}={folder}", "give another folder") if flag else written(path):
        if path.is_file():
            raise FileExistsError(errno.EEXIST, "it is a file, not a folder")
        try:
            made = [parent for parent in (path, *path.parents) if not parent.exists()]
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()  # permissions do not show that a disk is read-only
        finally:
            for parent in () if keep else made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
    return path


def check_file(path: Path) -> None:
    """Checks that a file can be written, without changing or creating it; makes its folder if that is missing.

    Raises:
        UserError: it cannot be written.
    """
    check_folder(path.parent)
    with written(path):
        if path.exists():
            path.open("r+b").close()


@dataclasses.dataclass(frozen=True)
class Lock:
    """A lock, released by `close` or by the end of the process.

    Attributes:
        file: the open file.
        exclusive: True if no other process holds the lock; False on a disk without locks, where that is unknown.
    """

    file: IO[str]
    exclusive: bool

    def close(self) -> None:
        """Releases the lock."""
        self.file.close()


def acquire(path: Path, *, block: bool) -> Lock | None:
    """Returns a lock on a file, which is created if it is missing, or None if another process has it and not `block`.

    On a disk without locks, as some network disks are, it logs a warning and returns a lock that protects nothing.
    """
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            # The process that held the lock before may have removed the file; then this lock is on a deleted file.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return Lock(file, exclusive=True)
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning("The disk of %s has no locks: make sure that no other process works there.", path.parent)
                return Lock(file, exclusive=False)
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Holds a lock while the block runs, then removes its file; the kernel releases the lock if the process is killed.

    Args:
        path: the lock's file.
        busy: called if another process has the lock; if it returns, this waits for that process.
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
