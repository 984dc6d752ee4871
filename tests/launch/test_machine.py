"""What is asked of the machine that a run starts on."""

from __future__ import annotations

import importlib.util
import socket

from megatron_vlm.launch import machine


def test_the_memory_of_gpus_is_nvidia_smis(nvidia_smi) -> None:
    nvidia_smi.write_text('#!/bin/sh\n[ "$1" = --query-gpu=memory.total ] && echo 81559 && echo 40960\n')
    assert machine.gpu_memory() == 40
    nvidia_smi.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert machine.gpu_memory() is None
    nvidia_smi.unlink()
    assert machine.gpu_memory() is None


def test_hosts(monkeypatch) -> None:
    assert machine.knows_host("127.0.0.1") and machine.knows_host("localhost")
    assert not machine.knows_host("a" * 70)  # longer than names may be

    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert not machine.knows_host("nod0")


def test_the_cuda_of_torch_is_read_without_importing_it(tmp_path, monkeypatch) -> None:
    (tmp_path / "torch").mkdir()
    version = tmp_path / "torch/version.py"
    spec = importlib.util.spec_from_file_location(
        "torch", tmp_path / "torch/__init__.py", submodule_search_locations=[str(tmp_path / "torch")]
    )
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    for text, expected in {
        "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n": (13, 0),
        "cuda = '12.8'\n": (12, 8),
        "cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n": None,
    }.items():
        version.write_text(text)
        assert machine.torch_cuda() == expected
    version.unlink()
    assert machine.torch_cuda() is None
