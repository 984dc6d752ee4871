"""``<run>/status.json``: what became of the last start of a run, for whoever has only its folder.

The launcher of node 0 and ``--submit`` write it. How far the run is stands in ``metrics.jsonl`` and
``checkpoints/``.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import time
from typing import Any, BinaryIO, Dict, List, Optional, Sequence

from megatron_vlm.plan.start import LOCK, LOCK_SECONDS
from megatron_vlm.system.exit_codes import DONE, INTERRUPTED, USER_ERROR
from megatron_vlm.system.files import read_json, write_whole
from megatron_vlm.system.locks import is_locked, take_lock

STATUS = "status.json"
QUEUED, RUNNING, ENDED = "queued", "running", "ended"
LAUNCHER_LOCK = ".launcher.lock"  # in the run folder; locked by the launcher of node 0
_held: List[BinaryIO] = []  # its file, open for as long as this process lives


def wait_until_free(run_dir: str) -> None:
    """Wait until no other start is under way in the run folder, before this one's state takes the place of
    its; from then on, until this process ends, others wait for this one.

    Ranks lock the folder as well, but not before they have begun: of two launchers that start together the
    one that comes too late would else have the last word in the file.

    Args:
        run_dir: the run folder.

    Raises:
        ValueError: one is, for a minute at least; or the folder can't be written.
    """
    path = os.path.join(run_dir, LAUNCHER_LOCK)
    try:
        own = open(path, "ab")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    _held.append(own)
    deadline = time.monotonic() + LOCK_SECONDS
    told = False
    while is_locked(os.path.join(run_dir, LOCK)) or not take_lock(own):
        if time.monotonic() > deadline:
            raise ValueError(f"{run_dir}: another process is training here; stop it, or give another --name")
        if not told:
            print(f"{run_dir}: another process is training here; waiting for it to end", flush=True)
            told = True
        time.sleep(0.2)


def note_queued(run_dir: str, job_id: str, command: Sequence[str], more_jobs: Sequence[str] = ()) -> None:
    """Note that a job waits that will start the run, or go on with it.

    Args:
        run_dir: the run folder; made if it isn't there.
        job_id: SLURM's, of the job that starts first.
        command: what was submitted.
        more_jobs: ids of the jobs that carry on after it.

    Raises:
        ValueError: the file can't be written.
    """
    before = read_status(run_dir) or {}
    if before.get("job_id") == job_id:  # it has started already
        _write(run_dir, before["state"], {**before, "more_jobs": list(more_jobs)})
        return
    fields = {"job_id": job_id, "more_jobs": list(more_jobs), "command": list(command)}
    _write(run_dir, QUEUED, {**fields, "starts": _starts(before)})


def note_running(run_dir: str, command: Sequence[str], job_id: Optional[str], log: str) -> None:
    """Note that this process, the launcher of node 0, starts the ranks.

    Args:
        log: of this node.

    Raises:
        ValueError: the file can't be written.
    """
    before = read_status(run_dir) or {}
    fields = {
        "job_id": job_id,
        "more_jobs": before.get("more_jobs", []) if job_id is not None else [],
        "command": list(command),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "log": os.path.abspath(log),
        "starts": _starts(before) + 1,
    }
    if before.get("state") == ENDED and before.get("exit_code") == DONE:
        fields["finished"] = {"status": before, "metrics": _size(run_dir)}
    _write(run_dir, RUNNING, fields)


def note_ended(run_dir: str, exit_code: int, message: str) -> None:
    """Note that the ranks have ended; what :func:`note_running` wrote stays in the file.

    A run that was done stays so, where the start was refused or interrupted before it trained. Where the
    file can't be written, it says so on stderr: the exit code matters more.

    Args:
        message: the last that was said of why.
    """
    before = read_status(run_dir) or {}
    finished = before.pop("finished", None)
    if finished and exit_code in (USER_ERROR, INTERRUPTED) and finished["metrics"] == _size(run_dir):
        with contextlib.suppress(ValueError):
            _replace(run_dir, finished["status"])
        return
    ended = {"started": before.get("time"), "exit_code": exit_code, "message": message}
    try:
        _write(run_dir, ENDED, {**before, **ended})
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)


def read_status(run_dir: str) -> Optional[Dict[str, Any]]:
    """Return the file's content; None where there is none, or where it is damaged."""
    try:
        found = read_json(os.path.join(run_dir, STATUS))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("state") in (QUEUED, RUNNING, ENDED) else None


def _starts(status: Dict[str, Any]) -> int:
    starts = status.get("starts", 0)
    return starts if isinstance(starts, int) else 0


def _write(run_dir: str, state: str, fields: Dict[str, Any]) -> None:
    now = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    _replace(run_dir, {**fields, "state": state, "time": now})


def _size(run_dir: str) -> int:
    """Return the bytes of the iterations that are logged."""
    try:
        return os.path.getsize(os.path.join(run_dir, "metrics.jsonl"))
    except OSError:
        return 0


def _replace(run_dir: str, fields: Dict[str, Any]) -> None:
    try:
        os.makedirs(run_dir, exist_ok=True)
        write_whole(os.path.join(run_dir, STATUS), json.dumps(fields, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"{os.path.join(run_dir, STATUS)}: {error.strerror}") from None
