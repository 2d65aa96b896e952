"""Files that several processes share: locks, folders that appear whole or not at all, hashes."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from nld_train.data.progress import PrepareProgress
from nld_train.errors import DataError

Opened = TypeVar("Opened")

# Answers of file systems that have no locks at all (some parallel file systems are mounted so).
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel releases it when its owner dies.

    The lock saves doubled work and nothing more: what is built under it is published by :func:`publish_folder`, which
    is correct without it. So a file system without locks is no error.

    Args:
        path: the lock file, created if missing and left behind.
        on_wait: called once if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield


@contextlib.contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Write a folder under a temporary name; on success it appears under its own name, complete and on disk.

    If another process was faster, its folder stays (both hold the same: the names carry content hashes) and this one is
    dropped. Call it with the lock of ``folder`` held: remains of killed processes on this host are then removed.

    Yields:
        the temporary folder, on the same file system as ``folder``.
    """
    prefix = f".{folder.name}.tmp-{socket.gethostname()}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def found_or_built(
    folder: Path,
    *,
    open_folder: Callable[[Path], Opened],
    build: Callable[[Path], None],
    summary: Callable[[Opened], str],
    damaged: str,
    progress: PrepareProgress,
) -> Opened:
    """A cached folder, opened; built first where it is missing or damaged. Several processes may call this at once: one
    builds, the others wait.

    Args:
        open_folder: opens and checks a complete folder; raises DataError where it is damaged.
        build: fills an empty folder.
        summary: of what was opened, for people.
        damaged: said, with the reason, before a damaged folder is built again.
    """

    def found() -> Opened:
        opened = open_folder(folder)
        progress.message(f"found {summary(opened)}")
        return opened

    # Without the lock first, so that a complete cache works on a read-only file system.
    if folder.exists():
        try:
            return found()
        except DataError:
            pass  # looked at again, and spoken of, with the lock held
    waiting = f"another process is preparing {folder}; waiting for it"
    with locked(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: progress.message(waiting)):
        if folder.exists():
            try:
                return found()
            except DataError as error:
                progress.message(f"{damaged}: {error}")
                shutil.rmtree(folder)
        with publish_folder(folder) as temporary:
            build(temporary)
        opened = open_folder(folder)
    progress.message(f"prepared {summary(opened)}")
    return opened


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes; memory stays flat."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """sha256 over names and contents of a folder's files."""
    hashes = [
        [path.relative_to(folder).as_posix(), sha256_of_file(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
