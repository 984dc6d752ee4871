"""What one rank does for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_vlm import parallel
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
