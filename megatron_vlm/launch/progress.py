"""The progress of a run, from its folder alone: also while it trains, waits in a queue, or was killed."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from typing import Any, Dict, List, Optional, Tuple

from megatron_vlm.artifacts.checkpoint import (
    BEST,
    BEST_LOSS,
    CHECKPOINTS,
    RUN_STATE,
    list_checkpoints,
    read_manifest,
)
from megatron_vlm.launch.status import ENDED, QUEUED, RUNNING, STATUS, read_status
from megatron_vlm.system.exit_codes import CONTINUE, DONE, meaning
from megatron_vlm.system.units import count_text, times_text

_METRICS, _CONFIG = "metrics.jsonl", "config.json"
_TAIL_BYTES = 1 << 16
_SQUEUE_SECONDS = 10.0
_SHOWN = ("loss", "tokens_per_second", "images_per_second", "seconds_left", "gpu_hours")


def find_runs(path: str) -> List[str]:
    """Return the run folders that ``path`` means: itself, or those right below a ``--save-dir``.

    Raises:
        ValueError: there is none.
    """
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such folder")
    if _is_run(path):
        return [path]
    found = [entry.path for entry in os.scandir(path) if entry.is_dir() and _is_run(entry.path)]
    if not found:
        raise ValueError(f"{path}: neither a run folder nor a folder of runs (no {STATUS}, no {_METRICS})")
    return sorted(found)


def _is_run(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in (STATUS, _METRICS, CHECKPOINTS))


def progress(run: str) -> Dict[str, Any]:
    """Return what is known of a run.

    Returns:
        ``state`` (one word: queued, running, gone, done, continues, failed or unknown), ``says`` (the
        same as a sentence), and, None where unknown: ``iteration``, ``total``, the metrics of the last
        iteration, ``checkpoint`` and ``resumable`` (folder names), ``best``, ``restarts``, ``status`` (what
        ``status.json`` holds).

    Raises:
        ValueError: a file of the run is damaged.
    """
    status = read_status(run)
    if status is None and os.path.exists(os.path.join(run, STATUS)):
        raise ValueError(f"{os.path.join(run, STATUS)}: damaged; the next start of the run replaces it")
    metrics = _last_line(os.path.join(run, _METRICS))
    state, says = _state(run, status or {}, metrics)
    checkpoints = list_checkpoints(os.path.join(run, CHECKPOINTS))
    if state == "done" and checkpoints:
        says += _why_early(run, str(checkpoints[-1]))
    resumable = [folder for folder in checkpoints if read_manifest(folder)["has_optimizer"]]
    return {
        "run": run,
        "state": state,
        "says": says,
        "iteration": metrics.get("iteration"),
        "total": _total_iterations(run),
        **{name: _number(metrics.get(name)) for name in _SHOWN},
        "checkpoint": checkpoints[-1].name if checkpoints else None,
        "resumable": resumable[-1].name if resumable else None,
        "best": _best(os.path.join(run, BEST, BEST_LOSS)),
        "restarts": max(0, int(_number((status or {}).get("starts")) or 0) - 1),
        "status": status,
    }


def describe(found: Dict[str, Any]) -> str:
    """Return the :func:`progress` for a reader: the run and its state, and a line for each thing that is
    known."""
    lines = [f"{found['run']}: {found['says']}"]
    if found["iteration"] is not None:
        total = found["total"]
        of = f"/{total} ({found['iteration'] / total:.1%})" if total else ""
        loss = "not finite" if found["loss"] is None else f"{found['loss']:.4f}"
        tokens, images = (found[name] or 0 for name in ("tokens_per_second", "images_per_second"))
        speed = f"{tokens:,.0f} tokens/s, {images:,.1f} images/s"
        lines.append(f"  iteration {found['iteration']}{of}, loss {loss}, {speed}")
        if found["state"] == "running" and found["seconds_left"] is not None:
            left = datetime.timedelta(seconds=round(found["seconds_left"]))
            end = datetime.datetime.now() + left
            lines.append(f"  {left} left, until {end:%Y-%m-%d %H:%M}")
    if found["checkpoint"]:
        last = f"  last checkpoint {found['checkpoint']}"
        if found["resumable"] is None:
            last += "; weights only, the run can't be resumed"
        elif found["resumable"] != found["checkpoint"]:
            last += f"; resumes from {found['resumable']}"
        lines.append(last)
    if found["best"]:
        lines.append(
            f"  lowest validation loss {found['best']['loss']:.4f}, iteration {found['best']['iteration']}"
        )
    if found["restarts"]:
        lines.append(f"  started again {times_text(found['restarts'])}")
    return "\n".join(lines)


def closing(run: str, script: str, sif_path: Optional[str] = None) -> str:
    """Return what a run that is done leaves: its losses, where its weights are, and commands to go on with.

    Args:
        script: path of run.py as it was started; the commands name the others beside it.
        sif_path: container image that the run was started in.

    Raises:
        ValueError: a file of the run is damaged.
    """
    found = progress(run)
    loss = "" if found["loss"] is None else f", last loss {found['loss']:.4f}"
    lines = [f"done     {run}: {count_text(found['iteration'] or 0, 'iteration')}{loss}"]
    if found["best"]:
        lines.append(
            f"best     validation loss {found['best']['loss']:.4f}, iteration {found['best']['iteration']}: "
            f"{os.path.join(run, BEST)}"
        )
    if found["checkpoint"]:
        lines.append(f"weights  {os.path.join(run, CHECKPOINTS, found['checkpoint'])}")
        taken = os.path.join(run, BEST) if found["best"] else run
        image = ["--sif-path", sif_path] if sif_path else []
        scripts = os.path.dirname(os.path.dirname(script))
        convert = os.path.join(scripts, "convert", "convert_megatron_to_hf.py")
        generate = os.path.join(scripts, "inference", "generate.py")
        commands = [
            [convert, "--megatron-dir", taken, "--hf-dir", os.path.join(run, "hf")],
            [generate, "--megatron-dir", taken, "--prompt", "Hello"],
        ]
        for name, command in zip(("next", ""), commands):
            lines.append(f"{name:<8} {shlex.join([_python(), *command, *image])}")
    return "\n".join(lines)


def _python() -> str:
    """Return this interpreter as a user would type it."""
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and os.path.abspath(found) == sys.executable:
            return name
    return sys.executable


def _state(run: str, status: Dict[str, Any], metrics: Dict[str, Any]) -> Tuple[str, str]:
    state, job = status.get("state"), status.get("job_id")
    if state == QUEUED:
        return _queued(str(job))
    if state == RUNNING:
        return _running(run, status)
    if state == ENDED:
        code, message = status.get("exit_code"), status.get("message")
        if not isinstance(code, int):
            raise ValueError(f"{os.path.join(run, STATUS)}: no exit code; the file is damaged")
        more = status.get("more_jobs") or []
        if code == DONE:
            return "done", f"done since {status.get('time')}"
        if code == CONTINUE and isinstance(more, list) and more:
            return "continues", f"{meaning(code)}; job {more[0]} carries on"
        words = f"{meaning(code)}, {status.get('time')}" + (f": {message}" if message else "")
        return ("continues" if code == CONTINUE else "failed"), words
    if metrics:
        return "unknown", f"not started by run.py; last iteration {_age(os.path.join(run, _METRICS))} ago"
    return "unknown", "never started"


def _queued(job: str) -> Tuple[str, str]:
    seen = job_state(job)
    if seen is None:
        return "queued", f"queued as job {job}"
    if not seen:
        return "gone", f"was queued as job {job}, which is no longer there and has not started the run"
    return "queued", f"queued as job {job} ({seen})"


def _running(run: str, status: Dict[str, Any]) -> Tuple[str, str]:
    host, pid, job = status.get("host"), status.get("pid"), status.get("job_id")
    where = f"on {host}" + (f", job {job}" if job else "")
    signs = [os.path.join(run, _METRICS), str(status.get("log")), os.path.join(run, STATUS)]
    age = min((_age(sign) for sign in signs if os.path.exists(sign)), default=datetime.timedelta(0))
    if host == socket.gethostname():
        alive: Optional[bool] = isinstance(pid, int) and os.path.exists(f"/proc/{pid}")
    else:
        seen = job_state(str(job)) if job else None
        alive = None if seen is None else seen.startswith("RUNNING") or seen.startswith("COMPLETING")
    if alive is False:
        return "gone", f"killed {where} without a word; last sign {age} ago. The same command resumes it"
    if alive is None:
        return "running", f"running {where}, as far as can be seen from here; last sign {age} ago"
    return "running", f"running {where}; last sign {age} ago"


def job_state(job: str) -> Optional[str]:
    """Return state and reason of a job, empty if it has left the queue; None where SLURM doesn't answer."""
    if not job or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T %r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    lines = answer.stdout.split("\n")
    return lines[0].strip()


