"""A lock keeps other processes out as long as its process lives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.system.locks import is_locked, locked, take_lock

HOLDERS = {
    "take_lock": "file = open(sys.argv[1], 'w'); assert locks.take_lock(file)\n",
    "locked": "lock = locks.locked(sys.argv[1], or_say='held'); lock.__enter__()\n",
}


@pytest.mark.parametrize("how", HOLDERS)
def test_until_the_process_ends(tmp_path: Path, how: str) -> None:
    path = tmp_path / "lock"
    path.touch()

    def is_held() -> bool:
        if how == "take_lock":
            with open(path, "r+") as file:
                held = not take_lock(file)
            assert is_locked(path) == held
            return held
        try:
            with locked(path, or_say="another is at work there"):
                return False
        except ValueError as error:
            assert str(error) == "another is at work there"
            return True

    assert not is_held()
    code = f"import os, sys\nfrom megatron_vlm.system import locks\n{HOLDERS[how]}print('up', flush=True)\n"
    code += "sys.stdin.readline()\nif os.fork(): os.kill(os.getpid(), 9)\nprint('child', flush=True)\n"
    code += "sys.stdin.readline()\n"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "up\n" and is_held()
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "child\n" and holder.wait() == -9
    # What the killed process has forked lives on: it holds a lock of the second kind alone.
    assert is_held() == (how == "locked")
    holder.stdin.write("\n")
    holder.stdin.close()
    assert holder.stdout.read() == ""  # it has ended, too
    assert not is_held()
