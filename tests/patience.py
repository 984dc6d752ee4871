"""The patience of tests: they wait as long as it takes. No test passes or fails by how fast the machine is.

A wait that no load explains is a hang, and ends as a failure. What a test waits for takes seconds on a quiet
machine, so ``HANG`` leaves room for one that is a hundred times slower.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HANG = 1800.0  # seconds
_TICK = os.sysconf("SC_CLK_TCK")


def wait_until(done: Callable[[], object], what: str, seen: Callable[[], str] = lambda: "") -> None:
    """Wait until ``done()``; after ``HANG`` seconds fail, naming ``what`` did not come and ``seen()``."""
    deadline = time.monotonic() + HANG
    while not done():
        assert time.monotonic() < deadline, f"{HANG:.0f} s over before {what}\n{seen()}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Return whether a process is there and has not ended: one whose parent has yet to ask for its end
    has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time that processes and their living descendants have had so far, in seconds."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        parents[int(entry.name)] = int(fields[1])
        used[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICK
    roots = set(pids)

    def below(pid: int) -> bool:
        while pid and pid not in roots:
            pid = parents.get(pid, 0)
        return pid in roots

    return sum(seconds for pid, seconds in used.items() if below(pid))
