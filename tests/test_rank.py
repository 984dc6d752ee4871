"""How a rank ends, whatever happens in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from megatron_vlm import rank


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
        (RuntimeError("[gloo] Connection closed by peer"), 1, "rank 0: another rank is gone\n"),
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
    assert "MiB are free); make room, and the same command goes on" in capsys.readouterr().err
