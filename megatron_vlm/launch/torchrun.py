"""torchrun, ending with the exit code of the rank that failed and without a traceback of its own.

    python -m megatron_vlm.launch.torchrun <flags of torchrun> -m megatron_vlm.training <flags>

torchrun itself ends with 1 whatever happened, so a user error (exit code 2) could not be told from a
crash. This module runs where torch is, possibly inside a container; the launcher never imports it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
from typing import Any, List

from megatron_vlm.launch.process import STDIN_IS_LAUNCHER

USER_ERROR = 2


def main(argv: List[str]) -> int:
    """Run torchrun with ``argv``; returns the exit code."""
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
            print(f"ended by {_signal_name(error.sigval)}", file=sys.stderr)  # type: ignore[attr-defined]
            return 128 + int(error.sigval)  # type: ignore[attr-defined]
        raise
    return 0


def _die_with_launcher() -> None:
    os.read(0, 1)  # nothing is ever written: this returns when the launcher is gone
    os.kill(os.getpid(), signal.SIGKILL)  # the ranks die with their parent


def _report_failure(error: Any) -> int:
    """Say which rank failed first; other ranks often fail only because it is gone."""
    if any(failure.exitcode == USER_ERROR for failure in error.failures.values()):
        return USER_ERROR  # the rank has said what is wrong
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        print(f"rank {rank} was ended by {_signal_name(-failure.exitcode)}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    print(f"rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
    return int(failure.exitcode)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
