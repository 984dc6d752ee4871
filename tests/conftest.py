"""The surroundings of every test, subprocesses too: no network, one thread each; and the pool of ranks."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.distributed import DEVICE, Pool

if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # subprocesses would take a GPU that is there
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
# Tests start several ranks at once; a thread pool in each of them would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Some thousand processes would otherwise each compile the package anew, half a second each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell starts what it puts in the background with SIGINT ignored, nohup with SIGHUP, and so would every
# process of a test be.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

with contextlib.suppress(ImportError):  # GPU machines may lack it, and the tests that need it
    from hypothesis import settings

    # The same examples each time, so that nobody's change fails on what was there before it;
    # ``make test ARGS=--hypothesis-profile=default`` looks for new ones.
    settings.register_profile("same", derandomize=True)
    settings.load_profile("same")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that serve every layout; on GPUs, as many as there are up to four."""
    size = int(os.environ.get("WORLD", "4"))
    if DEVICE == "cuda":
        import torch  # after what it reads from the environment is set

        size = min(size, torch.cuda.device_count())
    pool = Pool(size)
    yield pool
    pool.stop()


class ByFile(LoadScopeScheduling):
    """Gives a worker one file at a time, for its fixtures, and tests/cluster at once: there is one cluster.

    Not ``--dist loadgroup``: with pytest 9.2 the groups of pytest-xdist 3.8 are lost.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else nodeid.partition("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest, so that several workers end with files of seconds."""
    if hasattr(config, "workerinput"):
        first = ("tests/cluster/", "tests/training/")
        items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in first])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False
    return ByFile(config, log)
