"""What may lie where a file is looked for, and in it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Iterator, Union


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
