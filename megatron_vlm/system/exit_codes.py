"""The exit codes of run.py and of each rank. What is not here is a crash, or 128 + n for signal n."""

from __future__ import annotations

import signal

DONE = 0  # also where nothing was left to do
USER_ERROR = 2
HUNG = 3  # a rank hung, and the watchdog ended the run
CONTINUE = 75  # ended by a signal, saved, to be continued by the same command; EX_TEMPFAIL of sysexits.h
STOPPED = 128 + signal.SIGTERM  # ended by a signal, with nothing to continue from
INTERRUPTED = 128 + signal.SIGINT  # ended by Ctrl-C before the first iteration, or by a second Ctrl-C

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # save and end
# A SIGTERM that follows another so closely is the same: SLURM signals a process both itself and through srun.
SAME_REQUEST_SECONDS = 5.0

_MEANINGS = {
    DONE: "done",
    USER_ERROR: "stopped by an error that the message names",
    HUNG: "a rank hung; the stacks of all ranks are in logs/stacks",
    CONTINUE: "ended by a signal, to be continued by the same command",
}


def meaning(code: int) -> str:
    """Say in a few words what an exit code means."""
    if code in _MEANINGS:
        return _MEANINGS[code]
    if code > 128:
        return f"ended by {signal_name(code - 128)}"
    return f"failed with exit code {code}"


def signal_name(number: int) -> str:
    """Return ``SIGTERM``, or ``signal 64`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
