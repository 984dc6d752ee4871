"""Loader workers that die, hang, find a damaged shard, or lose their process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.data.batch import Sample
from megatron_vlm.data.dataset import PreparedDataset
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.processing import Processing
from tests.data.tiny_data import take
from tests.patience import HANG, alive, wait_until


def test_a_shard_that_goes_bad_while_training_is_one_line(
    make_loader: Any, dataset_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    dataset = PreparedDataset.open(str(copy))
    os.truncate(copy / "000001.tar", 30000)
    with pytest.raises(ValueError, match=r"^--data-path \S+copy: Unexpected end of tar file: 000001.tar$"):
        take(make_loader(1, dataset=dataset), 100)


def shorten_timeout(loader: TrainLoader, seconds: float) -> Any:
    """Once it runs, for a start may take long on a busy machine. Returns the only worker's process."""
    loader._workers._iterator._timeout = seconds
    (worker,) = loader._workers._iterator._workers
    return worker


def test_a_dead_worker_ends_the_wait_and_hinders_no_save(make_loader: Any) -> None:
    reference, loader = make_loader(1), make_loader(1)
    expected = take(reference, 5)
    assert take(loader, 2) == expected[:2]
    worker = shorten_timeout(loader, 2.0)
    # torch also tells by a signal handler, at any point of this process; the wait must not need it.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="a data loader worker died"):
            take(loader, 10)
        states = loader.state_dict()
        loader.close()
    finally:
        signal.signal(signal.SIGCHLD, handler)
    resumed = make_loader(1)
    resumed.load_state_dict(states)
    taken = states[0]["microbatches"]  # some were on their way when the worker died
    assert take(resumed, 5 - taken) == expected[taken:]


def test_a_dead_worker_is_told_where_a_microbatch_is_taken(make_loader: Any) -> None:
    """And not by torch's handler of SIGCHLD, wherever the trainer is: amid a save, for one."""
    loader = make_loader(1)
    take(loader, 1)
    (worker,) = loader._workers._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert set(loader.state_dict()) == {0}
    message = (
        r"^a data loader worker died or hangs \(DataLoader worker \(pid \d+\) is killed by signal: Killed\)$"
    )
    with pytest.raises(RuntimeError, match=message):
        take(loader, 1000)
    loader.close()


def test_a_hung_worker_ends_the_wait(make_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = Processing.tokenize

    def hang(self: Processing, key: str, *rest: Any) -> Sample:
        time.sleep(3600.0 * key.startswith("00061"))
        return tokenize(self, key, *rest)

    monkeypatch.setattr(Processing, "tokenize", hang)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # torch's patience
    loader = make_loader(1)
    take(loader, 1)
    worker = shorten_timeout(loader, 2.0)
    with pytest.raises(RuntimeError, match="timed out after 2"):
        take(loader, 100)
    loader.close()
    assert not worker.is_alive()


def test_a_worker_that_stops_amid_a_microbatch_ends_the_wait(
    make_loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)  # at the end
    # More than a pipe holds; and long enough for a busy machine, on which its beginning takes a second.
    loader = make_loader(1, micro_batch_size=60, timeout=10.0)
    take(loader, 1)
    (worker,) = loader._workers._iterator._workers
    time.sleep(0.5)  # by now the next one fills the pipe; if not, torch's own timeout ends the wait
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"it stopped amid a microbatch 10 s ago|timed out after 10"):
        take(loader, 10)
    loader.close()
    assert not worker.is_alive()


def test_workers_end_with_their_process_and_in_silence(dataset_dir: Path, folders: dict[str, Path]) -> None:
    """Both with a process that is killed while its workers hang, and with one that ends without close()."""
    script = textwrap.dedent("""
        import os, sys, time
        from megatron_vlm.architecture.model import ModelConfig
        from megatron_vlm.data.dataset import PreparedDataset
        from megatron_vlm.data.loading.loader import TrainLoader
        from megatron_vlm.data.processing import Processing, load_processing

        folder, data = sys.argv[1:]
        processing = load_processing(folder, ModelConfig.from_hf_dir(folder), seq_length=200)
        dataset = PreparedDataset.open(data)
        tokenize = Processing.tokenize
        encoded = []  # by this worker

        def hang_at_second(self, *sample):
            encoded.append(sample)
            time.sleep(3600.0 * (len(encoded) > 1))  # torch's workers look after their parent between batches
            return tokenize(self, *sample)

        killed = os.fork()
        if not killed:
            Processing.tokenize = hang_at_second
        options = dict(dp_rank=0, dp_size=1, data_workers=4, micro_batch_size=1, shuffle_buffer_size=4)
        loader = TrainLoader(dataset, processing, **options)
        next(loader)
        print(*[worker.pid for worker in loader._workers._iterator._workers], flush=True)
        if not killed:
            time.sleep(0.5)
            os.kill(os.getpid(), 9)
        os.waitpid(killed, 0)
        raise SystemExit(3)
    """)
    command = [sys.executable, "-c", script, str(folders["llava"]), str(dataset_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    errors = [line for line in result.stderr.splitlines() if " is skipped (corrupt)" not in line]
    assert (result.returncode, errors) == (3, [])
    workers = [int(pid) for pid in result.stdout.split()]
    assert len(workers) == 8
    wait_until(lambda: not any(map(alive, workers)), "the end of the workers")
