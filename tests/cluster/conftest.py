"""Hosts with networks of their own, SLURM, Apptainer: the real ones, or a skip that says what is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import apptainer, hosts, slurm
from tests.cluster.demo import ITERATIONS, RUN, Demo, losses, make_demo


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Site]:
    """A login host and two nodes."""
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with hosts.start_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="session")
def running_slurm(site: hosts.Site) -> slurm.Slurm:
    """SLURM on the site; it ends with its hosts."""
    reason = slurm.why_not()
    if reason:
        pytest.skip(reason)
    return slurm.start(site)


@pytest.fixture
def cluster(running_slurm: slurm.Slurm) -> Iterator[slurm.Slurm]:
    """SLURM with both nodes idle; no job of a test outlives it."""
    running_slurm.wait_for_nodes()
    yield running_slurm
    running_slurm.end_all_jobs()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's dataset and model."""
    return make_demo(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def expected(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run on one host that nothing disturbs, at the layout of all runs here."""
    folder = tmp_path_factory.mktemp("expected")
    done = subprocess.run([sys.executable, RUN, *demo.flags(folder, "calm")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calm = losses(folder / "calm")
    assert len(calm) == ITERATIONS and calm[-1] < 0.9 * calm[0]
    return calm


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apptainer.Base]:
    """A minimal Debian to build images on."""
    reason = apptainer.why_not()
    if reason:
        pytest.skip(reason)
    base = apptainer.make_base(tmp_path_factory.mktemp("base") / "debian")
    yield base
    apptainer.remove(base.folder)


@pytest.fixture(scope="session")
def cpu_image(debian: apptainer.Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image that environments/recipe_cpu.def makes of it; its tests have passed."""
    image = tmp_path_factory.mktemp("image") / "cpu"
    built = apptainer.build(image, apptainer.CPU_RECIPE, debian)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
    yield image
    apptainer.remove(image)
