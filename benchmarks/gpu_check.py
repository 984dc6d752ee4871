"""The checks that only a GPU can make, in one command of under eight minutes: ``make gpu-check``.

Each step is a process of its own with a limit of time. One that is timed runs alone, others run at once.
What a step has found is written when it ends, however it ends. One that fails or runs too long is noted, and
the next ones follow; one for which too little time is left isn't begun. Without a GPU, or with ``--dry-run``,
the steps run on the CPU at tiny sizes, and what needs CUDA is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import platform
import re
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
from benchmarks.gpu.report import DONE, FAILED, NOT_RUN, bars, table

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "accelerate", "megatron-energon")
# Exit codes, beside 0: all was run, and every bar is met.
MISSED, INCOMPLETE = 1, 3
NEEDS_CUDA = "needs CUDA"


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        arguments: of Python; ``--result FILE`` is added, and ``--tiny`` without a GPU.
        expected: seconds on an H100. It isn't begun with less, and is killed after twice as many.
        needs_cuda: it has no tiny form.
        timed: nothing else may run meanwhile.
    """

    name: str
    arguments: tuple[str, ...]
    expected: float
    needs_cuda: bool = False
    timed: bool = True


def speed(shape: str, side: str, expected: float) -> Step:
    """Return a step that trains at a shape."""
    arguments = ("-m", "benchmarks.gpu.speed", "--shape", shape, "--side", side)
    return Step(f"{shape}-{side}", arguments, expected, needs_cuda=side == "fp8")


# What the bars need comes first. docs/gpu-check.md has the arithmetic of the seconds.
STEPS = (
    Step("ceiling", ("-m", "benchmarks.gpu.ceiling"), 20),
    speed("7B", "bf16", 50),
    speed("7B", "fp8", 40),
    speed("7B", "transformers", 40),
    Step("specs", ("-m", "benchmarks.gpu.specs"), 60, timed=False),
    Step("digits", ("-m", "benchmarks.gpu.digits"), 110, timed=False),
    Step("parity", ("-m", "benchmarks.gpu.parity"), 110, timed=False),
    speed("1B", "bf16", 35),
    speed("1B", "fp8", 30),
    speed("1B", "transformers", 35),
)


def _end_with_parent() -> None:
    """Even where that is killed outright: the GPU is free then. prctl(2): PR_SET_PDEATHSIG is 1."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def rounds(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in their order, those together that run at once."""
    found: list[list[Step]] = []
    for step in steps:
        if step.timed or not found or found[-1][0].timed:
            found.append([])
        found[-1].append(step)
    return found


class Run:
    """A step's process, and all that it starts.

    Args:
        seconds: it may take.
        folder: for its result and its log.
    """

    def __init__(self, step: Step, seconds: float, tiny: bool, folder: Path) -> None:
        self.step, self.seconds = step, seconds
        self._result = folder / f"{step.name}.json"
        self._log = self._result.with_suffix(".log")
        command = [sys.executable, *step.arguments, "--result", str(self._result)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
        if tiny:
            command.append("--tiny")
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._begun = time.monotonic()
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its own processes end with it
                preexec_fn=_end_with_parent,
            )

    @property
    def ended(self) -> bool:
        """By itself, or by its time."""
        return self._process.poll() is not None or time.monotonic() - self._begun > self.seconds

    def end(self) -> dict[str, Any]:
        """Kill what is left of it.

        Returns:
            ``status``, ``seconds``, the ``command``, the ``result`` as far as it came; if it FAILED the
            ``reason`` and the end of its ``output``.
        """
        code = self._process.poll()
        took = time.monotonic() - self._begun
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
        found: dict[str, Any] = {
            "status": DONE,
            "seconds": round(took, 1),
            "command": shlex.join(["python", *self.step.arguments]),
        }
        if self._result.exists():
            found["result"] = json.loads(self._result.read_text())
        output = self._log.read_text(errors="replace")
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
        if code is None:
            reason = f"no end after {took:.0f} s"
        elif code:
            reason = f"exit code {code}: {last[:300]}"
        else:
            reason = "" if "result" in found else "it has written no result"
        if reason:
            found |= {"status": FAILED, "reason": reason, "output": output[-3000:]}
        return found


