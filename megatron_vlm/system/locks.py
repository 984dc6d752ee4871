"""Locks on files that end with the processes that hold them, even killed ones."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager, suppress
from typing import IO, Any, Iterator, Union

_HELD_BY_ANOTHER = (errno.EAGAIN, errno.EACCES)


def take_lock(file: IO[Any]) -> bool:
    """Take the lock of a file for this process alone: what it forks doesn't hold it.

    Args:
        file: open for writing; the lock ends when any of this process's descriptors of it is closed.

    Returns:
        Whether no other process holds it; True too where the file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD_BY_ANOTHER
    return True


def is_locked(path: Union[str, os.PathLike[str]]) -> bool:
    """Return whether another process holds the lock that :func:`take_lock` takes."""
    try:
        with open(path, "rb+") as file:
            os.lockf(file.fileno(), os.F_TEST, 0)
    except OSError as error:
        return error.errno in _HELD_BY_ANOTHER and os.access(path, os.W_OK)
    return False


@contextmanager
def locked(path: Union[str, os.PathLike[str]], or_say: str = "") -> Iterator[None]:
    """Hold a lock on a file or a folder; processes that are forked meanwhile hold it too.

    Where the file system has no locks, there is none.

    Raises:
        ValueError: another process holds it; without ``or_say`` this waits instead.
    """
    descriptor = None
    try:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if or_say else 0))
            except BlockingIOError:
                raise ValueError(or_say) from None
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
