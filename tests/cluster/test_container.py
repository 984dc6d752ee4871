"""Scripts inside a real image: environments/recipe_cpu.def on a local Debian, run by a real Apptainer."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.launch.container import container_command, forwarded, with_environment
from megatron_vlm.launch.preflight.storage import image_problems
from tests.cluster import apptainer
from tests.cluster.apptainer import GPU_RECIPE, environment, find_apptainer, why_not
from tests.cluster.demo import CHECKOUT, RUN, Demo, losses
from tests.patience import HANG

pytestmark = pytest.mark.cluster


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command where apptainer is on PATH, as a user without any package of ours would."""
    return subprocess.run(
        list(map(str, command)),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANG,
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
    # conversion.json tells of the Python that made it.
    made, expected = (hashes(tmp_path / name, "*") for name in "ba")
    for files in made, expected:
        files.pop("conversion.json", None)
    assert made == expected != {}
    back = run(
        *(*python, convert / "convert_hf_to_megatron.py", "--hf-dir", tmp_path / "b"),
        *("--megatron-dir", tmp_path / "c", "--sif-path", cpu_image),
    )
    assert back.returncode == 0, back.stderr
    assert hashes(tmp_path / "c", "*.distcp") == hashes(demo.checkpoint, "*.distcp") != {}


def command(image: Path, *inner: object, **arguments: Any) -> list[str]:
    """The command that runs ``inner`` in the image."""
    program = str(find_apptainer())
    return container_command(list(map(str, inner)), str(image), runtime=program, workdir="/", **arguments)


PLAIN, CLEAN, CONTAINED, WRITABLE = (
    {},
    {"APPTAINER_CLEANENV": "1"},
    {"APPTAINER_CONTAINALL": "1"},
    {"APPTAINER_WRITABLE_TMPFS": "1"},
)


@pytest.mark.parametrize("site", [PLAIN, CONTAINED], ids=["plain", "containall"])
def test_links_lead_to_the_same_inside(cpu_image: Path, tmp_path: Path, site: dict[str, str]) -> None:
    """Paths through links, links in folders, and relative links as a Hugging Face cache has them."""
    disk, home, other = tmp_path / "disk", tmp_path / "home", tmp_path / "other"
    for folder in (disk / "data", disk / "models/snapshots/1", disk / "models/blobs", home, other / "deep"):
        folder.mkdir(parents=True)
    (disk / "data/0.tar").write_text("shard 0")
    (other / "deep/1").write_text("shard 1")
    (other / "deep/2").write_text("shard 2")
    (disk / "data/1.tar").symlink_to(other / "deep/1")
    (disk / "data/2.tar").symlink_to("../../other/deep/2")
    (disk / "models/blobs/w").write_text("weights")
    (disk / "models/snapshots/1/w").symlink_to("../../blobs/w")
    (home / "disk").symlink_to(disk)
    (home / "model").symlink_to(disk / "models/snapshots/1")
    (home / "again").symlink_to("model")
    inputs = {
        home / "disk/data": ("0.tar", "1.tar", "2.tar"),
        home / "disk/models/snapshots/1": ("w",),
        home / "model": ("w",),
        home / "again": ("w",),
    }
    for folder, names in inputs.items():
        files = [folder / name for name in names]
        read = run(*command(cpu_image, "cat", *files, inputs=[str(folder)]), **site)
        assert read.stdout == "".join(file.read_text() for file in files), read.stderr


@pytest.mark.parametrize(
    "site", [PLAIN, CLEAN, CONTAINED, WRITABLE], ids=["", "clean", "containall", "tmpfs"]
)
def test_names_and_values_come_back_as_given(cpu_image: Path, tmp_path: Path, site: dict[str, str]) -> None:
    odd = "a b'c\"d $HOME;`id`\n\\ # é"
    folder = tmp_path / odd
    folder.mkdir()
    (folder / "file").write_text("text")
    program = (
        "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['ODD'], open(sys.argv[1]).read()]))"
    )
    inner = with_environment({"ODD": odd}, ["python3", "-c", program, f"{folder}/file", "", odd])
    done = run(*command(cpu_image, *inner, inputs=[str(folder)]), **site)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[f"{folder}/file", "", odd], odd, "text"]
    # And as a user would paste it.
    pasted = run("bash", "-c", shlex.join(command(cpu_image, *inner, inputs=[str(folder)])), **site)
    assert pasted.stdout == done.stdout


def test_settings_of_the_environment_arrive_where_it_is_cleaned(cpu_image: Path) -> None:
    own = {"WANDB_API_KEY": "k e'y", "NCCL_DEBUG": "INFO", "HF_TOKEN": "", "OTHER": "x"}
    names = command(cpu_image, "python3", "-c", f"import os; print([os.environ.get(n) for n in {list(own)}])")
    assert run(*names, **own, **CLEAN).stdout == "[None, None, None, None]\n"
    done = run(*names, **own, **forwarded(own), **CLEAN)
    assert done.stdout == f"{[*list(own.values())[:3], None]}\n"
    assert done.stderr == ""  # apptainer does not complain about two names for the same


