"""What a run folder says of its run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_vlm.launch import status


def test_the_last_state_is_kept_with_what_was_before(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "it's a run")
    assert status.read_status(run) is None
    status.note_queued(run, "17", ["run.py", "--name", "it's a run"], more_jobs=["18", "19"])
    found = status.read_status(run)
    assert (found["state"], found["job_id"], found["starts"]) == ("queued", "17", 0)

    status.note_running(run, ["torchrun", "x"], "17", str(tmp_path / "a.log"))
    found = status.read_status(run)
    assert (found["state"], found["pid"], found["host"]) == ("running", os.getpid(), socket.gethostname())
    assert (found["starts"], found["more_jobs"]) == (1, ["18", "19"])
    started = found["time"]
    status.note_queued(run, "17", ["run.py"], more_jobs=["18"])  # by a --submit that a fast job overtook
    found = status.read_status(run)
    assert (found["state"], found["more_jobs"], found["command"]) == ("running", ["18"], ["torchrun", "x"])

    status.note_ended(run, 75, "stopped at iteration 3")
    found = status.read_status(run)
    assert (found["state"], found["exit_code"], found["message"]) == ("ended", 75, "stopped at iteration 3")
    assert (found["started"], found["job_id"]) == (started, "17")
    status.note_queued(run, "20", ["run.py"])
    found = status.read_status(run)
    assert (found["starts"], "exit_code" in found) == (1, False)
    assert os.listdir(run) == [status.STATUS]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "flying"}', '{"state": []}', "\xff"])
def test_a_damaged_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / status.STATUS).write_text(text, encoding="latin-1")
    assert status.read_status(str(tmp_path)) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"status\.json: Not a directory"):
        status.note_running(str(tmp_path / "file" / "run"), [], None, "log")
    (tmp_path / "run" / status.STATUS).mkdir(parents=True)
    status.note_ended(str(tmp_path / "run"), 0, "")
    assert capsys.readouterr().err == f"warning: {tmp_path}/run/status.json: Is a directory\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [status.STATUS]


def test_what_is_written_is_json(tmp_path: Path) -> None:
    status.note_queued(str(tmp_path), "1", ["a b", "$x", "\n"])
    assert json.loads((tmp_path / status.STATUS).read_text())["command"] == ["a b", "$x", "\n"]


@contextmanager
def another_process(code: str, argument: Path) -> Iterator[None]:
    """Python that runs ``code`` and then lives until the block ends, when it is killed."""
    command = [sys.executable, "-c", f"{code}; print(flush=True); input()", str(argument)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield
        process.kill()


def test_a_second_start_leaves_the_first_ones_state(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(status, "LOCK_SECONDS", 0.0)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    refused = pytest.raises(ValueError, match="another process is training here")
    with another_process(hold, tmp_path / ".lock"), refused:
        status.wait_until_free(str(tmp_path))
    status.wait_until_free(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".launcher.lock", ".lock"]


def test_of_two_launchers_at_once_one_waits(tmp_path: Path, monkeypatch) -> None:
    """Its ranks would lock the folder seconds later only, when the other's state is in the file already."""
    monkeypatch.setattr(status, "LOCK_SECONDS", 0.0)
    code = (
        "import sys; from megatron_vlm.launch import status; status.wait_until_free(sys.argv[1]); "
        "status.note_running(sys.argv[1], [], None, 'log')"
    )
    refused = pytest.raises(ValueError, match="another process is training here")
    with another_process(code, tmp_path), refused:
        status.wait_until_free(str(tmp_path))
    status.wait_until_free(str(tmp_path))


@pytest.mark.parametrize("code", [2, 130])
def test_a_refused_start_leaves_a_finished_run_as_it_was(tmp_path, code) -> None:
    """But not one that has trained."""
    run = str(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    status.note_running(run, ["first"], None, "log")
    status.note_ended(run, 0, "done")
    finished = status.read_status(run)
    status.note_running(run, ["second"], None, "log")
    assert status.read_status(run)["state"] == status.RUNNING
    status.note_ended(run, code, "error: no")
    assert status.read_status(run) == finished
    for lines, at_end in (('{"iteration": 1}\n{"iteration": 2}\n', code), ("", code)):
        status.note_running(run, ["third"], None, "log")
        (tmp_path / "metrics.jsonl").write_text(lines)
        status.note_ended(run, at_end, "error: not finite")
        assert status.read_status(run)["exit_code"] == code
        status.note_ended(run, 0, "done")
