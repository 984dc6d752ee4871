"""The tests that compare with transformers and torch, on the GPUs with NCCL.

Layouts of more ranks than there are GPUs are skipped: NCCL takes one rank for each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
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
# Of tests, each with a rank of its own on the one GPU: transformers' side is computed on a core each.
PROCESSES = 4


class Outcomes:
    """A plugin of pytest: how many tests passed, and what those that didn't said, after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures: dict[str, str] = {}
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext[-2000:]
        self._write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = report.longreprtext[-2000:]
            self._write()

    def _write(self) -> None:
        gpu.write(self.path, {**self.counts, "failures": self.failures})


def main(argv: list[str]) -> int:
    """Returns pytest's exit code, but 0 where tests failed: that is a finding."""
    args = gpu.parser(__doc__.splitlines()[0]).parse_args(argv)
    os.chdir(CHECKOUT)
    if args.tiny:
        os.environ.update(DEVICE="cpu", WORLD="1")
        asked = [*TINY]
    else:
        os.environ["DEVICE"] = "cuda"
        one = torch.cuda.device_count() == 1
        asked = ["-n", str(PROCESSES), *TESTS] if one else [*TESTS, *ON_SEVERAL]
    code = pytest.main(["-q", "-p", "no:cacheprovider", *asked], plugins=[Outcomes(args.result)])
    return 0 if code == pytest.ExitCode.TESTS_FAILED else int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