def check(
    steps: Sequence[Step], minutes: float, tiny: bool, folder: Path, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the steps within the time.

    Args:
        note: called with all steps so far, by their names, after each.
    """
    end = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {}

    def done(step: Step, one: dict[str, Any]) -> None:
        found[step.name] = one
        took = f", {one['seconds']:.0f} s" if "seconds" in one else ""
        reason = f": {one['reason']}" if "reason" in one else ""
        print(f"{step.name}: {one['status']}{took}{reason}", flush=True)
        if "output" in one:
            print(one["output"].rstrip(), flush=True)
        note({step.name: found[step.name] for step in steps if step.name in found})

    for at_once in rounds(steps):
        running: list[Run] = []
        try:
            for step in at_once:
                left = end - time.monotonic()
                if tiny and step.needs_cuda:
                    done(step, {"status": NOT_RUN, "reason": NEEDS_CUDA})
                elif (left < step.expected and not tiny) or left <= 0:
                    reason = f"{max(left, 0):.0f} s were left, and it takes {step.expected:.0f}"
                    done(step, {"status": NOT_RUN, "reason": reason})
                else:
                    running.append(Run(step, left if tiny else min(left, 2 * step.expected), tiny, folder))
            while running:
                for run in [run for run in running if run.ended]:
                    running.remove(run)
                    done(run.step, run.end())
                time.sleep(0.05)
        finally:
            for run in running:  # the command is being ended
                done(run.step, run.end())
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python, the packages that matter, CUDA and its driver, where they are there."""
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
        number = re.search(r"\d+\.\d[.\d]*", driver.read_text())
        found["driver"] = number[0] if number else "unknown"
    return found


def _commit() -> str:
    try:
        ended = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=CHECKOUT, capture_output=True, text=True
        )
    except OSError:  # no git here
        return "unknown"
    return ended.stdout.strip() or "unknown"


def free_path(folder: Path, name: str) -> Path:
    """``<name>.json``, or with a number behind the name if that is there: of an earlier command."""
    paths = (folder / f"{name}{f'-{n}' if n > 1 else ''}.json" for n in itertools.count(1))
    return next(path for path in paths if not path.exists())


def strict(value: Any) -> Any:
    """Without numbers that JSON hasn't: these as text."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str]) -> int:
    """Returns 0, MISSED if a bar isn't met, INCOMPLETE if a step failed or there was no time for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all steps (default: 7.5)")
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
    path = free_path(output, f"gpu-{'-'.join(words)}-{today}")
    report: dict[str, Any] = {
        "machine": platform.machine() if tiny else name,
        "date": today,
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *argv]),
        "dry_run": tiny,
        "versions": versions(),
    }

    def note(steps: dict[str, Any]) -> None:
        report["steps"] = steps
        report["bars"] = [vars(bar) for bar in bars(steps, tiny)]
        gpu.write(path, strict(report))
        path.with_suffix(".md").write_text(table(report))

    with tempfile.TemporaryDirectory() as folder:
        chosen = [step for step in STEPS if step.name in args.steps]
        steps = check(chosen, args.minutes, tiny, Path(folder), note)
    print(f"\n{table(report)}\nwritten to {path} and {path.with_suffix('.md').name}")
    if any(one["status"] != DONE and one.get("reason") != NEEDS_CUDA for one in steps.values()):
        return INCOMPLETE
    return MISSED if any(bar.met is False for bar in bars(steps, tiny)) else 0


def end_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C: steps that run end with this process, and their findings are written."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main(sys.argv[1:]))
