"""Run one child: stream its output, hand on signals, leave no process behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any, BinaryIO, Callable, Collection, List, NamedTuple, Optional, Sequence

from megatron_vlm.launch.console import Terminal
from megatron_vlm.system.exit_codes import CONTINUE, INTERRUPTED, STOP_SIGNALS
from megatron_vlm.system.processes import adopt_orphans, die_with_parent

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_GRACE_SECONDS = 1.0  # for processes that the child leaves behind
_MESSAGE_BYTES = 8192  # of the end of its output, in which a message is looked for
# Tells the child that its stdin ends when this process does, which launch/torchrun.py watches: the parent
# death signal alone does not pass a container runtime, which loses it when it changes credentials.
STDIN_IS_LAUNCHER = "MEGATRON_VLM_STDIN_IS_LAUNCHER"


class Ended(NamedTuple):
    """The end of a child."""

    code: int  # 128 + n when signal n ended it
    message: str  # its last line that begins with "error: ", else its last one


def end_on_request() -> None:
    """Let SIGTERM and SIGUSR1 end this process, until :func:`run`, as they end a run that has not begun."""
    for number in set(STOP_SIGNALS) - {signal.SIGINT}:  # that one raises KeyboardInterrupt
        signal.signal(number, lambda *_: os._exit(CONTINUE))


def run(command: Sequence[str], log_path: str, held: Collection[signal.Signals] = ()) -> Ended:
    """Run ``command`` in a process group of its own.

    Its stdout and stderr go to this process's and, together, to the end of ``log_path``. SIGINT, SIGTERM,
    SIGHUP and SIGUSR1 are handed on to the group, unless this process was started to ignore them; a second
    SIGINT kills it, with the exit code of an interrupt. On Linux the child is killed when this process dies,
    even by SIGKILL; and when the child ends, every process that it leaves behind, and any other child of this
    process, is killed too.

    Args:
        held: signals that the child begins with blocked, so that none is lost until it takes care of them.

    Raises:
        ValueError: the program is not there, or the log file cannot be made.
    """
    adopt_orphans()
    with _open_log(log_path) as log:
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                env={**os.environ, STDIN_IS_LAUNCHER: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_prepare(os.getpid(), held),
            )
        except OSError as error:
            raise ValueError(f"{command[0]}: {error.strerror}") from None
        handed_on = [number for number in _FORWARDED if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        interrupts: List[int] = []
        forward = _forward_to(child, interrupts)
        previous = {number: signal.signal(number, forward) for number in handed_on}
        try:
            message = _stream(child, _Log(log, log_path))
        except BaseException:
            _signal_group(child, signal.SIGKILL)  # nobody would read what it prints
            raise
        finally:
            code = child.wait()
            _kill_orphans()
            for number, handler in previous.items():
                signal.signal(number, handler)
    if len(interrupts) > 1:
        message = "a second Ctrl-C; ended at once"
        print(message, file=sys.stderr, flush=True)
        return Ended(INTERRUPTED, message)
    return Ended(code if code >= 0 else 128 - code, message)


def _open_log(path: str) -> BinaryIO:
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


class _Log:
    """A log that may be lost: what it is of goes on, and ends by itself if it needs that disk, too."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file = file
        self.path = path
        self.told = False

    def write(self, chunk: bytes) -> None:
        try:
            self.file.write(chunk)
        except OSError as error:
            if not self.told:
                with contextlib.suppress(OSError):
                    print(f"warning: {self.path}: {error.strerror}; lines are missing there", file=sys.stderr)
            self.told = True


def _stream(child: subprocess.Popen[bytes], log: _Log) -> str:
    """Copy both pipes until they end, or until processes that outlive the child have had their grace.

    Returns:
        The message of :class:`Ended`.
    """
    deadline: Optional[float] = None
    last = b""
    with selectors.DefaultSelector() as selector:
        shown = [stream and Terminal(stream.buffer) for stream in (sys.stdout, sys.stderr)]
        selector.register(_raw(child.stdout), selectors.EVENT_READ, (sys.stdout, shown[0]))
        selector.register(_raw(child.stderr), selectors.EVENT_READ, (sys.stderr, shown[1]))
        while selector.get_map():
            for key, _ in selector.select(timeout=0.5):
                chunk = os.read(key.fd, 1 << 16)
                stream, terminal = key.data
                if not chunk:
                    selector.unregister(key.fileobj)
                log.write(chunk)
                last = (last + chunk)[-_MESSAGE_BYTES:]
                if terminal is None:  # started with it closed, >&-
                    continue
                try:
                    terminal.write(chunk) if chunk else terminal.close()
                except OSError:  # nobody reads it any more, or its disk is full
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                    _signal_group(child, signal.SIGTERM)
            if child.poll() is not None:
                deadline = deadline or time.monotonic() + _GRACE_SECONDS
                if time.monotonic() > deadline:
                    break
    lines = [line for line in last.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def _raw(pipe: Any) -> BinaryIO:
    assert pipe is not None
    return pipe


def _forward_to(child: subprocess.Popen[bytes], interrupts: List[int]) -> Callable[[int, Any], None]:
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
        orphans = children(os.getpid())
        if not orphans:
            return
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def children(parent: int) -> List[int]:
    """Return the processes that ``parent`` has started and that it has not reaped; Linux only, elsewhere
    empty."""
    return [pid for pid in _processes() if _parent(pid) == parent]


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


def _prepare(parent: int, held: Collection[signal.Signals]) -> Callable[[], None]:
    def before_exec() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        die_with_parent(parent)

    return before_exec
