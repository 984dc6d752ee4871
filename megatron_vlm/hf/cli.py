"""The shared parts of the conversion scripts: common flags, one-line errors and a progress bar.

Standard library only, so that a script can hand itself to a container on a machine without torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import sys
from contextlib import contextmanager
from types import FrameType
from typing import Any, Callable, Iterator, List, NoReturn, Optional

from megatron_vlm.artifacts.checkpoint import of_best
from megatron_vlm.hf import Difference

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _Ended(KeyboardInterrupt):
    """A signal that asks a process to end, so that it clears away what it has begun."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run(main: Callable[[List[str]], int]) -> int:
    """Run a script's ``main`` on its arguments.

    A user's error is one line on stderr and exit status 2; that two checkpoints differ, 1; an end by signal
    ``n``, 128 + n.
    """
    # Large pages for large tensors, where torch hasn't begun yet: filling fresh memory is 10 times as fast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        with _ending_on_signals():
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
    except RecursionError:
        print("error: a JSON file is nested too deeply to be one of a model", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, _Ended) else signal.SIGINT
        print(f"ended by {signal.Signals(number).name}; no unfinished output is left", file=sys.stderr)
        return 128 + number


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as SIGINT does, where they are not ignored or taken care of."""
    process = os.getpid()

    def end(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != process:  # forked from it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise _Ended(number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def tell_of_best(path: str) -> None:
    """Print which checkpoint of the run folder ``path`` is taken, where it has a best one, too."""
    said = of_best(path)
    if said:
        print(f"note: {said}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose every problem is a one-line ``ValueError``, without the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self._given: List[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as ``ArgumentParser`` does; keep what was given for :meth:`error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:  # perhaps misspelt
            flags = [item.partition("=")[0] for item in self._given if item.startswith("--")]
            strange = [flag for flag in flags if flag not in self._option_string_actions]
            message = f"unrecognized arguments: {strange[0]}" if strange else message
        unknown = re.fullmatch(r"unrecognized arguments: (--[^ =]+).*", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message = f"unknown flag {unknown[1]}; " + (f"did you mean {near[0]}?" if near else "see --help")
        raise ValueError(message)


class ProgressBar:
    """Bytes done, speed and time left, as a bar on stderr; in a log it moves every ten seconds.

    Args:
        what: stands before the bar.
        unit: what is counted.
    """

    def __init__(self, what: str | None = None, unit: str = "B") -> None:
        self._bar: Any = None
        self._what, self._unit = what, unit

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done."""
        if self._bar is None:
            from tqdm import tqdm

            terminal = sys.stderr.isatty()
            self._bar = tqdm(
                total=total,
                desc=self._what,
                unit=self._unit,
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


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a Megatron checkpoint is written."""
    parser.add_argument(
        "--format",
        choices=("torch_dist", "classic"),
        default="torch_dist",
        help="classic: Megatron-LM's mp_rank_* files, for one layout only (default: %(default)s)",
    )
    parser.add_argument(
        "--tp", type=positive, default=1, help="tensor-parallel size it is cut for (default: 1)"
    )
    parser.add_argument(
        "--pp", type=positive, default=1, help="pipeline-parallel size; torch_dist: checked only (default: 1)"
    )
    parser.add_argument("--vpp", type=positive, help="classic: model chunks per pipeline rank (default: 1)")
    parser.add_argument(
        "--layers-per-stage",
        type=counts,
        metavar="N,N,...",
        help="classic: layers of each stage, in the order of the model (default: as even as can be)",
    )
    parser.add_argument(
        "--names",
        choices=("transformer_engine", "local"),
        help="classic: of the norms, as in Megatron-LM's layer spec (default: transformer_engine)",
    )


def add_hf_config_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--hf-config``."""
    parser.add_argument(
        "--hf-config",
        metavar="FOLDER",
        help="of a checkpoint that Megatron-LM itself wrote: the Hugging Face folder that it began with",
    )


def add_dtype_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``; :data:`DTYPES` has torch's names."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of all weights (default: as stored)")


def loads_where(args: argparse.Namespace) -> str:
    """Return the line about a checkpoint that was written as the flags of :func:`add_layout_flags` say."""
    if args.format == "classic":
        return (
            f"loads in Megatron-LM at --tp {args.tp} --pp {args.pp}; scripts/convert/reshard.py cuts it anew"
        )
    return f"loads at any tensor- and pipeline-parallel size, fastest at --tp {args.tp}"


def counts(text: str) -> List[int]:
    """Parse an argument of integers from 1 on, with commas between them."""
    return [positive(item) for item in text.split(",")]


def positive(text: str) -> int:
    """Parse an argument that is an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def size(text: str) -> int:
    """Parse an argument of bytes, from ``5GB``, ``200MB`` or ``1GiB``."""
    match = re.fullmatch(r"([0-9.]+) ?([KMG]i?)B", text, re.IGNORECASE)
    try:
        number = float(match.group(1)) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give KB, MB or GB, such as 5GB")
    unit = match.group(2).upper()
    return int(number * (1024 if unit.endswith("I") else 1000) ** ("KMG".index(unit[0]) + 1))
