"""The tests that compare with transformers and torch, on the GPUs with NCCL.

Layouts of more ranks than there are GPUs are skipped: NCCL takes one rank for each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu

CHECKOUT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/models/test_parity.py",
    "tests/models/test_packing.py",
    "tests/models/test_loss.py",
    "tests/models/test_attention.py",
    "tests/models/test_experts.py",
    "tests/models/test_lora.py",
    "tests/models/test_recompute.py",
    "tests/inference/test_generator.py",
)
ON_SEVERAL = ("tests/training/test_layouts.py", "tests/training/test_packing.py")
TINY = ("tests/models/test_attention.py",)


def main(argv: list[str]) -> int:
    """Returns pytest's exit code."""
    args = gpu.parser(__doc__.splitlines()[0]).parse_args(argv)
    report = args.result.with_suffix(".xml")
    tests = [*TESTS, *(ON_SEVERAL if torch.cuda.device_count() > 1 else ())]
    environment = {**os.environ, "DEVICE": "cuda"}
    if args.tiny:
        tests, environment = list(TINY), {**os.environ, "DEVICE": "cpu", "WORLD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    ended = subprocess.run(command, cwd=CHECKOUT, env=environment)
    if report.exists():
        gpu.write(args.result, read_junit(report))
    return ended.returncode


def read_junit(path: Path) -> dict[str, Any]:
    """Counts, and which tests failed."""
    cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
