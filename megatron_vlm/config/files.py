"""What may lie where a file is looked for."""

from __future__ import annotations

import os
from typing import Union


def check_readable(path: Union[str, os.PathLike[str]]) -> None:
    """Check that reading ``path``, if anything is there, comes to an end: a pipe's reader waits for ever.

    Raises:
        ValueError: it is neither a file nor a folder, nor a link to one.
    """
    if os.path.lexists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError(f"{path}: a pipe, a device or a link to nothing; move it away")
