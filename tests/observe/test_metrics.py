"""What a run reports of itself."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

from megatron_vlm.observe.metrics import IterationMetrics, MetricsLog

METRICS = IterationMetrics(**{field.name: 1 for field in fields(IterationMetrics)})


def test_learning_rates() -> None:
    """One for all, or each part's."""
    assert "| lr 1.00e+00 |" in METRICS.line(10, {})
    line = METRICS.line(10, {"projector": 1e-3, "language": 2e-5})
    assert "| lr projector 1.00e-03, language 2.00e-05 |" in line


def test_what_is_not_known() -> None:
    line = replace(METRICS, loss=None, grad_norm=None, mfu=None).line(10, {})
    assert "iteration 1/10 (10.0%) | loss not finite |" in line and "grad norm not finite" in line
    assert "MFU" not in line and "(100.0% MFU)" in METRICS.line(10, {})


def test_the_page_has_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    table = next(part for part in page.split("\n\n") if part.startswith("| field |"))
    names = {name for row in table.splitlines() for name in re.findall(r"`([\w/<>]+)`", row.split("|")[1])}
    assert names == {field.name for field in fields(IterationMetrics)} | {"lr/<part>"}


def test_a_damaged_line_is_moved_aside(tmp_path: Path) -> None:
    lines = [b'{"iteration": 1}', b"\xcd\x00 of no encoding", b'{"iteration": 2}', b"[" * 100_000]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    MetricsLog(tmp_path, last_iteration=2)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == [lines[0], lines[2]]
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes().splitlines() == [lines[1], lines[3]]
