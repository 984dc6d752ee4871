"""The CPU backend does what megatron-core needs, leaves nothing behind, and is inert where there is CUDA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._device import _device_constructors

from megatron_vlm import parallel
from megatron_vlm.parallel import cpu

NAMES = [(torch, name) for name in cpu._CONSTRUCTORS] + [
    (torch.Tensor, "cuda"),
    (torch.Tensor, "type"),
    (torch.cuda, "current_device"),
    (torch.cuda, "Stream"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "manual_seed"),
]


@pytest.fixture
def installed() -> object:
    cpu.install()
    yield
    cpu.uninstall()


def test_what_megatron_core_calls(installed: None) -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1.0], dtype=torch.float, device=torch.device("cuda", 0)).tolist() == [1.0]
    assert torch.empty(3, device=torch.cuda.current_device()).device.type == "cpu"
    x = torch.ones(2, dtype=torch.bfloat16)
    assert x.cuda() is x
    assert x.type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float32).dtype == torch.float32
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), expected)


def test_devices_other_than_cuda_are_left_alone(installed: None) -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).device.type == "cpu"


def test_a_device_context_has_its_effect(installed: None) -> None:
    """As transformers builds models; torch notes once which functions such a context is about."""
    cpu.uninstall()
    _device_constructors.cache_clear()
    cpu.install()
    with torch.device("meta"):
        assert torch.arange(3).device.type == "meta"
        assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.arange(3).device.type == "cpu"


def test_uninstall_restores_everything() -> None:
    before = [getattr(owner, name) for owner, name in NAMES]
    cpu.install()
    assert [getattr(owner, name) for owner, name in NAMES] != before
    cpu.install()  # twice is the same as once
    cpu.uninstall()
    assert [getattr(owner, name) for owner, name in NAMES] == before
    assert not cpu.installed()


def test_inert_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device, initialize() never installs it: it goes on to CUDA itself."""
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(cpu, "install", lambda: pytest.fail("installed on a machine with CUDA"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--tp 2 x --pp 1 does not divide 3 ranks"):
        parallel.initialize(tp=2)
    assert calls == [1]


def test_choice_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.choose_device() == ("cpu", "gloo")
    with pytest.raises(ValueError, match="torch sees no GPU here; use --device cpu"):
        parallel.choose_device("cuda")
    with pytest.raises(ValueError, match="use --backend gloo"):
        parallel.choose_device("cpu", "nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parallel.choose_device() == ("cuda", "nccl")
    assert parallel.choose_device("cpu") == ("cpu", "gloo")
    for device in ("cuda", None):
        with pytest.raises(ValueError, match="--backend gloo runs on CPUs only; add --device cpu or use"):
            parallel.choose_device(device, "gloo")


def test_no_compiler_is_needed() -> None:
    """What megatron-core compiles runs with no program on PATH, and torch's compiler isn't even loaded."""
    code = (
        "import sys, megatron_vlm.models.vlm, torch\n"
        "from megatron.core.fusions.fused_bias_swiglu import bias_swiglu\n"
        "print(bias_swiglu(torch.ones(2, 4), torch.zeros(4)).shape)\n"
        "print('torch._inductor.compile_fx' in sys.modules)"
    )
    environment = {**os.environ, "PATH": "", "CXX": ""}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stdout == "torch.Size([2, 2])\nFalse\n", ended.stderr
    assert ended.stderr == ""
