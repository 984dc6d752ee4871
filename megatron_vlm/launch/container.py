"""Run a command, or the running script once more, inside an Apptainer (Singularity) image."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Dict, Iterable, List, Mapping, Optional, Sequence

from megatron_vlm.launch.machine import visible_gpus

CHECKOUT = Path(__file__).resolve().parents[2]  # holds megatron_vlm/ and scripts/
PYTHON = "python3"  # the image's own
RUNTIMES = ("apptainer", "singularity")
_REMOTE = ("docker://", "library://", "oras://", "shub://", "instance://")


def reenter(script_argv: Sequence[str], sif_path: str, binds: Sequence[str]) -> int:
    """Run a script of this checkout inside the image, without ``--sif-path`` and ``--bind``.

    Args:
        script_argv: ``sys.argv`` of the script.
        sif_path: the image.
        binds: paths that the script reads or writes, and bind specifications ``source:target[:ro]``.
            A path that does not exist yet is bound by its nearest parent that does.

    Returns:
        The exit code of the script inside; 128 + n when signal n ended it.

    Raises:
        ValueError: there is no image, no container command, or a path that cannot be bound.
    """
    check_image(sif_path)
    script = os.path.abspath(script_argv[0])
    inner = [PYTHON, script, *_without_container_flags(script_argv[1:])]
    specs = [bind for bind in binds if ":" in bind]
    paths = [bind for bind in binds if ":" not in bind]
    command = container_command(
        with_environment({"PYTHONPATH": python_path(os.environ)}, inner),
        sif_path,
        binds=specs,
        paths=paths,
        gpu=bool(visible_gpus(os.environ)),
        runtime=find_runtime(),
    )
    print(shlex.join(command), flush=True)
    code = subprocess.call(command)
    return code if code >= 0 else 128 - code


def container_command(
    inner: Sequence[str],
    sif_path: str,
    *,
    binds: Sequence[str] = (),
    paths: Iterable[str] = (),
    gpu: bool = False,
    runtime: str = "apptainer",
    workdir: Optional[str] = None,
) -> List[str]:
    """The command that runs ``inner`` inside the image, in the same working directory.

    Args:
        inner: command and arguments.
        sif_path: image file, sandbox folder or URI.
        binds: bind specifications, passed on as they are.
        paths: files and folders that ``inner`` uses; they get the same place inside.
        gpu: pass the host's NVIDIA driver through.
        runtime: ``apptainer`` or ``singularity``.
        workdir: working directory; by default the current one.

    Raises:
        ValueError: a path cannot be bound.
    """
    workdir = workdir or os.getcwd()
    specs = [*_bind_sources([str(CHECKOUT), workdir, *paths]), *binds]
    image = sif_path if sif_path.startswith(_REMOTE) else os.path.abspath(sif_path)
    command = [runtime, "exec"]
    if gpu:
        command.append("--nv")
    for spec in specs:
        command += ["--bind", spec]
    # The user's own ~/.local is mounted too; its packages must not shadow the image's.
    return [*command, "--pwd", workdir, image, *with_environment({"PYTHONNOUSERSITE": "1"}, inner)]


def with_environment(variables: Mapping[str, str], command: Sequence[str]) -> List[str]:
    """``env A=b command``: it can be pasted, and it reaches into containers that clean the environment."""
    if not variables:
        return list(command)
    rest = list(command)
    merged: Dict[str, str] = dict(variables)
    if rest[:1] == ["env"]:
        rest = rest[1:]
        while "=" in rest[0]:
            name, value = rest.pop(0).split("=", 1)
            merged[name] = value
    return ["env", *(f"{name}={value}" for name, value in merged.items()), *rest]


def python_path(environ: Mapping[str, str]) -> str:
    """``PYTHONPATH`` with this checkout in front, so that nothing has to be installed."""
    entries = [str(CHECKOUT)]
    entries += [p for p in environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != entries[0]]
    return os.pathsep.join(entries)


def find_runtime() -> str:
    """``apptainer``, or ``singularity`` where only that is installed.

    Raises:
        ValueError: neither is on PATH.
    """
    for runtime in RUNTIMES:
        if shutil.which(runtime):
            return runtime
    raise ValueError("--sif-path needs apptainer or singularity on PATH; install one, or leave it out")


def check_image(sif_path: str) -> None:
    """Check that the image exists, unless it is a URI.

    Raises:
        ValueError: it does not.
    """
    if not sif_path.startswith(_REMOTE) and not os.path.exists(sif_path):
        raise ValueError(
            f"--sif-path {sif_path}: no such image; build it from environments/recipe_latest.def"
        )


def _without_container_flags(argv: Sequence[str]) -> List[str]:
    kept: List[str] = []
    values_follow = False
    for arg in argv:
        if arg.split("=")[0] in ("--sif-path", "--bind"):
            values_follow = "=" not in arg
        elif values_follow and not arg.startswith("-"):
            continue
        else:
            values_follow = False
            kept.append(arg)
    return kept


def _bind_sources(paths: Iterable[str]) -> List[str]:
    """Existing absolute paths to bind, in order, leaving out those that lie inside another."""
    found: List[str] = []
    for path in paths:
        source = os.path.abspath(path)
        # A source that is missing is fatal to the container command; output folders may be.
        while not os.path.exists(source):
            source = os.path.dirname(source)
        if source == os.sep:
            raise ValueError(f"{path}: cannot be bound into the container; make the folder first")
        if ":" in source or "," in source:
            raise ValueError(f"{path}: a path with ':' or ',' cannot be bound into a container; rename it")
        if source not in found:
            found.append(source)
    return [p for p in found if not any(p != q and p.startswith(q.rstrip(os.sep) + os.sep) for q in found)]
