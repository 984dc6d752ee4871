"""Run a command, or the running script once more, inside an Apptainer (Singularity) image."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, NoReturn, Optional, Sequence

from megatron_vlm.launch.machine import visible_gpus

CHECKOUT = Path(__file__).resolve().parents[2]  # holds megatron_vlm/ and scripts/
PYTHON = "python3"  # the image's own
RUNTIMES = ("apptainer", "singularity")
_REMOTE = ("docker://", "library://", "oras://", "shub://", "instance://")
# A bind over one of these would hide what the image has there.
_OF_THE_IMAGE = (
    *("/", "/bin", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin", "/sys", "/usr"),
    *("/usr/local", "/var"),
)

# Beginnings of names: what a user's environment says to the ranks, also where a site's containers clean it.
_FORWARDED = (
    *("AWS_", "CUDA_", "FI_", "GLOO_", "HF_", "MEGATRON_VLM_", "MKL_", "MSC_", "NCCL_", "NVTE_", "OMP_"),
    *(
        "PYTORCH_",
        "SLURM_",
        "TMPDIR",
        "TORCH",
        "TRANSFORMERS_",
        "TRITON_",
        "UCX_",
        "WANDB_",
        "XDG_CACHE_HOME",
    ),
)
# Of these, the folders: the program inside has to find them where they are outside.
_FOLDERS = (
    *("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
    *("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "TMPDIR", "XDG_CACHE_HOME"),
)


def reenter(
    script_argv: Sequence[str],
    sif_path: str,
    binds: Sequence[str],
    paths: Iterable[str],
    outputs: Iterable[str] = (),
) -> NoReturn:
    """Let a script of this checkout run inside the image, without ``--sif-path`` and ``--bind``.

    The container command takes this process's place: signals reach it, and its exit code is the script's.

    Args:
        script_argv: ``sys.argv`` of the script.
        sif_path: the image.
        binds: what the user wants bound, ``source[:target[:ro]]`` each.
        paths: what the script reads and writes.
        outputs: folders that it makes or replaces, each with one rename.

    Raises:
        ValueError: there is no image, no container command, or a path that cannot be bound.
    """
    check_image(sif_path)
    script = os.path.realpath(script_argv[0])
    inner = [PYTHON, script, *_without_container_flags(script_argv[1:])]
    command = container_command(
        with_environment({"PYTHONPATH": python_path(os.environ)}, inner),
        sif_path,
        binds=binds,
        inputs=paths,
        paths=[*cache_folders(os.environ), *(folder for output in outputs for folder in _around(output))],
        gpu=bool(visible_gpus(os.environ)),
        runtime=find_runtime(),
    )
    print(shlex.join(command), flush=True)
    os.execvpe(command[0], command, {**os.environ, **forwarded(os.environ)})


def container_command(
    inner: Sequence[str],
    sif_path: str,
    *,
    binds: Sequence[str] = (),
    inputs: Iterable[str] = (),
    paths: Iterable[str] = (),
    gpu: bool = False,
    runtime: str = "apptainer",
    workdir: Optional[str] = None,
) -> List[str]:
    """Return the command that runs ``inner`` inside the image, in the same working directory.

    Args:
        inner: command and arguments.
        sif_path: image file, sandbox folder or URI.
        binds: what the user wants bound, ``source[:target[:ro]]`` each; passed on as they are.
        inputs: files and folders that get the same place inside, and so does what symbolic links in them
            lead to.
        paths: more of them, whose contents are not searched for links. What does not exist yet is bound by
            its nearest parent that does.
        gpu: pass the host's NVIDIA driver through.
        runtime: what :func:`find_runtime` returns.
        workdir: working directory; by default the current one.

    Raises:
        ValueError: a path cannot be bound.
    """
    workdir = workdir or os.getcwd()
    for bind in binds:
        for source in missing_sources(bind):  # fatal to the container command
            raise ValueError(f"--bind {bind}: there is no {source} on this machine")
    own = [str(CHECKOUT)] if workdir in _OF_THE_IMAGE else [str(CHECKOUT), workdir]
    specs = [*_bind_sources([*own, *paths], inputs), *binds]
    image = sif_path if sif_path.startswith(_REMOTE) else os.path.abspath(sif_path)
    command = [runtime, "exec"]
    if gpu:
        command.append("--nv")
    for spec in specs:
        command += ["--bind", spec]
    # The user's own ~/.local is mounted too; its packages must not shadow the image's.
    return [*command, "--pwd", workdir, image, *with_environment({"PYTHONNOUSERSITE": "1"}, inner)]


def missing_sources(bind: str) -> List[str]:
    """Return the sources of ``--bind`` that this machine does not have."""
    sources = [spec.split(":")[0] for spec in bind.split(",")]
    return [source for source in sources if not os.path.exists(source)]


def with_environment(variables: Mapping[str, str], command: Sequence[str]) -> List[str]:
    """Return ``env A=b command``: it can be pasted, and it reaches into containers that clean the
    environment."""
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
    """Return ``PYTHONPATH`` with this checkout in front, so that nothing has to be installed."""
    entries = [str(CHECKOUT)]
    entries += [p for p in environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != entries[0]]
    return os.pathsep.join(entries)


def forwarded(environ: Mapping[str, str]) -> Dict[str, str]:
    """Return the variables that carry a user's settings into a container that cleans the environment.

    They are for the environment of the container command, not for its arguments: keys and tokens among
    them must not show in a log or a process list. Apptainer reads ``APPTAINERENV_X``, SingularityCE
    ``SINGULARITYENV_X``; either is silent about both when they agree. What the user has set stays.
    """
    found: Dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(_FORWARDED):
            continue
        keys = [f"{prefix}_{name}" for prefix in ("APPTAINERENV", "SINGULARITYENV")]
        value = next((environ[key] for key in keys if key in environ), value)
        found.update(dict.fromkeys(keys, value))
    return found


def cache_folders(environ: Mapping[str, str]) -> List[str]:
    """Return the folders for caches and temporary files that the environment names and that are there."""
    return [environ[name] for name in _FOLDERS if os.path.isdir(environ.get(name, ""))]


def find_runtime(wanted: Optional[str] = None) -> str:
    """Return the container command: ``apptainer``, or ``singularity`` where only that is installed.

    Args:
        wanted: another name, or a path.

    Raises:
        ValueError: it is not there.
    """
    if wanted is not None and not shutil.which(wanted):
        raise ValueError(f"container command {wanted}: not on PATH; give its path, or load its module")
    for runtime in [wanted] if wanted else RUNTIMES:
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
        if arg.split("=")[0].replace("_", "-") in ("--sif-path", "--bind"):
            values_follow = "=" not in arg
        elif values_follow and not arg.startswith("-"):
            continue
        else:
            values_follow = False
            kept.append(arg)
    return kept


def _bind_sources(paths: Iterable[str], inputs: Iterable[str]) -> List[str]:
    """Return the existing absolute paths to bind, in order, leaving out those that lie inside another."""
    found: Dict[str, None] = {}  # an ordered set
    inputs = list(inputs)
    for path in [*paths, *inputs]:
        source = os.path.abspath(path)
        # A source that is missing is fatal to the container command; output folders may be.
        while not os.path.exists(source):
            source = os.path.dirname(source)
        if source in _OF_THE_IMAGE:
            raise ValueError(
                f"{path}: {source} cannot be bound into the container, where the image has its own; "
                "make a folder in it first"
            )
        found.update(dict.fromkeys(_places(source)))
    for link in (link for path in inputs for link in _links_in(path)):
        found.update(dict.fromkeys(_places(link)))
    for place in found:
        if ":" in place or "," in place:
            raise ValueError(f"{place}: a path with ':' or ',' cannot be bound into a container; rename it")
    return [p for p in found if not any(p != q and p.startswith(q + os.sep) for q in found)]


def _places(path: str) -> List[str]:
    """Return the paths to bind for ``path`` to lead to the same inside: the real path, and what holds each
    symbolic link on the way there."""
    places: List[str] = []
    while True:
        parts = Path(path).parts
        prefixes = (os.path.join(*parts[: end + 1]) for end in range(len(parts)))
        link = next(filter(os.path.islink, prefixes), None)
        if link is None:
            return [*places, _holder(path)]
        # Not the link itself where it can be helped: it would be a folder inside, and relative links in it,
        # as a downloaded model has them, would lead elsewhere.
        place = _holder(link)
        places.append(_holder(path) if place in _OF_THE_IMAGE else place)
        target = os.path.join(os.path.dirname(link), os.readlink(link))
        path = os.path.normpath(os.path.join(target, os.path.relpath(path, link)))


def _around(output: str) -> List[str]:
    """Return the folder that an output is in, and the one that a link to it is in.

    What is bound by itself is a mount point inside, and can't be renamed.
    """
    parents = [os.path.dirname(path) for path in (os.path.abspath(output), os.path.realpath(output))]
    return [output if parent in _OF_THE_IMAGE else parent for parent in parents]


def _holder(path: str) -> str:
    """Return a folder itself, and the folder that a link or a file is in: a file that is bound by itself
    could not be replaced inside."""
    parent = os.path.dirname(path)
    stays = os.path.isdir(path) and not os.path.islink(path)
    return path if stays or parent in _OF_THE_IMAGE else parent


def _links_in(folder: str) -> Iterator[str]:
    """Yield symbolic links in a folder and below that lead somewhere, as shards and downloaded models
    often are."""
    queue, seen = [os.path.realpath(folder)], set()
    while queue:
        parent = queue.pop()
        if parent in seen or not os.access(parent, os.R_OK | os.X_OK) or not os.path.isdir(parent):
            continue
        seen.add(parent)
        with os.scandir(parent) as entries:
            for entry in entries:
                if entry.is_symlink() and os.path.exists(entry.path):
                    yield entry.path
                if entry.is_dir():
                    queue.append(os.path.realpath(entry.path))
