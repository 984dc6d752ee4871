"""The child of run.py: its output, its exit code, and how it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.launch.container import CHECKOUT
from tests.patience import HANG, alive, wait_until

LAUNCHER = """
import sys
from megatron_vlm.launch import process
sys.exit(process.run(sys.argv[2:], sys.argv[1]).code)
"""
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux only")

# Starts a grandchild in a session of its own, as torchrun does with its ranks; both sleep.
FAMILY = """
import os, subprocess, sys, time
sleeper = "import time; time.sleep(3600)"
child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(3600)
"""


def launcher(log: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(log), *command],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_dead(*pids: int) -> None:
    try:
        wait_until(lambda: not any(map(alive, pids)), f"the end of {pids}")
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_output_is_streamed_and_logged_and_the_exit_code_handed_on(tmp_path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(2)"
    (tmp_path / "log").write_text("earlier\n")
    run = launcher(tmp_path / "log", sys.executable, "-c", code)
    out, err = run.communicate(timeout=HANG)
    assert (run.returncode, out, err) == (2, "out\n", "err\n")
    assert sorted((tmp_path / "log").read_text().split()) == ["earlier", "err", "out"]


def test_output_that_was_closed_before(tmp_path) -> None:
    code = "print('to the log'); raise SystemExit(5)"
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "log"), sys.executable, "-c", code]
    shell = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, cwd=CHECKOUT, timeout=HANG, check=False).returncode == 5
    assert (tmp_path / "log").read_text() == "to the log\n"


def test_a_program_that_is_not_there(tmp_path) -> None:
    run = launcher(tmp_path / "log", "no-such-program")
    assert "ValueError: no-such-program: No such file" in run.communicate(timeout=HANG)[1]


@needs_linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_handed_on_and_nobody_stays(tmp_path, number) -> None:
    run = launcher(tmp_path / "log", sys.executable, "-c", FAMILY)
    pids = [int(pid) for pid in run.stdout.readline().split()]
    run.send_signal(number)
    run.communicate(timeout=HANG)
    assert run.returncode == 128 + number
    wait_until_dead(*pids)


def test_what_nohup_ignores_is_not_handed_on(tmp_path) -> None:
    """The child takes both signals, as torchrun does."""
    code = "import signal, time\nfor number in (1, 10): signal.signal(number, lambda n, _: exit(n))\n"
    code = code.replace("exit(n)", "__import__('os')._exit(n)") + "print('up', flush=True); time.sleep(3600)"
    command = ["-c", LAUNCHER, str(tmp_path / "log"), sys.executable, "-c", code]
    nohup = "import os, signal, sys; signal.signal(1, signal.SIG_IGN); os.execv(sys.executable, sys.argv)"
    run = subprocess.Popen(
        [sys.executable, "-c", nohup, *command], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGUSR1)
    run.communicate(timeout=HANG)
    assert run.returncode == signal.SIGUSR1


@needs_linux
def test_a_child_that_ignores_the_first_interrupt_dies_of_the_second(tmp_path) -> None:
    code = (
        "import signal, time; signal.signal(2, lambda *a: print('no', flush=True)); print('up', flush=True)\n"
    )
    run = launcher(tmp_path / "log", sys.executable, "-c", code + "while True: time.sleep(0.1)")
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == "no\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=HANG)[1] == "a second Ctrl-C; ended at once\n"
    assert run.returncode == 128 + signal.SIGINT


@needs_linux
def test_when_the_child_is_killed_what_it_started_dies_too(tmp_path) -> None:
    run = launcher(tmp_path / "log", sys.executable, "-c", FAMILY)
    child, grandchild = map(int, run.stdout.readline().split())
    os.kill(child, signal.SIGKILL)
    run.communicate(timeout=HANG)
    assert run.returncode == 128 + signal.SIGKILL
    wait_until_dead(grandchild)


@needs_linux
def test_when_the_launcher_is_killed_its_child_dies_too(tmp_path) -> None:
    run = launcher(
        tmp_path / "log",
        sys.executable,
        "-c",
        "import os, time; print(os.getpid(), flush=True); time.sleep(3600)",
    )
    child = int(run.stdout.readline())
    run.kill()
    run.communicate(timeout=HANG)
    wait_until_dead(child)


@needs_linux
def test_torchrun_dies_with_its_launcher_through_a_container_runtime(tmp_path) -> None:
    """A wrapper resets the parent death signal, as runtimes do; the rank asks for its own, as in training."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
        "print(os.getppid(), os.getpid(), flush=True)\ntime.sleep(3600)\n"
    )
    wrapper = (
        "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    torchrun = [sys.executable, "-m", "megatron_vlm.launch.torchrun", "--nproc-per-node", "1", str(script)]
    run = launcher(tmp_path / "log", sys.executable, "-c", wrapper, *torchrun)
    pids = [int(pid) for pid in run.stdout.readline().split()]
    run.kill()
    run.communicate(timeout=HANG)
    wait_until_dead(*pids)


@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        # Rank 1 has a user error, rank 0 would go on for ever.
        ("sys.exit(print('error: bad input', file=sys.stderr) or 2)", 2, ["error: bad input"]),
        ("os.kill(os.getpid(), 9)", 128 + 9, ["rank 1 was ended by SIGKILL"]),
    ],
    ids=["user error", "killed"],
)
def test_torchrun_ends_with_the_code_of_the_rank_that_failed(tmp_path, action, code, words) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys\n"
        # Ctrl-C has to wait until rank.begin().
        "assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), 'not held'\n"
        f"if os.environ['RANK'] == '1':\n    {action}\nsignal.sigwait([signal.SIGTERM])\n"
    )
    command = [sys.executable, "-m", "megatron_vlm.launch.torchrun", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == code, result.stderr
    assert result.stderr.splitlines() == words


def test_ctrl_c_while_torch_is_imported(tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import time; print('importing', flush=True); time.sleep(3600)"
    )
    command = [sys.executable, "-m", "megatron_vlm.launch.torchrun", "script.py"]
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}"}
    run = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    said = "ended by a signal before the ranks began; the same command begins again\n"
    assert run.communicate(timeout=HANG)[1] == said
    assert run.returncode == 128 + signal.SIGINT


def test_nodes_that_do_not_meet(tmp_path) -> None:
    """torch's own error, with the class and the words of its release 2.13."""
    (tmp_path / "torch/distributed").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/distributed/run.py").write_text(
        "class DistNetworkError(RuntimeError):\n    pass\n\ndef main(argv):\n"
        "    raise DistNetworkError('The client socket has timed out after 600000ms\\nframes of C++')\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}"}
    command = [sys.executable, "-m", "megatron_vlm.launch.torchrun"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=HANG, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: the nodes do not reach each other; look at --master-addr")
