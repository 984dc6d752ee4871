"""A conversion that can't go on, is told to end, or is killed: nothing is left, or the whole."""

import os
import random
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.conversion import make_llava
from megatron_vlm.hf import Difference, convert
from megatron_vlm.hf.convert import export_hf, import_hf
from megatron_vlm.hf.formats import folder, native, stored
from megatron_vlm.hf.verify import verify
from tests.distributed import CONTEXT
from tests.hf.test_convert import make
from tests.hf.test_scripts import run

KILLS = int(os.environ.get("KILLS", "1"))  # of each signal


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return make(tmp_path / "llava", "clip-llama")


def test_a_full_disk_is_said_before_writing(llava: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    import_hf(llava, tmp_path / "megatron", 1, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    for call in (
        lambda: import_hf(llava, tmp_path / "more", 1, 1),
        lambda: export_hf(tmp_path / "megatron", tmp_path / "more"),
    ):
        with pytest.raises(
            ValueError, match=r"more: needs 64\.\d MiB, but its file system has 1\.0 MiB left"
        ):
            call()
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("fails", ["import", "export", "carried"])
def test_verify_reads_back_what_was_written(llava: Path, tmp_path: Path, monkeypatch, fails: str) -> None:
    """A bit that flips between memory and disk is found, and nothing is left that looks finished."""
    import_hf(llava, tmp_path / "megatron", 2, 1, verify=True)
    export_hf(tmp_path / "megatron", tmp_path / "back", verify=True)
    assert verify(llava, tmp_path / "back") and verify(llava, tmp_path / "megatron")

    def flipped(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if tensor.nbytes == 48 * 48 * 4 or fails == "carried":  # o_proj's and others'
            tensor.view(torch.uint8).view(-1)[100] ^= 1
        return tensor

    save, write_at = native._with_own_storage, stored.write_at
    with monkeypatch.context() as patch:
        if fails != "carried":  # what isn't trained lies in a file beside the checkpoint's
            patch.setattr(native, "_with_own_storage", lambda tensor: save(flipped(tensor)))
        patch.setattr(folder, "write_at", lambda file, start, tensor: write_at(file, start, flipped(tensor)))
        with pytest.raises(Difference, match=r"\.(weight|bias) was written other than it was read"):
            if fails != "export":
                import_hf(llava, tmp_path / "more", 1, 1, verify=True)
            else:
                export_hf(tmp_path / "megatron", tmp_path / "more", verify=True)
    assert not (tmp_path / "more").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_half_way(llava: Path, tmp_path: Path, monkeypatch, capsys, number: signal.Signals) -> None:
    """One line, 128 plus its number, and nothing is left; ignored, as nohup does it, it changes nothing."""
    checked, check = [], convert.check_finite

    def signalled(name: str, tensor: torch.Tensor) -> None:
        checked.append(name)
        if len(checked) == 20:
            assert list(tmp_path.glob(".megatron.*/release"))
            os.kill(os.getpid(), number)
        check(name, tensor)

    monkeypatch.setattr(convert, "check_finite", signalled)
    command = ["convert_hf_to_megatron", "--hf-dir", llava, "--megatron-dir", tmp_path / "megatron"]
    assert run(monkeypatch, *command) == 128 + number
    assert capsys.readouterr().err.endswith(f"\nended by {number.name}; no unfinished output is left\n")
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
    checked.clear()
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run(monkeypatch, *command) == 0 and len(checked) > 20
    finally:
        signal.signal(number, before)


def run_script(log: Path, script: str, *flags: str) -> None:
    """Run a script as a user does, in a process that has imported everything; stderr goes to ``log``."""
    file = Path(__file__).parents[2] / f"scripts/convert/{script}.py"
    sys.argv = [str(file), *flags]
    with open(log, "w", encoding="utf-8") as sys.stderr:
        runpy.run_path(str(file), run_name="__main__")


@pytest.fixture(scope="module")
def to_kill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """A model of 50 MB, a checkpoint of it, and how many seconds that took."""
    folder = tmp_path_factory.mktemp("kill")
    make_llava(folder / "hf", layers=2, hidden_size=128, vision_layers=2)
    start = time.monotonic()
    import_hf(folder / "hf", folder / "checkpoint", 2, 1)
    return folder / "hf", folder / "checkpoint", time.monotonic() - start


@pytest.mark.parametrize("way", ["to Megatron", "classic", "reshard", "to Hugging Face"])
def test_killed_at_any_moment(to_kill: tuple[Path, Path, float], tmp_path: Path, way: str) -> None:
    """Nothing or the whole, by SIGKILL and by SIGTERM; and the same command works next."""
    source, checkpoint, seconds = to_kill
    output, log = tmp_path / "output", tmp_path / "log"
    command = {
        "to Megatron": ["convert_hf_to_megatron", f"--hf-dir={source}", f"--megatron-dir={output}", "--tp=2"],
        "classic": ["convert_hf_to_megatron", f"--hf-dir={source}", f"--megatron-dir={output}", "--tp=2"],
        "reshard": ["reshard", f"--megatron-dir={checkpoint}", f"--save-dir={output}", "--pp=2"],
        "to Hugging Face": ["convert_megatron_to_hf", f"--megatron-dir={checkpoint}", f"--hf-dir={output}"],
    }[way] + (["--format=classic"] if way in ("classic", "reshard") else [])
    for number in [signal.SIGKILL, signal.SIGTERM] * KILLS:
        process = CONTEXT.Process(target=run_script, args=(log, *command))
        process.start()
        time.sleep(random.uniform(0, 1.5 * seconds))
        (process.kill if number == signal.SIGKILL else process.terminate)()  # says nothing if it has ended
        process.join()
        assert process.exitcode in (0, 128 + signal.SIGTERM, -number)  # the last one where it had not begun
        if process.exitcode == 128 + signal.SIGTERM:
            assert log.read_text().endswith("\nended by SIGTERM; no unfinished output is left\n")
            assert not any(any(folder.iterdir()) for folder in tmp_path.glob(".*"))
        if output.exists() or process.exitcode == 0:
            assert verify(source, output)
            shutil.rmtree(output)
    process = CONTEXT.Process(target=run_script, args=(log, *command))
    process.start()
    process.join()
    assert process.exitcode == 0 and verify(source, output)
    assert not list(tmp_path.glob(".*"))
