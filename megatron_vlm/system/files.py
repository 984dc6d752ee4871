"""Files: what may lie where one is looked for, and reading and writing them whole."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from typing import Any, Iterator, Union


def check_readable(path: Union[str, os.PathLike[str]]) -> None:
    """Check that reading ``path``, if anything is there, comes to an end: a pipe's reader waits for ever.

    Raises:
        ValueError: it is neither a file nor a folder, nor a link to one.
    """
    if os.path.lexists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{path}: a pipe, a device or a link to nothing; move it away")


@contextmanager
def reading(path: Union[str, os.PathLike[str]], way_on: str) -> Iterator[None]:
    """Let whatever the content of a damaged file ends in be one line that names the file.

    Args:
        way_on: what to do about it.

    Raises:
        ValueError: the block has raised something.
    """
    try:
        yield
    except Exception as error:  # a damaged file can end in anything
        said = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
        raise ValueError(f"{os.fspath(path)}: damaged ({said}); {way_on}") from None


def read_json(path: Union[str, os.PathLike[str]]) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: it can't be opened.
        ValueError: it isn't JSON; one line, which names the file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: not valid JSON ({error})") from None


def write_whole(path: Union[str, os.PathLike[str]], content: Union[str, bytes]) -> None:
    """Write a file that is there whole or not at all, whenever this process or the machine ends.

    Args:
        content: a text is written in UTF-8.
    """
    folder, name = os.path.split(os.fspath(path))
    staged = os.path.join(folder, f".{name}.{os.getpid()}.incomplete")
    try:
        with open(staged, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(staged)
        raise
    sync(folder or os.curdir)


def sync(path: Union[str, os.PathLike[str]]) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
