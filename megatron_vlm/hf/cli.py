"""What the conversion scripts share: common flags, one-line errors and a progress bar.

Standard library only, so that a script can hand itself to a container on a machine without torch.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, Callable, List, NoReturn

from megatron_vlm.hf import Difference


def run(main: Callable[[List[str]], int]) -> int:
    """Run a script's ``main`` on its arguments.

    A user's error is one line on stderr and exit status 2; that two checkpoints differ, 1.
    """
    try:
        return main(sys.argv[1:])
    except Difference as error:
        print(f"different: {error}", file=sys.stderr)
        return 1
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


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose every problem is a one-line ``ValueError``, without the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (--[^ =]+).*", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}; " + (f"did you mean {near[0]}?" if near else "see --help")
        raise ValueError(message)


class ProgressBar:
    """Bytes done, speed and time left, as a bar on stderr; in a log it moves every ten seconds."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are done."""
        if self._bar is None:
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=total,
                unit="B",
                unit_scale=True,
                mininterval=0.2 if terminal else 10,
                ncols=None if terminal else 80,
                ascii=None if terminal else True,
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


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