@pytest.mark.parametrize("site", [PLAIN, CONTAINED], ids=["plain", "containall"])
def test_exit_codes_and_signals_pass(cpu_image: Path, site: dict[str, str]) -> None:
    for code in (0, 2, 75, 137):
        assert run(*command(cpu_image, "sh", "-c", f"exit {code}"), **site).returncode == code
    script = "trap 'exit 75' USR1; trap 'exit 76' TERM; echo up; while :; do sleep 0.05; done"
    ends = {signal.SIGUSR1: 75, signal.SIGTERM: 76, signal.SIGKILL: -signal.SIGKILL}
    for number, code in ends.items():
        with subprocess.Popen(
            command(cpu_image, "sh", "-c", script), env=environment(**site), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            process.send_signal(number)
            assert process.wait(timeout=HANG) == code


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_a_script_enters_the_image_by_itself(cpu_image: Path, tmp_path: Path, runtime: str) -> None:
    """By either name of the command; --nv is passed where there are GPUs, and brings nvidia-smi along."""
    tools, script = tmp_path / "bin", tmp_path / "script.py"
    tools.mkdir()
    for name in ("env", "sh"):  # apptainer is found as runtime, and python3 by its path only
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / runtime).symlink_to(str(find_apptainer()))
    script.write_text(
        "import shutil, sys; print(shutil.which('nvidia-smi'), sys.prefix, sys.argv[1:]); sys.exit(3)\n"
    )
    call = "import sys; from megatron_vlm.launch.container import reenter; "
    call += "reenter(sys.argv[2:], sys.argv[1], [], [])"
    start = [sys.executable, "-c", call, cpu_image, script, "a b", "--sif-path", cpu_image]
    here = {"PYTHONPATH": str(CHECKOUT), "PATH": str(tools)}
    for gpus, path in ("", "None"), ("0,1", "/usr/bin/nvidia-smi"):
        if gpus:
            (tools / "nvidia-smi").write_text("#!/bin/sh\necho GPU 0\n")
            (tools / "nvidia-smi").chmod(0o755)
        done = run(*start, **here, CUDA_VISIBLE_DEVICES=gpus)
        assert done.returncode == 3, done.stderr
        assert done.stdout.splitlines()[0].startswith(f"{runtime} exec {'--nv ' if gpus else ''}--bind")
        assert done.stdout.splitlines()[1] == f"{path} /opt/venv ['a b']"


def test_the_preflight_knows_an_image_and_one_that_is_cut_off(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    base, image = tmp_path / "base", tmp_path / "image.sif"
    (base / "bin").mkdir(parents=True)
    (base / "bin/sh").write_text("#!/bin/false\n")
    # Root builds as an ordinary user would.
    built = run(*(["unshare", "-Ur"] if os.getuid() == 0 else []), "apptainer", "build", image, base)
    assert built.returncode == 0, built.stderr
    assert list(image_problems(str(image))) == [] == list(image_problems(str(base)))
    whole = image.stat().st_size
    os.truncate(image, whole - 1)
    assert f"cut off ({whole - 1:,} of {whole:,} bytes)" in next(image_problems(str(image)))


def test_the_recipe_for_gpus_on_a_local_base(cpu_image: Path, debian: apptainer.Base, tmp_path: Path) -> None:
    """Its steps and its tests on what stands for NVIDIA's image: a Python that has torch, on PATH."""
    base = tmp_path / "base"
    subprocess.run(["cp", "--archive", "--link", cpu_image, base], check=True)
    shutil.rmtree(base / "opt/megatron-vlm")
    for metadata in "labels.json", "runscript.help":
        (base / ".singularity.d" / metadata).unlink()
    for name in "python", "python3":
        program = base / "usr/local/bin" / name
        program.write_text(f'#!/bin/sh\nexec /opt/venv/bin/{name} "$@"\n')
        program.chmod(0o755)
    uninstall = ("python3", "-m", "pip", "uninstall", "-q", "-y", "accelerate", "wrapt", "megatron-vlm")
    subprocess.run(
        [str(find_apptainer()), "exec", "--writable", base, *uninstall], check=True, capture_output=True
    )

    image = tmp_path / "image"
    built = apptainer.build(image, GPU_RECIPE, replace(debian, folder=base), REVISION="abc", PIP_ARGS="-v")
    assert built.returncode == 0, built.stderr[-4000:]
    assert "accelerate-" in built.stdout and "torch-" not in built.stdout
    labels = run(find_apptainer(), "inspect", "--labels", image).stdout
    for label in ("version: 0.1.0", "revision: abc", f"base.name: {base}"):
        assert f"org.opencontainers.image.{label}\n" in labels
    shown = run(find_apptainer(), "run", image, "scripts/train/run.py", "--help")
    assert shown.stdout.startswith("usage: run.py")
    apptainer.remove(image)
    apptainer.remove(base)
