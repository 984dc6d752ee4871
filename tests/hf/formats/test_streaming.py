"""What is done with each tensor on its way, and how much memory that takes."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from benchmarks.conversion import make_llava, measure
from megatron_vlm.hf.formats import streaming
from megatron_vlm.hf.formats.streaming import Background, digest

_WAITING = 16 << 20
_CONVERT = (
    "from megatron_vlm.hf import convert; from megatron_vlm.hf.formats import streaming; "
    f"streaming.MAX_WAITING = {_WAITING}; "
    "convert.import_hf('hf', 'megatron', 2, 1, verify=True); "
    "convert.export_hf('megatron', 'back', verify=True)"
)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Anonymous memory, there and back: three times the largest tensor and what waits to be written."""
    peaks, sizes = [], []
    for layers in (1, 6):
        folder = tmp_path / str(layers)
        sizes.append(make_llava(folder / "hf", layers=layers, hidden_size=512, vision_layers=2))
        command = [sys.executable, "-c", f"import os; os.chdir({str(folder)!r}); {_CONVERT}"]
        peaks.append(measure(command, folder / "back")[1])
    largest = 32064 * 512 * 2
    assert sizes[1] - sizes[0] > 5 * 2 * _WAITING and peaks[0] > 50e6
    # Both have the embedding, so what the second needs more is what grows.
    assert peaks[1] - peaks[0] < 2 * _WAITING
    assert peaks[1] < 3 * largest + _WAITING + 300e6  # Python and torch alone take 200 MB


def test_the_hash_is_of_what_safetensors_stores() -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    part = whole[:, 1:3]  # not contiguous
    expected = np.array([[1, 2], [7, 8], [13, 14], [19, 20]], dtype="<f4").tobytes()
    assert digest(part) == xxhash.xxh3_128(expected).hexdigest()
    assert digest(part.bfloat16()) != digest(part)


def test_an_error_in_the_background_comes_out(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "MAX_WAITING", 10)
    done = []

    def write(number: int) -> None:
        if number == 3:
            raise OSError("no space left")
        done.append(number)

    with pytest.raises(OSError, match="no space"), Background() as background:
        for number in range(10):
            background.call(8, write, number)
    assert done[:3] == [0, 1, 2] and len(done) < 9


def test_torch_computes_with_one_thread_beside_the_writer() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Background(), Background(), ThreadPoolExecutor(1) as executor:
            assert executor.submit(torch.get_num_threads).result() == torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
