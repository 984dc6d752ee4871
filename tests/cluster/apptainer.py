"""A real Apptainer, and images that it builds from the project's recipes on a local Debian.

Nothing is fetched but through the machine's own apt and pip settings. Images are folders ("sandboxes"): a SIF
file of the same content takes a minute more to pack, and runs the same.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
CPU_RECIPE = ROOT / "environments/recipe_cpu.def"
GPU_RECIPE = ROOT / "environments/recipe_latest.def"
SUITE = "bookworm"  # has the Python that CI runs
# Where .ci/install-cluster puts what get_apptainer.sh makes: beside the Python that runs the tests.
_OWN = Path(sys.prefix, "apptainer/bin")
_INDEX_TARGETS = ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")


@functools.cache
def find_apptainer() -> str | None:
    """The program, from PATH or as ``.ci/install-cluster`` has made it; None where there is none."""
    return shutil.which("apptainer") or shutil.which("apptainer", path=_OWN)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the program on PATH, and ``changes``."""
    folder = Path(str(find_apptainer())).parent
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | changes


def why_not() -> str | None:
    """Return why no image can be built here; None if one can."""
    if find_apptainer() is None:
        return "no apptainer here; .ci/install-cluster installs it"
    missing = [tool for tool in ("mmdebstrap", "apt-get", "unshare") if not shutil.which(tool)]
    if missing:
        return f"{', '.join(missing)}: not installed; .ci/install-cluster does it"
    if _mirror() is None:
        return "this machine has no Debian mirror in its apt sources"
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True)
    return None if tried.returncode == 0 else "no user namespaces here: " + tried.stderr.decode().strip()


@dataclass(frozen=True)
class Base:
    """A minimal Debian, as a folder, and what has to be bound into a build on it.

    Attributes:
        binds: folders that the machine's pip settings name; the base has the settings and empty folders.
    """

    folder: Path
    binds: list[str]


def make_base(folder: Path) -> Base:
    """Make a minimal Debian in ``folder``, whose pip finds packages where this machine's pip does."""
    archive = folder.with_suffix(".tar")
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=apt", SUITE, archive, str(_mirror())],
        check=True,
        capture_output=True,
        text=True,
    )
    folder.mkdir(parents=True)
    # A user namespace of one user has no other owners, and makes no devices; apptainer brings /dev itself.
    subprocess.run(
        ["tar", "--extract", "--no-same-owner", "--exclude=./dev/*", "--file", archive, "-C", folder],
        check=True,
    )
    archive.unlink()
    binds = _pip_settings(folder)
    return Base(folder, binds)


def build(
    image: Path, recipe: Path, base: Base, *flags: str, timeout: float = 900, **arguments: str
) -> subprocess.CompletedProcess[str]:
    """Build a recipe on ``base``, its test section included.

    Args:
        flags: further flags of ``apptainer build``.
        arguments: further build arguments.
    """
    command = ["unshare", "--user", "--map-root-user", str(find_apptainer()), "build", "--sandbox", *flags]
    for name, value in {"BOOT": "localimage", "BASE": str(base.folder), **arguments}.items():
        command += ["--build-arg", f"{name}={value}"]
    for bind in base.binds:
        command += ["--bind", bind]
    return subprocess.run(
        [*command, str(image), str(recipe)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def remove(image: Path) -> None:
    """Delete an image, which may hold folders that even its owner cannot write to."""
    subprocess.run(["chmod", "-R", "u+rwX", image], check=True)
    shutil.rmtree(image)


@functools.cache
def _mirror() -> str | None:
    """The Debian mirror that this machine's apt uses."""
    if not shutil.which("apt-get"):
        return None
    listed = subprocess.run(_INDEX_TARGETS, capture_output=True, text=True).stdout
    return next((uri for uri in listed.splitlines() if uri.endswith("/debian/")), None)


def _pip_settings(base: Path) -> list[str]:
    """Give ``base`` this machine's pip settings, with copies of the files that they name.

    Returns:
        The folders that they name, which are to be bound at the same place.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings: dict[str, str] = {}
    folders: set[Path] = set()
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'\"").split()
        for number, word in enumerate(words):
            path = Path(urlsplit(word).path if word.startswith("file://") else word)
            if path.is_absolute() and path.is_file():
                words[number] = f"/etc/pip-{path.name}"
                shutil.copy(path, f"{base}/{words[number]}")
            elif path.is_absolute() and path.is_dir():
                # An index's links may lead out of its folder.
                folders.add(path.parent if word.startswith("file://") else path)
        settings[name.split(".", 1)[1]] = " ".join(words)
    lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
    (base / "etc/pip.conf").write_text(f"[global]\n{lines}")
    for folder in folders:
        (base / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
    return sorted(map(str, folders))
