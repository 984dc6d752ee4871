"""A run's lines as a terminal shows them: an iteration in one line of it. The log has all fields."""

from __future__ import annotations

import os
from typing import BinaryIO, List, Tuple

_WIDTH = 100  # columns; fewer where the terminal has fewer
_BEGINS = "iteration "
_BETWEEN = " | "
# Parts of the fields that are left out, in this order, until a line fits.
_LEAST = ("hours, ", "TFLOP/s", "GiB", "images/s", "s/iteration", "lr ", "grad norm", "tokens/s")


def fitted(line: str, columns: int, without: int = 0) -> Tuple[str, int]:
    """Return a line of an iteration with as many of its fields as fit into ``columns``; any other line as it
    is.

    Args:
        without: how many parts are left out though they may fit, so that lines below each other are alike.

    Returns:
        The line, and how many parts it lacks, ``without`` or more.
    """
    fields: List[str] = line.split(_BETWEEN)
    if not line.startswith(_BEGINS) or len(fields) < 3:
        return line, without
    for number, least in enumerate(_LEAST):
        if len(_BETWEEN.join(fields)) <= columns and number >= without:
            return _BETWEEN.join(fields), number
        if least.endswith(", "):  # the time left stands in the same field
            fields = [field.partition(least)[2] if least in field else field for field in fields]
        else:
            fields = [field for field in fields if least not in field]
    return _BETWEEN.join(fields), len(_LEAST)


class Terminal:
    """A stream for a run's lines; if that is a terminal, its lines as :func:`fitted`.

    Args:
        stream: unbuffered or not; it is flushed after each write.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._held = b""  # the beginning of a line that is to be fitted
        self._columns = self._without = 0  # of the lines so far

    def write(self, chunk: bytes) -> None:
        """Write, and hold back the beginning of a line only as long as it may be one of an iteration.

        Raises:
            OSError: nobody reads it, or its disk is full.
        """
        if self._stream.isatty():
            *lines, last = (self._held + chunk).split(b"\n")
            begins = _BEGINS.encode()
            self._held = last if last and (last.startswith(begins) or begins.startswith(last)) else b""
            columns = min(_WIDTH, os.get_terminal_size(self._stream.fileno()).columns or _WIDTH)
            if columns != self._columns:
                self._columns, self._without = columns, 0
            shown = [self._fitted(line) + b"\n" for line in lines]
            chunk = b"".join(shown) + (b"" if self._held else last)
        self._stream.write(chunk)
        self._stream.flush()

    def close(self) -> None:
        """Write what is held back."""
        held, self._held = self._held, b""
        self._stream.write(held)
        self._stream.flush()

    def _fitted(self, line: bytes) -> bytes:
        text = line.decode(errors="surrogateescape")
        shown, self._without = fitted(text, self._columns, self._without)
        return shown.encode(errors="surrogateescape")
