"""Files that people give, and paths that are no such files; JSON files that are made of them."""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import IO, Any

from megatron_vlm.system.files import read_json, write_whole

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def irregular(mode: int) -> str:
    """Return what a path of this mode is if it is no file that can be read to its end; empty for one that
    can."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "")


def open_regular(path: str) -> IO[bytes]:
    """Open a file for reading, and nothing that would wait for a writer or never end.

    Raises:
        OSError: it can't be opened, or is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = irregular(os.fstat(descriptor).st_mode)
    if kind:
        os.close(descriptor)
        raise OSError(errno.EINVAL, kind, path)
    return open(descriptor, "rb")


def write_json(path: str, value: Any, indent: int | None = None) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="replace") + b"\n")


def read_json_if_there(path: str) -> Any:
    """Return a JSON file's value, or None if there is no such file.

    Raises:
        ValueError: it isn't JSON.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
