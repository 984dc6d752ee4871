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
from megatron_vlm.launch.launch_plan import make_plan

# Records how it was called, then runs what comes after the image, as the real one does.
STUB = f"""#!{sys.executable}
import json, os, sys
args = sys.argv[1:]
called = dict(argv=[os.path.basename(sys.argv[0]), *args], environ=dict(os.environ))
open(os.environ["RECORD"], "w").write(json.dumps(called))
inner = args[args.index(os.environ["IMAGE"]) + 1:]
os.execvp(inner[0], inner)
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
    for name in container._FOLDERS:  # torch sets one as it is imported
        monkeypatch.delenv(name, raising=False)

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
    script.write_text("import sys; print(sys.argv[1:], flush=True); sys.exit(7)\n")
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
    parameters = json.dumps([argv, str(image), ["/usr:/u:ro"], [str(tmp_path / "in"), out]])
    result = subprocess.run(
        [sys.executable, "-c", call, parameters],
        cwd=container.CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 7, result.stderr
    assert str(["--hf-dir", str(tmp_path / "in"), "--out", out, "--force"]) in result.stdout
    called = json.loads(record.read_text())["argv"]
    assert called[:2] == [runtime, "exec"] and "--nv" not in called
    assert called[called.index("--pwd") + 1] == str(container.CHECKOUT)
    # The output folder is not there yet: its nearest parent is bound, which holds the input too.
    assert binds(called) == [str(container.CHECKOUT), str(tmp_path), "/usr:/u:ro"]


def test_no_image_or_no_container_command_is_one_line(stub, tmp_path, monkeypatch) -> None:
    _, image, _ = stub
    with pytest.raises(ValueError, match="no such image"):
        container.reenter(["script.py"], str(tmp_path / "none.sif"), [], [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="apptainer or singularity"):
        container.reenter(["script.py"], str(image), [], [])


def bound(*inputs: object, **arguments) -> list[str]:
    """Return what is bound for these paths, beyond the checkout."""
    command = container.container_command(
        ["true"], "x.sif", inputs=list(map(str, inputs)), workdir="/", **arguments
    )
    assert binds(command)[0] == str(container.CHECKOUT)
    return binds(command)[1:]


def test_paths_that_cannot_be_bound(tmp_path) -> None:
    odd = tmp_path / "a:b"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd)
    for path in odd, tmp_path / "link":
        with pytest.raises(ValueError, match=r"a:b.*rename"):
            bound(path)
    with pytest.raises(ValueError, match=r"/no-such-folder/x: / cannot be bound.*make a folder"):
        bound("/no-such-folder/x")
    with pytest.raises(ValueError, match="/opt cannot be bound"):
        bound("/opt")
    with pytest.raises(ValueError, match="--bind /no-such:/a: there is no /no-such on this machine"):
        bound(binds=["/bin:/b", "/no-such:/a"])


def test_a_working_directory_that_the_image_has_too_is_not_bound() -> None:
    command = container.container_command(["true"], "x.sif", workdir="/usr")
    assert binds(command) == [str(container.CHECKOUT)]
    assert command[command.index("--pwd") + 1] == "/usr"


def test_links_are_bound_with_what_they_lead_to(tmp_path) -> None:
    """tests/cluster/test_container.py reads through such links in a real container."""
    disk, home, other, top = (tmp_path / name for name in ("disk", "home", "other", "top"))
    for folder in (disk / "data", disk / "snapshot", disk / "blobs", home, other / "deep", top):
        folder.mkdir(parents=True)
    (disk / "blobs/weights").touch()
    (other / "deep/1.tar").touch()
    (disk / "data/0.tar").touch()

    # A link in the path is seen in the folder that holds it, and where it leads to is there as well.
    (home / "disk").symlink_to(disk)
    assert bound(home / "disk/data") == [str(home), str(disk / "data")]
    # A path that is a link, to another link.
    (top / "link").symlink_to(home / "disk/data")
    assert bound(top / "link") == [str(top), str(home), str(disk / "data")]
    # Shards that are links, one of them to nothing; and relative ones, as in a cache of downloaded models.
    (disk / "data/1.tar").symlink_to(other / "deep/1.tar")
    (disk / "data/2.tar").symlink_to(other / "gone.tar")
    assert bound(disk / "data") == [str(disk / "data"), str(other / "deep")]
    (disk / "snapshot/weights").symlink_to("../blobs/weights")
    assert bound(disk / "snapshot") == [str(disk / "snapshot"), str(disk / "blobs")]
    # Links of links, and a loop.
    (disk / "data/more").symlink_to(disk / "snapshot")
    (disk / "snapshot/loop").symlink_to(disk / "data")
    places = {disk / "data", disk / "snapshot", disk / "blobs", other / "deep"}
    assert set(bound(disk / "data")) == set(map(str, places))
    # What is only written to is not searched.
    assert bound(paths=[str(disk / "data")]) == [str(disk / "data")]


def test_a_file_is_bound_with_its_folder(tmp_path) -> None:
    """A file bound by itself could not be replaced inside."""
    answers = tmp_path / "answers: all.jsonl"
    answers.touch()
    assert bound(answers) == [str(tmp_path)]


def test_the_container_command_of_a_site(tmp_path, monkeypatch) -> None:
    program = tmp_path / "my-apptainer"
    program.touch(mode=0o755)
    assert container.find_runtime(str(program)) == str(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert container.find_runtime("my-apptainer") == "my-apptainer"
    with pytest.raises(ValueError, match="container command sarus: not on PATH"):
        container.find_runtime("sarus")


def test_what_the_environment_says_reaches_a_clean_container(tmp_path) -> None:
    environ = {
        **{"WANDB_API_KEY": "secret", "NCCL_DEBUG": "INFO", "TORCHX": "", "TMPDIR": str(tmp_path)},
        **{"PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "PYTHONPATH": "x", "HOME": "/root"},
        **{"HF_TOKEN": "outside", "APPTAINERENV_HF_TOKEN": "inside", "HF_HOME": str(tmp_path / "none")},
    }
    found = container.forwarded(environ)
    names = ("WANDB_API_KEY", "NCCL_DEBUG", "TORCHX", "TMPDIR", "HF_TOKEN", "HF_HOME")
    expected = {**{name: environ[name] for name in names}, "HF_TOKEN": "inside"}
    for prefix in "APPTAINERENV_", "SINGULARITYENV_":
        own = {name: value for name, value in found.items() if name.startswith(prefix)}
        assert own == {prefix + name: value for name, value in expected.items()}
    assert container.cache_folders(environ) == [str(tmp_path)]  # the one that is there


def test_secrets_are_in_the_environment_and_not_in_the_command(stub, tmp_path, monkeypatch) -> None:
    install, image, record = stub
    install("singularity")
    script = tmp_path / "script.py"
    script.write_text("")
    call = "import json, sys; from megatron_vlm.launch import container; "
    call += "container.reenter([sys.argv[1]], sys.argv[2], [], [])"
    monkeypatch.setenv("WANDB_API_KEY", "k-e-y")
    done = subprocess.run(
        [sys.executable, "-c", call, str(script), str(image)],
        cwd=container.CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    called = json.loads(record.read_text())
    assert called["environ"]["SINGULARITYENV_WANDB_API_KEY"] == "k-e-y"
    assert "k-e-y" not in json.dumps(called["argv"]) + done.stdout + done.stderr


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
