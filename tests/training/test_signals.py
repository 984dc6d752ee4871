"""A run that a signal ends saves, and goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from megatron_vlm.hf.formats.native import NativeReader
from megatron_vlm.system.exit_codes import CONTINUE, DONE, INTERRUPTED, STOPPED
from megatron_vlm.training import checkpoint, trainer
from megatron_vlm.training.batch import BatchReader
from megatron_vlm.training.context import RunContext
from megatron_vlm.training.evaluate import Evaluator
from megatron_vlm.training.run import run
from megatron_vlm.training.signals import StopRequest
from tests.distributed import Pool
from tests.patience import HANG, wait_until
from tests.training.conftest import Trainable
from tests.training.test_kill import RUN, lines, processes
from tests.training.test_layouts import layout_flags
from tests.workers import Layout


def train(argv: list[str], rank: int = -1, iteration: int = 0, moment: str = "training") -> tuple[int, str]:
    """Train; one rank is asked to stop at a moment of an iteration. The exit code and what is said last."""
    config = RunConfig.from_flags(argv)
    sizes = config.parallel
    layout = parallel.initialize(sizes.tp, sizes.pp, config.training.seed, sizes.device, vpp=sizes.vpp)
    stop = StopRequest()
    calls = 0

    def then_ask(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            stop.asked |= calls == iteration and layout.rank == rank
            return function(*args, **options)

        return call

    owner, name = {
        "training": (trainer, "train_step"),
        "saving": (checkpoint, "save_checkpoint"),
        "evaluating": (Evaluator, "evaluate"),
        "skipping": (BatchReader, "skip"),
    }[moment]
    said = [""]
    with (
        mock.patch.object(owner, name, then_ask(getattr(owner, name))),
        mock.patch.object(RunContext, "say", lambda self, message: said.append(message)),
    ):
        return run(config, layout, stop), said[-1]


def codes(answers: list[tuple[int, str]]) -> set[int]:
    return {code for code, _ in answers}


def losses(run: Path, file: str = "metrics.jsonl") -> dict[int, float]:
    entries = [json.loads(line) for line in (run / file).read_text().splitlines()]
    found = {entry["iteration"]: entry["loss"] for entry in entries}
    assert len(found) == len(entries) and list(found) == sorted(found)
    return found


def assert_same_ends(run: Path, calm: Path) -> None:
    """Losses, the held-out ones too, and all of the last checkpoint, bit for bit."""
    for file in ("metrics.jsonl", "validation.jsonl"):
        if (calm / file).exists():
            assert losses(run, file) == losses(calm, file)
    last = (calm / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    name = f"checkpoints/iter_{int(last):07d}"
    ours, theirs = NativeReader(run / name), NativeReader(calm / name)
    assert set(ours.names) == set(theirs.names)
    assert any("exp_avg_sq" in name for name in ours.names)
    for tensor in theirs.names:
        assert torch.equal(ours.read(tensor), theirs.read(tensor)), tensor


CASES = [
    (Layout(dp=2), 1, "training", 3),
    (Layout(tp=2, pp=2), 1, "training", 3),  # a rank that neither loads data nor computes the loss
    (Layout(tp=2), 1, "saving", 4),
    (Layout(dp=2), 0, "evaluating", 4),
    (Layout(pp=2), 1, "skipping", 2),
]


@pytest.mark.parametrize(
    ("layout", "rank", "moment", "iteration"), CASES, ids=[c[2] + f"-{c[0]}" for c in CASES]
)
def test_one_rank_is_asked_and_all_save_the_same_iteration(
    pool: Pool,
    trainables: dict[str, Trainable],
    tmp_path: Path,
    layout: Layout,
    rank: int,
    moment: str,
    iteration: int,
) -> None:
    def flags(name: str) -> list[str]:
        more = ["--train-iters", "8", "--save-optim", "--save-interval", "4", "--eval-interval", "4"]
        more += ["--skip-train-iteration-range", "2-2"]
        return trainables["untied"].flags(tmp_path, name, *layout_flags(layout), *more)

    calls = iteration if moment == "training" else 1
    if moment == "training":
        calls -= 1  # the second is skipped
    assert codes(pool.run(layout.world, train, flags("calm"))) == {DONE}
    said = (
        f"stopped by a signal at iteration {iteration}/8, which is saved; the same command goes on from there"
    )
    answers = pool.run(layout.world, train, flags("run"), rank, calls, moment)
    assert answers == [(CONTINUE, said)] * layout.world
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").glob("iter_*")] == [f"iter_{iteration:07d}"]
    held_out = losses(run, "validation.jsonl") if (run / "validation.jsonl").exists() else {}
    assert list(held_out) == ([4] if moment == "saving" else [])
    assert codes(pool.run(layout.world, train, flags("run"))) == {DONE}
    assert_same_ends(run, tmp_path / "calm")


def test_asked_in_the_last_iteration(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """What is left to do is the evaluation."""

    def flags(name: str) -> list[str]:
        more = ["--train-iters", "3", "--save-optim", "--eval-interval", "2"]
        return trainables["untied"].flags(tmp_path, name, "--tp", "2", *more)

    assert codes(pool.run(2, train, flags("calm"))) == {DONE}
    assert codes(pool.run(2, train, flags("run"), 0, 3)) == {CONTINUE}
    assert list(losses(tmp_path / "run", "validation.jsonl")) == [2]
    assert codes(pool.run(2, train, flags("run"))) == {DONE}
    assert_same_ends(tmp_path / "run", tmp_path / "calm")

    # Without one nothing is left, so it is done.
    without = trainables["untied"].flags(tmp_path, "short", "--tp", "2", "--train-iters", "3", "--save-optim")
    assert codes(pool.run(2, train, without, 0, 3)) == {DONE}


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (
            "--no-save-optim",
            "Without --save-optim the run can't go on; --megatron-load-dir {run}/checkpoints/",
        ),
        ("--no-save", "with --no-save there is nothing to go on from"),
    ],
)
def test_nothing_to_go_on_from(
    pool: Pool,
    trainables: dict[str, Trainable],
    tmp_path: Path,
    flag: str,
    words: str,
) -> None:
    """A job that would be started again for this would stop with an error each time."""
    flags = trainables["untied"].flags(tmp_path, "run", "--train-iters", "5", flag)
    for code, said in pool.run(2, train, flags, 1, 2):
        assert code == STOPPED
        assert said.startswith("stopped by a signal at iteration 2/5")
        assert words.format(run=tmp_path / "run") in said
    saved = [p.name for p in tmp_path.glob("run/checkpoints/iter_*")]
    assert saved == ([] if flag == "--no-save" else ["iter_0000002"])


def tree(root: int) -> dict[str, list[int]]:
    """Processes below run.py: ``torchrun``, its ``ranks``, and what those have started."""
    everyone = processes()

    def below(parents: list[int]) -> list[int]:
        return sorted(pid for pid, (parent, _) in everyone.items() if parent in parents)

    torchrun = below([root])
    ranks = below(torchrun)
    return {"run.py": [root], "torchrun": torchrun, "ranks": ranks, "workers": below(ranks)}


def start(command: list[str], run: Path, iterations: int, out: Path) -> subprocess.Popen[bytes]:
    """Start run.py and wait until it has logged some iterations more."""
    before = lines(run)
    with open(out, "wb") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    wait_until(
        lambda: lines(run) >= before + iterations or started.poll() is not None, "iterations", out.read_text
    )
    assert started.poll() is None, out.read_text()
    return started


def test_under_run_py(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Ended by SIGUSR1 to the launcher, SIGTERM to every process as SLURM does, SIGTERM to one rank, and by
    Ctrl-C: of a terminal, which reaches run.py alone, and under srun, which reaches all."""

    def flags(name: str) -> list[str]:
        more = ["-g", "2", "--dist-optim", "--save-optim", "--train-iters", "120", "--save-interval", "1000"]
        return trainables["untied"].flags(tmp_path, name, *more)

    run, out = tmp_path / "run", tmp_path / "out"
    command = [sys.executable, str(RUN), *flags("run")]
    assert codes(pool.run(2, train, flags("calm"))) == {DONE}
    for number, targets in [
        (signal.SIGUSR1, ["run.py"]),
        (signal.SIGTERM, ["run.py", "torchrun", "ranks", "workers"]),
        (signal.SIGTERM, ["one rank"]),
        (signal.SIGINT, ["run.py"]),
        (signal.SIGINT, ["run.py", "torchrun", "ranks", "workers"]),
    ]:
        started = start(command, run, 4, out)
        family = tree(started.pid)
        assert len(family["ranks"]) == 2 and len(family["workers"]) >= 2
        family["one rank"] = family["ranks"][1:]
        for pid in [pid for target in targets for pid in family[target]]:
            os.kill(pid, number)
        assert started.wait(timeout=HANG) == CONTINUE, out.read_text()
        last = out.read_text().splitlines()[-1]
        iteration = max(losses(run))
        assert last.startswith(f"stopped by a signal at iteration {iteration}/120, which is saved")
        assert (run / "checkpoints" / f"iter_{iteration:07d}").is_dir()
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["message"]) == ("ended", CONTINUE, last)
    assert iteration < 120
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert json.loads((run / "status.json").read_text())["starts"] == 6
    assert_same_ends(run, tmp_path / "calm")


