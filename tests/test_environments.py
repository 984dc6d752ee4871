"""setup.py, the two constraints files and the container recipe agree with each other."""

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CPU = ROOT / "environments/constraints-cpu.txt"
NGC = ROOT / "environments/constraints-ngc.txt"
RECIPE = (ROOT / "environments/recipe_latest.def").read_text()
CPU_RECIPE = (ROOT / "environments/recipe_cpu.def").read_text()


def setup_arguments() -> dict[str, Any]:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


SETUP = setup_arguments()
EXTRAS = [text for texts in SETUP["extras_require"].values() for text in texts]


def pins(path: Path) -> dict[str, str]:
    """Versions by name; every line is an exact pin without a local build tag."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    versions = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert len(versions) == len(lines), f"{path} names a package twice"
    return versions


def packages_of_the_image() -> set[str]:
    (line,) = re.findall(r"^# image: (.*)$", NGC.read_text(), re.MULTILINE)
    return set(line.split())


def closure(requirements: list[str], python: str) -> dict[str, str]:
    """Return all that ``requirements`` need on this Python, and the versions installed here."""
    found: dict[str, str] = {}
    seen = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        node = (requirement.name, frozenset(requirement.extras))
        if node in seen:
            continue
        seen.add(node)
        distribution = metadata.distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = distribution.version
        for child in map(Requirement, distribution.requires or []):
            # torch's CUDA build, which an index may serve in place of the CPU's, pins these itself.
            if child.name.startswith(("cuda-", "nvidia-", "triton")):
                continue
            extras = [{"python_version": python, "extra": extra} for extra in ("", *requirement.extras)]
            if child.marker is None or any(child.marker.evaluate(extra) for extra in extras):
                queue.append(child)
    return found


def test_cpu_pins_are_what_is_installed_and_complete() -> None:
    pinned = pins(CPU)
    pinned.pop("pip")  # make setup installs it first; no package asks for it
    installed = closure([*SETUP["install_requires"], *EXTRAS], "3.11")
    assert {name: Version(version).public for name, version in installed.items()} == pinned


def test_image_pins_are_complete_and_equal_those_of_the_cpu() -> None:
    pinned, image = pins(NGC), packages_of_the_image()
    needed = set(closure(SETUP["install_requires"], "3.12"))
    assert set(pinned) | image >= needed
    assert set(pinned) <= needed, "pins that nothing needs"
    assert not set(pinned) & image
    cpu = pins(CPU)
    assert {name: cpu.get(name) for name in pinned} == pinned


def test_image_keeps_what_is_built_for_its_torch() -> None:
    assert {"torch", "numpy"} <= packages_of_the_image()


@pytest.mark.parametrize("text", [*SETUP["install_requires"], *EXTRAS])
def test_pins_are_within_the_ranges(text: str) -> None:
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    assert requirement.specifier.contains(pins(CPU)[name])
    if name in pins(NGC):
        assert requirement.specifier.contains(pins(NGC)[name])


def sections(recipe: str) -> dict[str, str]:
    """The text of each section of an Apptainer recipe, by its name; the header's is ""."""
    parts = re.split(r"^%(\w+)\n", "%\n" + recipe, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[0::2], strict=True))


@pytest.mark.parametrize("recipe", [RECIPE, CPU_RECIPE], ids=["latest", "cpu"])
def test_recipes(recipe: str) -> None:
    """tests/cluster/test_container.py builds them."""
    part = sections(recipe)
    for line in part["files"].strip().splitlines():
        assert (ROOT / line.split()[0]).exists()
    assert f"image.version {SETUP['version']}\n" in part["labels"]
    assert "image.base.name {{ BASE }}" in part["labels"]
    arguments = set(re.findall(r"^    (\w+)=", part["arguments"], re.MULTILINE))
    assert set(re.findall(r"\{\{ (\w+) \}\}", recipe)) == arguments
    comments = "".join(line for line in recipe.splitlines(True) if line.startswith("#"))
    assert all(re.search(rf"\b{argument}\b", comments) for argument in arguments)
    assert all(name in part for name in ("help", "runscript", "test"))
    assert "smoke.py" in part["test"] and "check_requirements.py megatron-vlm" in part["test"]


def test_the_gpu_image_keeps_its_torch() -> None:
    post = sections(RECIPE)["post"]
    (base,) = re.findall(r"BASE=(\S+)\n", sections(RECIPE)["arguments"])
    assert base in NGC.read_text(), "the pins name another base image"
    assert re.findall(r"pip install (.*)", post) == ['-q --no-cache-dir --no-deps {{ PIP_ARGS }}"']
    assert len(re.findall(r"\$pip .*(-r environments/constraints-ngc.txt|\.$)", post, re.MULTILINE)) == 2


def test_check_requirements_tells_what_is_missing(tmp_path: Path) -> None:
    info = tmp_path / "made_up-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n"
        "Requires-Dist: pytest>=1\nRequires-Dist: numpy<1\nRequires-Dist: not-there\n"
        "Requires-Dist: also-not-there; extra == 'more'\n"
    )

    def check(package: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, str(ROOT / "environments/check_requirements.py"), package],
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        return done.returncode, sorted(done.stdout.splitlines())

    missing = [
        "not-there is not installed (made-up needs it)",
        f"numpy<1 is needed by made-up, but {metadata.version('numpy')} is installed",
    ]
    assert check("made-up") == (1, missing)
    assert check("made-up[more]") == (
        1,
        sorted([*missing, 'also-not-there; extra == "more" is not installed (made-up needs it)']),
    )
    assert check("pytest") == (0, ["pytest: all requirements are met"])
