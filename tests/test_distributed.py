"""The pool of ranks: a rank that lives is waited for, and one that is lost or hangs ends the wait for all."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import distributed
from tests.distributed import Pool


def sum_of_ranks() -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)
    return float(total)


def lose_rank_1(how: str) -> float:
    if dist.get_rank() == 1:
        if how == "raises":
            raise RuntimeError("rank 1 can't go on")
        if how == "ends":
            os._exit(7)
        time.sleep(3600)
    return sum_of_ranks()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """A pool of this file's own, since it is started again after each loss."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "rank 1 of 2: (.|\n)*rank 1 can't go on"),
        ("ends", "rank 1 of 2: its process has ended, exit code 7|rank 0 of 2: (.|\n)*Connection"),
        ("hangs", "rank 0 of 2: no rank has gone on for 2 s"),
    ],
)
def test_a_lost_rank_ends_the_others_at_once(pair: Pool, how: str, words: str, monkeypatch) -> None:
    """And the pool serves the next test. The wait of a hanging test is shortened where that is tested."""
    monkeypatch.setattr(distributed, "IDLE", 2.0 if how == "hangs" else distributed.IDLE)
    with pytest.raises(AssertionError, match=words):
        pair.run(2, lose_rank_1, how)
    assert pair.run(2, sum_of_ranks) == [1.0, 1.0]


def test_a_rank_that_was_reaped_by_others(pair: Pool) -> None:
    """Multiprocessing then says for ever that it is alive."""
    pid = pair.processes[0].pid
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # it is a child of the process that it was forked off
        os.waitpid(pid, 0)
    with pytest.raises(AssertionError, match="rank 0 of 2: its process has ended"):
        pair.run(2, sum_of_ranks)
    assert pair.run(2, sum_of_ranks) == [1.0, 1.0]


def work_slowly() -> float:
    """Work as a rank beside many others does, with a group whose every message is late."""
    end = time.monotonic() + 6.0
    while dist.get_rank() == 1 and time.monotonic() < end:
        pass
    return sum_of_ranks()


def test_a_slow_rank_is_waited_for(pair: Pool, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "IDLE", 5.0)
    assert pair.run(2, work_slowly) == [1.0, 1.0]


def connect_at_the_second_time(mark: str) -> float:
    """Fail to connect as gloo does now and then, before anything is done."""
    if dist.get_rank() == 0 and not os.path.exists(mark):
        open(mark, "w").close()
        raise RuntimeError("Gloo connectFullMesh failed with Connection closed by peer")
    return sum_of_ranks()


def test_ranks_that_did_not_connect_are_asked_once_more(pair: Pool, tmp_path: Path, capsys) -> None:
    assert pair.run(2, connect_at_the_second_time, str(tmp_path / "mark")) == [1.0, 1.0]
    assert "asked once more" in capsys.readouterr().err
