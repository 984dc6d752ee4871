"""torchrun, ending with the exit code of the rank that failed and without a traceback of its own.

    python -m megatron_vlm.launch.torchrun <flags of torchrun> -m megatron_vlm.training <flags>

torchrun itself ends with 1 whatever happened, so a user error (exit code 2) could not be told from a
crash. And it would end its ranks when it gets a signal that asks the run to save; this module hands that
on to them. It runs where torch is, possibly inside a container; the launcher never imports it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, List

from megatron_vlm.launch.process import STDIN_IS_LAUNCHER, children
from megatron_vlm.system.exit_codes import (
    CONTINUE,
    DONE,
    INTERRUPTED,
    SAME_REQUEST_SECONDS,
    STOP_SIGNALS,
    STOPPED,
    USER_ERROR,
    signal_name,
)


def main(argv: List[str]) -> int:
    """Run torchrun with ``argv``; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # even where it was ignored: who sends it means it
    # Blocked before there are other threads; the ranks begin so, too, until they can take care of them.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    ended = threading.Event()
    threading.Thread(target=_hand_on_signals, args=[ended], daemon=True).start()
    if os.environ.pop(STDIN_IS_LAUNCHER, None):
        threading.Thread(target=_die_with_launcher, daemon=True).start()
    # It repeats below, at length, what this module says in one line.
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(lambda record: False)
    os.environ["MEGATRON_VLM_TORCHRUN_PID"] = str(os.getpid())  # ranks see by it whether this one lives
    run = importlib.import_module("torch.distributed.run")
    try:
        run.main(argv)
    except Exception as error:
        # Known by name, since torch must not be imported at the top of this package.
        kind = type(error).__name__
        if kind == "ChildFailedError":
            return _report_failure(error)
        if kind == "SignalException":
            print(f"ended by {signal_name(error.sigval)}", file=sys.stderr)  # type: ignore[attr-defined]
            return 128 + int(error.sigval)  # type: ignore[attr-defined]
        if kind in ("DistNetworkError", "DistStoreError"):  # after ten minutes
            said = str(error).partition("\n")[0]
            what = "the nodes do not reach each other; look at --master-addr, --master-port, --interface"
            print(f"error: {what} and whether each node has started ({said})", file=sys.stderr)
            return USER_ERROR
        raise
    finally:
        ended.set()
    return DONE


def _hand_on_signals(ended: threading.Event) -> None:
    """Tell the ranks to save and end; at a second SIGTERM, end them at once. At a second SIGINT run.py does.

    They get SIGUSR1 for SIGTERM, which is what torchrun sends when one of them has failed.
    """
    first_sigterm = None
    while not ended.is_set():
        number = signal.sigwait(STOP_SIGNALS)
        ranks = children(os.getpid())
        if ended.is_set():
            return
        if not ranks:
            what = "ended by a signal before the ranks began; the same command begins again"
            print(what, file=sys.stderr, flush=True)
            os._exit(INTERRUPTED if number == signal.SIGINT else CONTINUE)
        again = first_sigterm is not None and time.monotonic() - first_sigterm > SAME_REQUEST_SECONDS
        if number == signal.SIGTERM and again:
            print("a second SIGTERM; ending without a save", file=sys.stderr, flush=True)
            _send(signal.SIGKILL, ranks)
            os._exit(STOPPED)
        if number == signal.SIGTERM and first_sigterm is None:
            first_sigterm = time.monotonic()
        _send(signal.SIGUSR1 if number == signal.SIGTERM else number, ranks)


def _send(number: int, pids: List[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def _die_with_launcher() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the launcher is gone
    os.kill(os.getpid(), signal.SIGKILL)  # the ranks die with their parent


def _report_failure(error: Any) -> int:
    """Say which rank failed first; other ranks often fail only because it is gone."""
    codes = {failure.exitcode for failure in error.failures.values()}
    for code in (USER_ERROR, CONTINUE, INTERRUPTED):
        if code in codes:
            return code  # the rank has said why
    rank, failure = error.get_first_failure()
    if failure.exitcode == STOPPED:
        return STOPPED  # has said why, too
    if failure.exitcode < 0:
        print(f"rank {rank} was ended by {signal_name(-failure.exitcode)}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    print(f"rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
    return int(failure.exitcode)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