def of_one_process(
    script: str, moment: str, under_torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a script as a rank, which torchrun's variables may tell that it has started it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    if under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    command = [sys.executable, "-c", script, moment]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG, check=False)


def test_signals_of_one_process() -> None:
    """Before the iterations it ends; then it keeps the request, until SIGTERM comes again much later."""
    script = """
import os, signal, sys, time
from megatron_vlm.training import signals
clock = 1.0
time.monotonic = lambda: clock
stop = signals.StopRequest().listen()
me = os.getpid()

def send(number):
    os.kill(me, number)
    while number in signal.sigpending():
        time.sleep(0.001)

if sys.argv[1] == "training":
    stop.hold()
send(signal.SIGUSR1)
send(signal.SIGTERM)
send(signal.SIGTERM)
send(signal.SIGUSR1)  # once this is taken, what came before has been noted
clock += signals.SAME_REQUEST_SECONDS + 1
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)
print(stop.asked, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
send(signal.SIGUSR1)
send(signal.SIGUSR1)
print("still here", flush=True)
os.kill(me, signal.SIGTERM)
time.sleep(3600)
"""
    for moment, code, out, err in [
        ("starting", CONTINUE, "", "rank 0: ended by a signal before the first iteration; the same command"),
        ("training", STOPPED, "True 7\nstill here\n", "rank 0: a second SIGTERM; ending without a save\n"),
    ]:
        ended = of_one_process(script, moment)
        assert (ended.returncode, ended.stdout) == (code, out), ended.stderr
        assert ended.stderr.startswith(err)


INTERRUPTED_TWICE = """
import os, signal, sys, time
from megatron_vlm.training.signals import StopRequest
stop = StopRequest()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as launch/torchrun.py starts ranks
os.kill(os.getpid(), signal.SIGINT)
if sys.argv[1] != "starting":
    stop.hold()
stop.listen()
while not stop.asked:
    time.sleep(0.01)
print("asked", flush=True)
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGUSR1)  # pending signals are taken in the order of their numbers
while signal.SIGUSR1 in signal.sigpending():
    time.sleep(0.01)
print("still here", flush=True)
os._exit(9)
"""


@pytest.mark.parametrize(
    ("moment", "under_torchrun", "code", "out", "said"),
    [
        ("starting", True, INTERRUPTED, "", "ended by a signal before the first iteration; the same command"),
        ("training", True, 9, "asked\nstill here\n", "Ctrl-C: the run ends after this iteration; once more"),
        ("training", False, INTERRUPTED, "asked\n", "Ctrl-C: the run ends after this iteration; once more"),
    ],
    ids=["starting", "under torchrun", "alone"],
)
def test_ctrl_c_of_one_process(moment: str, under_torchrun: bool, code: int, out: str, said: str) -> None:
    """A second one ends a rank only where that stands alone: with srun the others get each twice."""
    ended = of_one_process(INTERRUPTED_TWICE, moment, under_torchrun)
    assert (ended.returncode, ended.stdout) == (code, out), ended.stderr
    assert ended.stderr.startswith(f"rank 0: {said}")
    assert ended.stderr.count("\n") == (2 if ended.stdout == "asked\n" else 1)
