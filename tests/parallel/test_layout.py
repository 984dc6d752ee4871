"""What one rank does for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.parallel import layout
from tests.distributed import Pool


def read_on_first_rank(file: Path) -> Any:
    layout = parallel.initialize()

    def read() -> Any:
        assert layout.rank == 0
        return json.loads(file.read_text())

    try:
        return parallel.on_first_rank(read)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)


def test_every_rank_hears_what_the_first_found(pool: Pool, tmp_path: Path) -> None:
    """Its result, or its error: a rank that waited for an answer would tell of a lost connection instead."""
    file = tmp_path / "file"
    for text, kind, message in ((None, "FileNotFoundError", str(file)), ("{", "ValueError", "line 1 column")):
        if text is not None:
            file.write_text(text)
        first, second = pool.run(2, read_on_first_rank, file)
        assert first == second and first[0] == kind and message in first[1]
    file.write_text("[1]")
    assert pool.run(2, read_on_first_rank, file) == [[1], [1]]


class _JoinedError(Exception):
    pass


def test_a_rank_takes_its_gpu_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Barriers and collectives of objects use the GPU that is set. A communicator is made when it is used."""
    done: list[Any] = []

    def join(backend: str, **options: Any) -> None:
        done.append((backend, options.get("device_id")))
        raise _JoinedError

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(layout.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(layout.dist, "init_process_group", join)
    with pytest.raises(_JoinedError):
        parallel.initialize(device="cuda")
    assert done == [3, ("nccl", None)]
