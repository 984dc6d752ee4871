"""scripts/train/run.py as a user starts it: with a bare Python, isolated from the environment."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch.container import CHECKOUT
from tests.patience import HANG

RUN = str(CHECKOUT / "scripts" / "train" / "run.py")
FLOORS = ("system", "architecture", "artifacts", "config", "plan", "launch")
FOLDERS = [CHECKOUT / "megatron_vlm" / name for name in FLOORS]
PARTS = sorted(path for folder in FOLDERS for path in folder.rglob("*.py")) + [Path(RUN)]


def find_python39() -> str | None:
    candidates = [shutil.which("python3.9"), *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python"))]
    for candidate in filter(None, candidates):
        # A pyenv shim is there without its version.
        check = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if check.stdout.strip() == "(3, 9)":
            return candidate
    return None


@pytest.fixture(params=["this Python", "Python 3.9"])
def python(request) -> str:
    if request.param == "this Python":
        return sys.executable
    found = find_python39()
    if found is None:
        pytest.skip("no Python 3.9 is installed")
    return found


def start(python: str, *argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ}
    command = [python, "-I", "-S", RUN, *argv]
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=HANG, check=False
    )


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


BASE = ["--name", "run", "--save-dir", "runs", "--data-path", "data", "--megatron-load-dir", "ckpt"]
BASE += ["--train-iters", "10"]


def test_dry_run_prints_a_command_that_parses_back_and_touches_no_file(python, tmp_path) -> None:
    name = 'it\'s "odd" $HOME'
    argv = [*BASE, "--name", name, "--tp", "2", "--stage", "1", "--dry-run"]
    before = files(tmp_path), *map(files, FOLDERS)
    result = start(python, *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "TP 2 x PP 1 x DP 1" in result.stderr  # the plan, as far as it can be told without a checkpoint
    assert (files(tmp_path), *map(files, FOLDERS)) == before
    assert result.stdout.count("\n") == 1
    command = shlex.split(result.stdout)
    at = command.index("megatron_vlm.training")
    ranks = RunConfig.from_flags(command[at + 1 :])
    assert (ranks.checkpoint.name, ranks.parallel.tp, ranks.training.stage) == (name, 2, 1)
    # Said, all of it, though only a real start stops.
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    for words in ("has no torch", "--data-path data: no such folder", "ckpt: no such checkpoint folder"):
        assert sum(words in warning for warning in warnings) == 1
    assert "error" not in result.stderr


def test_help(python, tmp_path) -> None:
    result = start(python, "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert "usage: run.py" in result.stdout and "Save/Load arguments" in result.stdout


@pytest.mark.parametrize(
    "argv",
    [
        ["--tpp", "2"],
        ["--backend", "mpi"],
        ["--tp-comm-overlap"],
        [*BASE],
        [*BASE, "--tp", "2", "-g", "3", "--dry-run"],
        [*BASE, "--global-batch-size", "3", "-g", "2", "--dry-run"],
        ["--config", "none.json"],
    ],
    ids=["unknown flag", "mpi", "not yet", "no dataset", "world size", "batch size", "no file"],
)
def test_bad_input_is_a_line_each_and_exit_code_2(argv, tmp_path) -> None:
    result = start(sys.executable, *argv, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert all(line.startswith(("error: ", "warning: ")) for line in result.stderr.splitlines())
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_the_ranks_begin(workplace) -> None:
    (workplace / "image.sif").write_bytes(b"hsqs")
    (workplace / "bin").mkdir()
    (workplace / "bin/apptainer").symlink_to("/bin/true")
    (workplace / "runs/run").mkdir(parents=True)
    with open(workplace / "runs/run/.lock", "w") as lock:
        os.lockf(lock.fileno(), os.F_LOCK, 0)
        run = subprocess.Popen(
            [sys.executable, "-u", RUN, *BASE, "--sif-path", "image.sif"],
            cwd=workplace,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": f"{workplace}/bin:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout is not None
        assert any("waiting for it to end" in line for line in run.stdout)
        run.send_signal(signal.SIGINT)
        told = run.communicate(timeout=HANG)[1].splitlines()
    assert run.returncode == 128 + signal.SIGINT
    assert told[-1] == "ended by SIGINT" and "Traceback" not in "".join(told)


def test_a_start_makes_the_logs_and_hands_on_output_and_exit_code(python, workplace) -> None:
    tools, image = workplace / "bin", workplace / "image.sif"
    tools.mkdir()
    image.write_bytes(b"hsqs")  # how squashfs images begin
    # Stands for the container with torch in it.
    (tools / "apptainer").write_text('#!/bin/sh\necho trained\necho "error: from a rank" >&2\nexit 2\n')
    (tools / "apptainer").chmod(0o755)
    argv = [*BASE, "--sif-path", str(image), "--slurm-output-name", "out"]
    result = start(python, *argv, cwd=workplace, PATH=f"{tools}:/usr/bin:/bin")
    assert result.returncode == 2
    assert result.stderr.endswith("error: from a rank\n")  # another run's port may be noted before
    command, output = result.stdout.splitlines()
    assert shlex.split(command)[:2] == ["apptainer", "exec"] and output == "trained"
    assert sorted((workplace / "runs/run/logs/out-node0.log").read_text().splitlines()) == [
        "error: from a rank",
        "trained",
    ]


def test_the_checkpoints_architecture_is_checked_without_torch(workplace) -> None:
    result = start(sys.executable, *BASE, "--tp", "4", "--dry-run", cwd=workplace)
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[0]
        == "error: --tp 4 does not divide the 6 attention heads of the language model; try 1 or 2"
    )
    assert start(sys.executable, *BASE, "--tp", "2", "--dry-run", cwd=workplace).returncode == 0
    result = start(sys.executable, *BASE, "--pp", "3", "--dry-run", cwd=workplace)
    assert result.returncode == 0
    stages = [line for line in result.stderr.splitlines() if line.startswith("stage ")]
    assert stages[0].startswith("stage 0  rank 0: vision tower, projector, embedding, layer")
    assert len(stages) == 3 and stages[2].endswith("-31, output layer")


def test_a_dry_run_in_an_allocation_shows_the_plan_and_the_step(python, workplace) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    result = start(python, *BASE, "-g", "4", "--tp", "2", "--dry-run", cwd=workplace, **job)
    assert result.returncode == 0 and "8 GPUs, 4 on each of 2 nodes: TP 2 x PP 1 x DP 4" in result.stderr
    assert result.stdout.startswith("srun --nodes 2 ") and result.stdout.count("\n") == 1
    result = start(python, *BASE, "-g", "4", "--tp", "5", "--dry-run", cwd=workplace, **job)
    assert (result.returncode, result.stdout) == (2, "")


def test_preflight_only(python, workplace) -> None:
    (workplace / "image.sif").write_bytes(b"hsqs")
    argv = [*BASE, "--preflight-only", "--sif-path", "image.sif", "--tp", "3", "--seq-length", "577"]
    before = files(workplace)
    result = start(python, *argv, cwd=workplace, PATH="/usr/bin:/bin")
    assert result.returncode == 2 and result.stderr == "" and files(workplace) == before
    told, _, last = result.stdout.partition("ok: ")
    expected = [
        "error: --tp 3 does not divide the 16 attention heads of the vision tower; try 1 or 2",
        "error: --sif-path needs apptainer or singularity",
        "warning: an image takes 576 of --seq-length 577 and leaves 1 tokens",
    ]
    assert [line[: len(start)] for line, start in zip(told.splitlines(), expected, strict=True)] == expected
    assert "dataset" in last and "flags" not in last


def test_only_the_standard_library_is_imported() -> None:
    allowed = set(sys.stdlib_module_names) | {"megatron_vlm"}
    for path in PARTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{path}: {name}"
                if name.startswith("megatron_vlm."):
                    assert name.split(".")[1] in FLOORS, f"{path}: {name}"


def test_a_dry_run_imports_little(tmp_path) -> None:
    """What makes it slow is what it imports: nothing of the network, of threads, or that only a job needs."""
    code = f"import runpy, sys; sys.argv = ['run.py', *{[*BASE, '--dry-run']!r}]\n"
    code += f"try: runpy.run_path({RUN!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "megatron_vlm.launch.launch_plan" in imported
    slow = {"asyncio", "concurrent.futures", "email", "http", "logging", "multiprocessing", "urllib.request"}
    assert not imported & (slow | {"torch", "megatron_vlm.launch.submit"})