def _age(path: str) -> datetime.timedelta:
    seconds = datetime.datetime.now().timestamp() - os.stat(path).st_mtime
    return datetime.timedelta(seconds=max(0, round(seconds)))


def _last_line(path: str) -> Dict[str, Any]:
    """Return the last whole object of a file that may be being written; empty if there is none.

    Raises:
        ValueError: there are lines, and none of the last is an object.
    """
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines[:-1]):
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        if isinstance(found, dict) and isinstance(found.get("iteration"), int):
            return found
    if len(lines) > 2:
        raise ValueError(f"{path}: none of its last lines is an iteration; the file is damaged")
    return {}


def _training(run: str) -> Dict[str, Any]:
    training = (_json(os.path.join(run, _CONFIG)) or {}).get("training")
    return training if isinstance(training, dict) else {}


def _total_iterations(run: str) -> Optional[int]:
    training = _training(run)
    samples, batch = training.get("train_samples"), training.get("global_batch_size")
    total = training.get("train_iters")
    if isinstance(samples, int) and isinstance(batch, int) and batch > 0:  # one pass over the data, for one
        total = samples // batch
    return total if isinstance(total, int) and total > 0 else None


def _why_early(run: str, checkpoint: str) -> str:
    """Return why a run that is done ended early, by ``--early-stopping-patience``; else empty."""
    patience = _training(run).get("early_stopping_patience")
    state = _json(os.path.join(checkpoint, RUN_STATE)) or {}
    tried, iteration = state.get("evaluations_without_improvement"), state.get("iteration")
    total = _total_iterations(run)
    if not (isinstance(patience, int) and isinstance(tried, int) and isinstance(iteration, int)):
        return ""
    if tried < patience or iteration >= (total or 0):
        return ""
    best = os.path.join(run, BEST)
    where = f"; the best checkpoint is {best}" if os.path.isdir(best) else ""
    return f"; stopped early at iteration {iteration}, {tried} evaluations without an improvement{where}"


def _best(path: str) -> Optional[Dict[str, Any]]:
    found = _json(path)
    if found is not None and (_number(found.get("loss")) is None or _number(found.get("iteration")) is None):
        raise ValueError(f"{path}: holds no loss and iteration; the file is damaged")
    return found


def _number(value: Any) -> Optional[float]:
    return value if isinstance(value, (int, float)) else None


def _json(path: str) -> Optional[Dict[str, Any]]:
    """Return a file's object; None if it isn't there.

    Raises:
        ValueError: it holds something else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no object; the file is damaged")
    return found
