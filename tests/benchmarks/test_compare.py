"""``make bench`` on tiny sizes: both sides train the same thing, and the table is complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import compare

TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "vision_hidden_size": 32,
    "vision_ffn_hidden_size": 48,
    "vision_layers": 2,
    "vision_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "sequence": 160,
    "answer": 40,
    "micro_batch": 1,
    "global_batch": 4,
    "warmup": 1,
    "iterations": 2,
}


def test_writes_a_complete_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Of the rows one with tensor parallelism and one with loaders; the others only differ in flags.
    monkeypatch.setattr(compare, "ROWS", [compare.ROWS[1], compare.ROWS[3]])
    argv = ["compare", "--output", str(tmp_path), "--repetitions", "1", "--workload", json.dumps(TINY)]
    monkeypatch.setattr(sys, "argv", argv)
    compare.main()

    (text,) = (path.read_text() for path in tmp_path.glob("*.md"))
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    from_memory, from_files = report["rows"]
    assert len(from_memory["losses"]["ours"]) == len(from_memory["losses"]["theirs"]) == 3
    assert from_memory["loss_difference"] < 1e-4
    for row in (from_memory, from_files):
        assert row["speed_ratio"] > 0 and row["memory_ratio"] > 0
        for side in ("ours", "theirs"):
            assert row[side]["tokens_per_second"] > 0 and row[side]["peak_mib"] > 100
            assert f"| {row[side]['tokens_per_second']:.0f} |" in text
    assert report["machine"] in text and "python -m benchmarks.compare" in text
    assert all(name in text for name in ("torch", "megatron-core", "transformers", "accelerate"))


def test_other_losses_are_an_error() -> None:
    row = compare.ROWS[0]
    result = {"tokens_per_second": 1.0, "iteration_seconds": 1.0, "peak_mib": 1.0}
    results = {run: [{**result, "losses": [2.0, 1.9]}] for r in compare.ROWS for run in (r.ours, r.theirs)}
    results[row.ours] = [{**result, "losses": [2.0, 1.8]}]
    with pytest.raises(ValueError, match="not the same training"):
        compare.summarize(results)
