"""Scripts inside a real image: environments/recipe_cpu.def on a local Debian, run by a real Apptainer."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.apptainer import environment
from tests.cluster.demo import CHECKOUT, RUN, Demo, losses

pytestmark = pytest.mark.cluster


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command where apptainer is on PATH, as a user without any package of ours would."""
    return subprocess.run(
        list(map(str, command)),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(pattern)}


def test_a_run_in_the_image_equals_one_outside(
    cpu_image: Path, demo: Demo, expected: list[float], tmp_path: Path
) -> None:
    done = run(sys.executable, "-I", "-S", RUN, *demo.flags(tmp_path, "run"), "--sif-path", cpu_image)
    assert done.returncode == 0, done.stderr
    assert " exec --" in done.stdout and "/opt/venv" not in done.stdout
    assert losses(tmp_path / "run") == expected


def test_the_converters_in_the_image_write_the_same_bytes(
    cpu_image: Path, demo: Demo, tmp_path: Path
) -> None:
    convert = CHECKOUT / "scripts/convert"
    python = [sys.executable, "-I", "-S"]
    flags = ["--megatron-dir", demo.checkpoint, "--tokenizer-dir", demo.hf]
    outside = run(sys.executable, convert / "convert_megatron_to_hf.py", *flags, "--hf-dir", tmp_path / "a")
    inside = run(
        *(*python, convert / "convert_megatron_to_hf.py", *flags, "--hf-dir", tmp_path / "b"),
        *("--sif-path", cpu_image),
    )
    assert (outside.returncode, inside.returncode) == (0, 0), inside.stderr
    assert hashes(tmp_path / "a", "*") == hashes(tmp_path / "b", "*") != {}
    back = run(
        *(*python, convert / "convert_hf_to_megatron.py", "--hf-dir", tmp_path / "b"),
        *("--megatron-dir", tmp_path / "c", "--sif-path", cpu_image),
    )
    assert back.returncode == 0, back.stderr
    assert hashes(tmp_path / "c", "*.distcp") == hashes(demo.checkpoint, "*.distcp") != {}
