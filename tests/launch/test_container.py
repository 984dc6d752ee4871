"""Container commands, and scripts that hand themselves to a container: a stub stands for apptainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config.run import RunConfig
from megatron_vlm.launch import container
from megatron_vlm.launch.plan import make_plan

# Records how it was called, then runs what comes after the image, as the real one does.
STUB = f"""#!{sys.executable}
import json, os, subprocess, sys
args = sys.argv[1:]
open(os.environ["RECORD"], "w").write(json.dumps([os.path.basename(sys.argv[0]), *args]))
sys.exit(subprocess.call(args[args.index(os.environ["IMAGE"]) + 1:]))
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch):
    """A folder on an otherwise usual PATH, the image's path, and the file with the recorded arguments."""
    tools, image, record = tmp_path / "bin", tmp_path / "my image.sif", tmp_path / "record.json"
    tools.mkdir()
    image.touch()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("IMAGE", str(image))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def install(name: str) -> None:
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)

    return install, image, record


def binds(command: list[str]) -> list[str]:
    return [command[i + 1] for i, arg in enumerate(command) if arg == "--bind"]


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_a_script_runs_again_inside(stub, tmp_path, runtime) -> None:
    install, image, record = stub
    install(runtime)
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(7)\n")
    (tmp_path / "in").mkdir()
    out = str(tmp_path / "not" / "yet")
    argv = [
        str(script),
        "--hf-dir",
        str(tmp_path / "in"),
        "--sif-path",
        str(image),
        "--bind",
        "/usr:/u",
        "/bin:/b",
    ]
    argv += ["--bind=/etc", "--out", out, f"--sif-path={image}", "--force"]
    # In a process of its own, since what it runs writes to the real stdout.
    call = "import json, sys; from megatron_vlm.launch import container; "
    call += "sys.exit(container.reenter(*json.loads(sys.argv[1])))"
    parameters = json.dumps([argv, str(image), ["/usr:/u:ro", str(tmp_path / "in"), out]])
    result = subprocess.run(
        [sys.executable, "-c", call, parameters],
        cwd=container.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 7, result.stderr
    assert str(["--hf-dir", str(tmp_path / "in"), "--out", out, "--force"]) in result.stdout
    called = json.loads(record.read_text())
    assert called[:2] == [runtime, "exec"] and "--nv" not in called
    assert called[called.index("--pwd") + 1] == str(container.CHECKOUT)
    # The output folder is not there yet: its nearest parent is bound, which holds the input too.
    assert binds(called) == [str(container.CHECKOUT), str(tmp_path), "/usr:/u:ro"]


def test_no_image_or_no_container_command_is_one_line(stub, tmp_path, monkeypatch) -> None:
    _, image, _ = stub
    with pytest.raises(ValueError, match="no such image"):
        container.reenter(["script.py"], str(tmp_path / "none.sif"), [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apptainer or singularity"):
        container.reenter(["script.py"], str(image), [])


def test_paths_that_cannot_be_bound(tmp_path) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    with pytest.raises(ValueError, match=r"a:b.*rename"):
        container.container_command(["true"], "x.sif", paths=[str(odd)])
    with pytest.raises(ValueError, match="/no-such-folder/x: cannot be bound"):
        container.container_command(["true"], "x.sif", paths=["/no-such-folder/x"])


def test_a_run_in_a_container(stub, tmp_path) -> None:
    install, image, _ = stub
    install("apptainer")
    data = tmp_path / "data"
    data.mkdir()
    argv = [
        "--name",
        "run",
        "--save-dir",
        str(tmp_path / "runs"),
        "--data-path",
        str(data),
        "--train-iters",
        "1",
    ]
    argv += ["--megatron-load-dir", str(data / "ckpt"), "--sif-path", str(image), "--bind", "/usr:/u,/bin:/b"]
    argv += ["--tp", "2"]
    gpus = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    command = make_plan(RunConfig.from_flags(argv), gpus).command
    assert command[:3] == ["apptainer", "exec", "--nv"]
    assert {str(tmp_path), "/usr:/u", "/bin:/b"} <= set(binds(command))
    inner = command[command.index(str(image)) + 1 :]
    # Inside `env`, so that it arrives in containers that clean the environment.
    assert inner[0] == "env" and "CUDA_DEVICE_MAX_CONNECTIONS=1" in inner and "PYTHONNOUSERSITE=1" in inner
    assert inner[inner.index("-m") - 1] == "python3"
    assert "--sif-path" not in inner and "--bind" not in inner
    assert "--nv" not in make_plan(RunConfig.from_flags(argv), os.environ).command


def test_an_image_may_be_a_uri() -> None:
    container.check_image("docker://debian:12")
    assert "docker://debian:12" in container.container_command(["true"], "docker://debian:12")
