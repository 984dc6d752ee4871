"""Run one child: stream its output, hand on signals, leave no process behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, BinaryIO, Callable, List, Optional, Sequence

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS = 1.0  # for processes that the child leaves behind
# Tells the child that its stdin ends when this process does, which launch/torchrun.py watches: the parent
# death signal alone does not pass a container runtime, which loses it when it changes credentials.
STDIN_IS_LAUNCHER = "MEGATRON_VLM_STDIN_IS_LAUNCHER"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def run(command: Sequence[str], log_path: str) -> int:
    """Run ``command`` in a process group of its own.

    Its stdout and stderr go to this process's and, together, to the end of ``log_path``. SIGINT, SIGTERM
    and SIGHUP are handed on to the group; a second SIGINT kills it. On Linux the child is killed when
    this process dies, even by SIGKILL; and when the child ends, every process that it leaves behind, and
    any other child of this process, is killed too.

    Returns:
        Its exit code; 128 + n when signal n ended it.

    Raises:
        ValueError: the program is not there, or the log file cannot be written.
    """
    prctl = _prctl()
    if prctl:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    with _open_log(log_path) as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                env={**os.environ, STDIN_IS_LAUNCHER: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid(), prctl) if prctl else None,
            )
        except OSError as error:
            raise ValueError(f"{command[0]}: {error.strerror}") from None
        previous = {number: signal.signal(number, _forward_to(child)) for number in _FORWARDED}
        try:
            _stream(child, log)
        except BrokenPipeError:  # nobody reads the console any more
            _signal_group(child, signal.SIGTERM)
        except BaseException:  # the log's disk is full, say: do not wait for a child that cannot print
            _signal_group(child, signal.SIGTERM)
            raise
        finally:
            code = child.wait()
            _kill_orphans()
            for number, handler in previous.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _open_log(path: str) -> BinaryIO:
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def _stream(child: subprocess.Popen[bytes], log: BinaryIO) -> None:
    """Copy both pipes until they end, or until processes that outlive the child have had their grace."""
    deadline: Optional[float] = None
    with selectors.DefaultSelector() as selector:
        selector.register(_raw(child.stdout), selectors.EVENT_READ, sys.stdout)
        selector.register(_raw(child.stderr), selectors.EVENT_READ, sys.stderr)
        while selector.get_map():
            for key, _ in selector.select(timeout=0.5):
                chunk = os.read(key.fd, 1 << 16)
                if chunk:
                    key.data.buffer.write(chunk)
                    key.data.buffer.flush()
                    log.write(chunk)
                else:
                    selector.unregister(key.fileobj)
            if child.poll() is not None:
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
                if time.monotonic() > deadline:
                    break


def _raw(pipe: Any) -> BinaryIO:
    assert pipe is not None
    return pipe


def _forward_to(child: subprocess.Popen[bytes]) -> Callable[[int, Any], None]:
    interrupts: List[int] = []

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            interrupts.append(number)
        _signal_group(child, signal.SIGKILL if len(interrupts) > 1 else number)

    return handler


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(child.pid, number)


def _kill_orphans() -> None:
    """Kill and reap every child of this process: those that the child has left behind."""
    while True:
        orphans = [pid for pid in _processes() if _parent(pid) == os.getpid()]
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _processes() -> List[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:  # not Linux: no orphans are inherited either
        return []


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name in brackets may hold anything; the parent is the second field after it.
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _die_with(parent: int, prctl: Callable[[int, int], int]) -> Callable[[], None]:
    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return before_exec


def _prctl() -> Optional[Callable[[int, int], int]]:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).prctl
    return lambda option, value: int(function(option, value, 0, 0, 0))
