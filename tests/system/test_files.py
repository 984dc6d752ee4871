"""Files are there whole or not at all, and what is wrong with one is a line that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.system.files import read_json, write_whole


def test_a_file_appears_whole(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a bare name is one in the current folder
    write_whole("text", "größer\n")
    write_whole(tmp_path / "bytes", b"\xff")
    write_whole("text", "anew")
    assert Path("text").read_text(encoding="utf-8") == "anew" and Path("bytes").read_bytes() == b"\xff"
    assert sorted(os.listdir()) == ["bytes", "text"]


def test_what_is_there_stays_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "text")
    assert path.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_kill_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """Between the last byte and the name, where a writer in place would have lost the old content."""
    (tmp_path / "file").write_text("before")
    code = (
        "import os, signal, sys\nfrom megatron_vlm.system import files\n"
        "files.os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_whole(sys.argv[1], 'after')"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert ended.returncode == -signal.SIGKILL and (tmp_path / "file").read_text() == "before"
    assert all(name.startswith(".") for name in os.listdir(tmp_path) if name != "file")


@pytest.mark.parametrize("text", ["", "{", "[1,]", "[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: not valid JSON (") and "\n" not in str(error.value)
