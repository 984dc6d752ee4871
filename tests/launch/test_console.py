"""What a terminal shows of a run's lines: as many fields as it is wide; the log has them all."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from megatron_vlm.launch.console import fitted
from megatron_vlm.launch.container import CHECKOUT
from tests.observe.test_metrics import METRICS

LINE = METRICS.line(1000, {"projector": 1e-3, "language": 2e-5}, "process")


def test_a_line_of_an_iteration_fits() -> None:
    for columns in (80, 100):
        shown, _ = fitted(LINE, columns)
        assert len(shown) <= columns and shown.startswith("iteration 1/1000 (0.1%) | loss 1.0000 | ")
        assert shown.endswith(" | 0:00:01 left") and "tokens/s" in shown
    assert fitted(LINE, 1000) == (LINE, 0)
    assert fitted("a | b | " + "c" * 200, 100, 2) == ("a | b | " + "c" * 200, 2)


def test_lines_below_each_other_have_the_same_fields() -> None:
    long, without = fitted(LINE, 70)
    assert fitted(LINE, 1000, without) == (long, without)


def test_no_gpus_on_a_cpu() -> None:
    assert "GPU" not in LINE and "TFLOP/s per process" in LINE and "process hours" in LINE


def test_a_terminal_and_the_log(tmp_path) -> None:
    """In pieces that end within lines, as a pipe gives them."""
    leader, follower = pty.openpty()
    code = "import sys, time\n"
    code += f"for c in ({LINE[:9]!r}, {LINE[9:30]!r}, {LINE[30:] + chr(10)!r}, 'saved x\\n', 'it'):\n"
    code += "    sys.stdout.write(c); sys.stdout.flush(); time.sleep(0.05)"
    # In a process of its own, since process.run kills every child of its process: here, the pool's ranks.
    launcher = "import sys; from megatron_vlm.launch import process; process.run(sys.argv[2:], sys.argv[1])"
    command = [sys.executable, "-c", launcher, tmp_path / "log", sys.executable, "-c", code]
    subprocess.run(command, cwd=CHECKOUT, stdout=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode().replace("\r\n", "\n")
    os.close(leader)
    assert shown == f"{fitted(LINE, 100)[0]}\nsaved x\nit"
    assert (tmp_path / "log").read_text() == f"{LINE}\nsaved x\nit"
