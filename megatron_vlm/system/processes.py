"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Optional

# Of linux/prctl.h. The library is loaded here, since a forked child of a process with threads may not.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


def die_with_parent(parent: Optional[int] = None) -> None:
    """Let this process be killed when the one that started it ends, even by SIGKILL; on Linux only.

    Args:
        parent: process that has started this one: if it has ended already, this one ends at once.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Let processes whose parents below this one end become children of this process; on Linux only."""
    if _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
