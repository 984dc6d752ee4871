"""What the conversion scripts share: common flags, one-line errors and a progress line.

Standard library only, so that a script can hand itself to a container on a machine without torch.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from typing import Callable, List, Optional

_QUIET_SECONDS = 2.0  # a log need not show the progress of what is done by then


def run(main: Callable[[List[str]], int]) -> int:
    """Run a script's ``main`` on its arguments; a user's error is one line on stderr and exit status 2."""
    try:
        return main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(
            f"error: {sys.executable} has no {error.name}; run `make setup` and `source .venv/bin/activate`, "
            "or give --sif-path",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # no space left, read-only, no permission
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no output was made", file=sys.stderr)
        return 130


class ProgressLine:
    """Prints bytes done, speed and time left; one line that updates itself on a terminal.

    In a log it prints a line for each tenth instead, and only the last one if all is done at once.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._shown: Optional[int] = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are done."""
        percent = 100 * done // max(total, 1)
        step = percent if self._terminal else percent // 10
        if step == self._shown:
            return
        seconds = max(time.monotonic() - self._start, 1e-9)
        if not self._terminal and seconds < _QUIET_SECONDS and done < total:
            return
        self._shown = step
        speed = done / seconds
        left = f"{(total - done) / speed:.0f} s left" if speed else "-"
        line = f"{percent:3d} %  {_size(done)} of {_size(total)}  {_size(speed)}/s  {left}"
        if self._terminal:
            print(f"\r{line:<70}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def add_container_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--sif-path`` and ``--bind``."""
    parser.add_argument("--sif-path", help="run inside this Apptainer image")
    parser.add_argument(
        "--bind",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE[:TARGET[:ro]]",
        help="more to bind into the container; folders named by other flags are bound anyway",
    )


def positive(text: str) -> int:
    """Argument type: an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def size(text: str) -> int:
    """Argument type: bytes, from ``5GB``, ``200MB`` or ``1GiB``."""
    match = re.fullmatch(r"([0-9.]+) ?([KMG]i?)B", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give KB, MB or GB, such as 5GB")
    unit = match.group(2).upper()
    return int(number * (1024 if unit.endswith("I") else 1000) ** ("KMG".index(unit[0]) + 1))
