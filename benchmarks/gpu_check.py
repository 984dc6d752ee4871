"""What only a GPU can show, in one command of under eight minutes: ``make gpu-check``.

Steps run one after the other, each a process of its own with a limit of time. What a step has found is
written as soon as it ends; one that fails or runs too long is noted, and the next one follows; one for which
too little time is left isn't begun. Without a GPU, or with ``--dry-run``, the steps run on the CPU at tiny
sizes, and what needs CUDA is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.compare import processor
from benchmarks.gpu.report import bars, table

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "accelerate", "megatron-energon")
DONE, FAILED, NOT_RUN = "done", "failed", "not run"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        arguments: of Python; ``--result FILE`` is added, and ``--tiny`` without a GPU.
        expected: seconds on an H100. It isn't begun with less, and is killed after twice as many.
        needs_cuda: it has no tiny form.
    """

    name: str
    arguments: tuple[str, ...]
    expected: float
    needs_cuda: bool = False


def speed(shape: str, side: str, expected: float) -> Step:
    """A step that trains at a shape."""
    arguments = ("-m", "benchmarks.gpu.speed", "--shape", shape, "--side", side)
    return Step(f"{shape}-{side}", arguments, expected, needs_cuda=side == "fp8")


# What the bars need comes first.
STEPS = (
    Step("ceiling", ("-m", "benchmarks.gpu.ceiling"), 20),
    speed("7B", "bf16", 30),
    speed("7B", "fp8", 30),
    speed("7B", "transformers", 35),
    Step("specs", ("-m", "benchmarks.gpu.specs"), 40),
    Step("digits", ("-m", "benchmarks.gpu.digits"), 130),
    Step("parity", ("-m", "benchmarks.gpu.parity"), 90),
    speed("1B", "bf16", 30),
    speed("1B", "fp8", 30),
    speed("1B", "transformers", 35),
)


def run_step(step: Step, seconds: float, tiny: bool, folder: Path) -> dict[str, Any]:
    """Run a step for at most so many seconds.

    Returns:
        ``status``, ``seconds``, the ``command``, with DONE its ``result``, else the ``reason``.
    """
    result = folder / f"{step.name}.json"
    log = result.with_suffix(".log")
    command = [sys.executable, *step.arguments, "--result", str(result), *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    if tiny:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begun = time.monotonic()
    reason = ""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own processes end with it
        )
        try:
            code = process.wait(seconds)
            reason = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"no end after {seconds:.0f} s"
        finally:
            _kill_group(process)
    found: dict[str, Any] = {
        "status": FAILED if reason else DONE,
        "seconds": round(time.monotonic() - begun, 1),
        "command": shlex.join(["python", *step.arguments]),
    }
    if result.exists():
        found["result"] = json.loads(result.read_text())
    elif not reason:
        found["status"], reason = FAILED, "it has written no result"
    if reason:
        found["reason"] = reason
        found["output"] = log.read_text(errors="replace")[-3000:]
    return found


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def check(
    steps: Sequence[Step], minutes: float, tiny: bool, folder: Path, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the steps within the time.

    Args:
        note: called with all steps so far, by their names, after each.
    """
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}
    for step in steps:
        left = end - time.monotonic()
        if tiny and step.needs_cuda:
            found[step.name] = {"status": NOT_RUN, "reason": "needs CUDA"}
        elif (left < step.expected and not tiny) or left <= 0:
            reason = f"{max(left, 0):.0f} s were left, and it takes {step.expected:.0f}"
            found[step.name] = {"status": NOT_RUN, "reason": reason}
        else:
            limit = left if tiny else min(left, 2 * step.expected)
            found[step.name] = run_step(step, limit, tiny, folder)
        one = found[step.name]
        took = f", {one['seconds']:.0f} s" if "seconds" in one else ""
        reason = f": {one['reason']}" if "reason" in one else ""
        print(f"{step.name}: {one['status']}{took}{reason}", flush=True)
        if "output" in one:
            print(one["output"].rstrip(), flush=True)
        note(found)
    return found


def versions() -> dict[str, str]:
    """Of Python, the packages that matter, CUDA and its driver, where they are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        found["driver"] = driver.read_text().split("Kernel Module")[-1].split()[0]
    return found


def _commit() -> str:
    ended = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=CHECKOUT, capture_output=True, text=True
    )
    return ended.stdout.strip() or "unknown"


def main(argv: list[str]) -> int:
    """Returns 1 if a step failed or a bar isn't met, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all steps (default: 8)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, as without a GPU")
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="only these")
    args = parser.parse_args(argv)
    tiny = args.dry_run or not torch.cuda.is_available()
    name = "dry run" if tiny else torch.cuda.get_device_name()
    output = args.output or (Path(tempfile.mkdtemp()) if tiny else CHECKOUT / "benchmarks" / "results")
    output.mkdir(parents=True, exist_ok=True)
    today = date.today().isoformat()
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    path = output / f"gpu-{'-'.join(words)}-{today}.json"
    report: dict[str, Any] = {
        "machine": processor() if tiny else name,
        "date": today,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *argv]),
        "dry_run": tiny,
        "versions": versions(),
    }

    def note(steps: dict[str, Any]) -> None:
        report["steps"] = steps
        report["bars"] = [vars(bar) for bar in bars(steps, tiny)]
        gpu.write(path, report)
        path.with_suffix(".md").write_text(table(report))

    with tempfile.TemporaryDirectory() as folder:
        chosen = [step for step in STEPS if step.name in args.steps]
        steps = check(chosen, args.minutes, tiny, Path(folder), note)
    print(f"\n{table(report)}\nwritten to {path} and {path.with_suffix('.md').name}")
    missed = any(bar.met is False for bar in bars(steps, tiny))
    return int(missed or any(one["status"] == FAILED for one in steps.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
