"""The beginning and the end of one rank, whatever it runs in between. Imports nothing heavy by itself."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn, TextIO

from megatron_vlm.config.sections.launch import RANK0_LOG
from megatron_vlm.system.exit_codes import DONE, STOP_SIGNALS, USER_ERROR
from megatron_vlm.system.processes import die_with_parent
from megatron_vlm.system.units import size_text

# How gloo, NCCL and torch's store tell that a process at the other end has ended, or its node has.
_LOST_RANK = re.compile(
    "Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting \\d+ms"
    "|remote process exited or there was a network error"
)
# What data/loading/loader.py says of a worker that is gone or hangs; where it failed, a traceback follows.
_LOST_WORKER = re.compile(r"a data loader worker [^\n]*")
_GO_ON = "a run with --save-optim goes on by the same command"
_ERROR, _CRASH = "error", "crash"  # what a rank tells the others before it ends by itself


def begin(takes_signals: bool = False) -> None:
    """Call this before anything that takes time, torch's import for one.

    Args:
        takes_signals: SIGUSR1, SIGTERM and SIGINT stay blocked, as launch/torchrun.py has them, until the
            caller takes care of them; otherwise they end this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, without a traceback from every rank
    if not takes_signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _leave_nothing_behind()
    _quiet_megatron_core()
    if is_first() and RANK0_LOG in os.environ:
        _keep_log(os.environ.pop(RANK0_LOG))


def user_error(error: ValueError, speaks: bool) -> int:
    """Print what is wrong, if this rank is the one to say it; returns the exit code."""
    if speaks:  # an error that all ranks meet is told once
        print(f"error: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def is_first() -> bool:
    """Return whether this is rank 0, before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def run(work: Callable[[], int | None], device: str | None) -> int:
    """Do this rank's work, which joins the process group first, and leave the group.

    Args:
        work: returns an exit code, or None for 0.
        device: as ``parallel.initialize`` takes it.

    Returns:
        The exit code: of the work, 2 for a user error, 1 for any other.
    """
    from megatron_vlm import parallel

    code = 1
    try:
        code = work() or DONE
    except ValueError as error:
        code = user_error(error, parallel.first_to_arrive(_ERROR))
    except Exception as error:
        lost = _LOST_RANK.search(str(error)) if isinstance(error, RuntimeError) else None
        if isinstance(error, OSError) and _is_of_a_file(error):
            where = f"{error.filename}: " if error.filename else ""
            reason = ValueError(f"{where}{error.strerror or error}{_free_space(error)}")
            code = user_error(reason, parallel.first_to_arrive(_ERROR))
        # What follows is told in full here, since the process may end at once.
        elif lost:
            # Another rank failed and has said why, if it could; a traceback of this one would bury that.
            what = f"rank {os.environ.get('RANK', '0')}: another rank is gone ({lost.group()})"
            print(what + (", with an error" if _has_failed() else f"; {_GO_ON}"), file=sys.stderr, flush=True)
        elif isinstance(error, RuntimeError) and _LOST_WORKER.fullmatch(str(error)):
            print(f"error: {error}; {_GO_ON}", file=sys.stderr, flush=True)
        else:
            with contextlib.suppress(Exception):
                parallel.first_to_arrive(_CRASH)
            traceback.print_exc()
    if code and parallel.choose_device(device)[0] == "cuda":
        # Leaving NCCL's groups waits for the other ranks, which may be waiting for this one.
        sys.stderr.flush()
        os._exit(code)
    parallel.finalize()
    return code


def leave(code: int) -> NoReturn:
    """End this process as ``sys.exit`` does, but leave the interpreter standing.

    A thread of gloo's or autograd's that asks for Python's lock while the interpreter is being taken down is
    ended by ``pthread_exit``. Where its function may not throw, the process aborts ("terminate called without
    an active exception"), in some hundreds of runs once, and torchrun counts a run that is done as failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that aren't daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _has_failed() -> bool:
    """Return whether a rank has ended by an error of its own, which the same command would meet again, and
    was not killed; also where none can be asked any more."""
    from megatron_vlm import parallel

    try:
        return any(map(parallel.has_arrived, (_ERROR, _CRASH)))
    except Exception:  # of the store, whose process is gone as well
        return True


def _is_of_a_file(error: OSError) -> bool:
    """Return whether an error is of a file or of room, which a user can mend, unlike a connection that
    broke."""
    if isinstance(error, (ConnectionError, TimeoutError, ChildProcessError)):
        return False
    # A write to an open file doesn't name it.
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class _Copied(io.TextIOBase):
    """A stream that also writes into a log, which may be lost."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream = stream
        self._log = log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk: the launcher's log tells of it
            self._log.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()


def _keep_log(path: str) -> None:
    try:
        log = open(path, "a", encoding="utf-8", errors="replace", buffering=1)
    except OSError as error:
        print(f"warning: {path}: {error.strerror}; rank 0 has no log of its own", file=sys.stderr)
        return
    sys.stdout, sys.stderr = _Copied(sys.stdout, log), _Copied(sys.stderr, log)


def _free_space(error: OSError) -> str:
    """Return the line that a user needs of a disk that is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not error.filename:
        return ""
    folder = os.path.dirname(os.path.abspath(error.filename))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = size_text(shutil.disk_usage(folder).free)
    return f" ({free} are free); make room, and the same command goes on from the last checkpoint"


def _quiet_megatron_core() -> None:
    """Hide megatron-core's warnings of optional packages and its own deprecated calls: no user can mend
    them."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"megatron\.core|torch\.jit|torch\.distributed"
        )


def _leave_nothing_behind() -> None:
    """A rank whose torchrun is killed, and what a killed rank has forked (loader workers, writers of a
    checkpoint), must not go on beside the run that takes its place."""
    if sys.platform != "linux":
        return
    os.register_at_fork(after_in_child=die_with_parent)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
        if os.environ.get("MEGATRON_VLM_TORCHRUN_PID", str(os.getppid())) != str(os.getppid()):
            sys.exit(1)  # it died before this could be asked for
