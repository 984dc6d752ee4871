"""How a rank ends, whatever happens in it or to the others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_vlm import rank
from tests.distributed import CONTEXT
from tests.patience import HANG


def raising(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("--x is wrong"), 2, "error: --x is wrong\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a/b"), 2, "error: /a/b: No such file\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "error: No space left\n"),  # of a write to an open file
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "error: /a: Permission denied\n"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), 1, "Traceback"),
        (TimeoutError("no answer"), 1, "Traceback"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "Traceback"),
        (RuntimeError("x"), 1, "Traceback"),
        (RuntimeError("a data loader worker died"), 1, "error: a data loader worker died; a run with --save"),
        (RuntimeError("a data loader worker died (Traceback\n...)"), 1, "Traceback"),
        (RuntimeError("[gloo] Connection closed by peer"), 1, "rank 0: another rank is gone (Connection"),
    ],
)
def test_exit_codes(error: Exception, code: int, words: str, capsys, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert rank.run(raising(error), "cpu") == code
    said = capsys.readouterr().err
    assert said.startswith(words) and (code == 1 or said == words)


def test_a_full_disk_names_the_room(tmp_path, capsys) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "not" / "yet"))
    assert rank.run(raising(error), "cpu") == 2
    assert "iB are free); make room, and the same command goes on" in capsys.readouterr().err


def lose_another(number: int, store: str, how: str, said: Path, codes: multiprocessing.Queue[int]) -> None:
    """Rank 1 leaves, fails, or hangs for as long as rank 0 waits; rank 0 needs it."""
    os.environ["RANK"] = str(number)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with open(said, "w") as file:
        os.dup2(file.fileno(), 2)

    def work() -> None:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(seconds=HANG)
        )
        dist.barrier()
        if number == 1:
            if how == "hangs":
                codes.get()  # nothing comes before rank 0 has ended
            if how == "user error":
                raise ValueError("--x is wrong")
            if how == "crash":
                raise KeyError("x")
            os._exit(0)
        patience = dist.AllreduceOptions()
        patience.timeout = timedelta(seconds=1) if how == "hangs" else timedelta(seconds=HANG)
        dist.group.WORLD.allreduce([torch.ones(1)], patience).wait()

    codes.put(rank.run(work, "cpu"))


@pytest.mark.parametrize("how", ["ends", "hangs", "user error", "crash"])
def test_a_lost_rank_is_one_line(tmp_path: Path, how: str) -> None:
    """It says that the same command goes on only where the other has not ended by an error of its own."""
    codes: multiprocessing.Queue[int] = CONTEXT.Queue()
    ranks = [
        CONTEXT.Process(target=lose_another, args=(n, tmp_path / "store", how, tmp_path / f"{n}", codes))
        for n in (0, 1)
    ]
    for process in ranks:
        process.start()
    ranks[0].join(HANG)
    ranks[1].kill()
    said = (tmp_path / "0").read_text()
    assert ranks[0].exitcode == 0
    assert "Traceback" not in said
    assert "rank 0: another rank is gone (" in said
    goes_on = said.endswith("); a run with --save-optim goes on by the same command\n")
    assert goes_on if how in ("ends", "hangs") else said.endswith("), with an error\n")


BEGINS = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
os.kill(os.getpid(), signal.SIGINT)
from megatron_vlm import rank
print("imported", flush=True)
rank.begin()
"""


def test_ctrl_c_amid_the_imports_waits_for_their_end() -> None:
    """launch/torchrun.py starts ranks with SIGINT blocked."""
    done = subprocess.run([sys.executable, "-c", BEGINS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "imported\n", "")


LEAVES = """
import atexit, sys, threading, time
from megatron_vlm import rank

class Kept:
    def __del__(self):
        sys.stderr.write("taken down")

kept = Kept()
atexit.register(lambda: print("handler", end=" "))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread", end=" "))).start()
print("work", end=" ")
rank.leave(3)
"""


def test_leaves_with_the_interpreter_standing() -> None:
    """After the threads and the exit handlers, with all that was printed."""
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "work thread handler ", "")
