"""The signals SIGUSR1, SIGTERM and SIGINT (Ctrl-C): the run saves at the end of the iteration, and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from megatron_vlm.system.exit_codes import (
    CONTINUE,
    INTERRUPTED,
    SAME_REQUEST_SECONDS,
    STOP_SIGNALS,
    STOPPED,
)


class StopRequest:
    """The request of a signal that the run save and end.

    One rank that was asked is enough: the ranks compare notes once an iteration, in a reduction that they
    need anyway (:func:`sum_losses`), so that all of them save the same iteration.

    Attributes:
        asked: this rank was.
        agreed: all ranks know that one was; they learn of it in the same collective call.
    """

    def __init__(self) -> None:
        self.asked = False
        self.agreed = False
        self._trains = False
        self._leaves = False
        self._interrupted = False
        self._first_sigterm: float | None = None
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0

    def listen(self) -> StopRequest:
        """Take this process's signals from now on.

        They are blocked and a thread waits for them, since the main thread may be in a call that does not
        return: a rendezvous with a node that is not there. What this process starts has them blocked as
        well: SLURM signals loader workers and checkpoint writers, too.
        """
        for number in STOP_SIGNALS:  # for a thread that does not block them: it is older, or was told to
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()
        return self

    def hold(self) -> None:
        """Keep signals until an iteration is done, from now on.

        Before, with nothing to lose, a signal ends this rank at once.
        """
        self._trains = True

    def agree(self, device: torch.device) -> None:
        """Let all ranks know of a request to one; a collective call."""
        asked = torch.tensor([self.asked], dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self.agreed |= bool(asked)

    def leave(self) -> None:
        """Wait for all ranks, before they end with an exit code other than 0; a collective call.

        When one has ended so, torchrun sends the others SIGTERM, and soon SIGKILL.
        """
        self._leaves = True
        dist.barrier()

    def _wait(self) -> None:
        while True:
            heard = signal.sigwaitinfo(STOP_SIGNALS)
            self._note(heard.si_signo, heard.si_pid)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number, sender=0)

    def _note(self, number: int, sender: int) -> None:
        if number == signal.SIGTERM and sender == self._torchrun != 0:
            # Its only reason, since launch/torchrun.py hands on SIGUSR1: another rank has ended.
            if not self._leaves:
                os._exit(STOPPED)
            return
        if not self._trains:
            _tell("ended by a signal before the first iteration; the same command begins again")
            os._exit(INTERRUPTED if number == signal.SIGINT else CONTINUE)
        if number == signal.SIGINT:
            self._note_interrupt()
        if number == signal.SIGTERM:
            now = time.monotonic()
            if self._first_sigterm is not None and now - self._first_sigterm > SAME_REQUEST_SECONDS:
                _tell("a second SIGTERM; ending without a save")
                os._exit(STOPPED)
            self._first_sigterm = self._first_sigterm or now
        self.asked = True

    def _note_interrupt(self) -> None:
        """Say what Ctrl-C does. A second one ends a rank that stands alone; elsewhere run.py sees to that, as
        srun sends SIGINT to it and to the ranks as well."""
        if not self._interrupted:
            _tell("Ctrl-C: the run ends after this iteration; once more, and it ends at once, without a save")
        elif not self._torchrun:
            _tell("a second Ctrl-C; ending without a save")
            os._exit(INTERRUPTED)
        self._interrupted = True


def _tell(what: str) -> None:
    """Tell of a signal once on each node. Not by print: the main thread may be in the middle of one."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, f"rank {os.environ.get('RANK', '0')}: {what}\n".encode())
