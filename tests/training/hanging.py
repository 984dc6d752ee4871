"""A run of which one rank hangs: ``torchrun ... -m tests.training.hanging <how> <rank> <flags>``.

How: in ``python``, or in the ``interpreter``, so that no other thread of Python runs either.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from typing import Any
from unittest import mock

from megatron_vlm.training import __main__
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.hooks import guards


def stuck_in_python() -> None:
    time.sleep(3600)


def stuck_in_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(3600)  # unlike CDLL, it keeps the lock that every thread needs


def main(how: str, rank: str, argv: list[str]) -> int:
    watchdogs: list[guards.Watchdog] = []
    enter, read = guards.Watchdog.__enter__, BatchReader.next
    calls = 0

    def remember(self: guards.Watchdog) -> guards.Watchdog:
        watchdogs.append(self)
        return enter(self)

    def hang(self: BatchReader) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            # Only now, so that a slow machine may take its time to start.
            watchdogs[0].seconds = 3.0
            watchdogs[0].beat()
            if os.environ["RANK"] == rank:
                {"python": stuck_in_python, "interpreter": stuck_in_the_interpreter}[how]()
        return read(self)

    with (
        mock.patch.object(guards, "_GRACE_SECONDS", 2.0),
        mock.patch.object(guards.Watchdog, "__enter__", remember),
        mock.patch.object(BatchReader, "next", hang),
    ):
        return __main__.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
