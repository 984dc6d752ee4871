"""How many samples share a sequence: the estimate against samples whose lengths are known one by one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vlm.artifacts.token_lengths import TokenLengths
from megatron_vlm.data.prepare.histogram import Histogram
from megatron_vlm.plan.grouping import Packing
from megatron_vlm.plan.packing_estimate import estimate_packing

# An image of LLaVA-1.5 is 576 tokens, a tile of LLaVA-1.6 as many. Texts are spread as in conversations.
SPREADS: dict[str, Callable[[random.Random], int]] = {
    "captions": lambda numbers: 576 + int(numbers.gauss(40, 12)),
    "conversations": lambda n: 576 * (n.random() < 0.8) + 20 + int(min(1500, n.lognormvariate(5.3, 0.8))),
    "text": lambda numbers: 5 + int(numbers.lognormvariate(5.5, 1)),
}


def write_report(folder: Path, lengths: list[int], tokens: str = "tokens") -> None:
    """Write a report as prepare.py does."""
    histogram = Histogram()
    for length in lengths:
        histogram.add(length)
    folder.mkdir(exist_ok=True)
    found = {"settings": {"tokenizer_load_dir": "hf"}, "histograms": {tokens: histogram.state()}}
    (folder / "report.json").write_text(json.dumps(found))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
def test_the_estimate_is_within_five_percent(tmp_path: Path, spread: str, capacity: int) -> None:
    numbers, packing = random.Random(5), Packing(200, capacity)
    lengths = [SPREADS[spread](numbers) for _ in range(4000)]
    write_report(tmp_path, lengths)
    cut = [min(length, capacity) for length in lengths]
    buffers = [cut[start : start + 200] for start in range(0, len(cut), 200)]
    sequences = sum(len(packing.select(buffer, [True] * len(buffer), 0)) for buffer in buffers)
    found = estimate_packing(str(tmp_path), packing, "truncate")
    assert found is not None and found.counted_with == ("hf",)
    assert found.samples_per_sequence == pytest.approx(len(lengths) / sequences, rel=0.05)


def test_lengths_in_sum_and_in_their_bounds(tmp_path: Path) -> None:
    lengths = [3, 9, 9, 10, 700, 1000, 1001]
    write_report(tmp_path, lengths)
    found = TokenLengths.read(str(tmp_path))
    assert found is not None and found.shortest == 3
    drawn = found.draw(20_000, random.Random(1))
    assert min(drawn) == 3 and max(drawn) <= 1001
    assert sum(drawn) / len(drawn) == pytest.approx(sum(lengths) / len(lengths), rel=0.02)


def test_samples_that_are_left_out_take_no_room(tmp_path: Path) -> None:
    write_report(tmp_path, [8] * 50 + [5000] * 50)
    packing = Packing(100, 80)
    kept, cut = (estimate_packing(str(tmp_path), packing, overlong) for overlong in ("drop", "truncate"))
    assert kept is not None and cut is not None
    # Ten short ones fill a sequence, and pass over as many long ones; each of these takes one when it is cut.
    assert kept.samples_per_sequence == pytest.approx(20, rel=0.05)
    assert cut.samples_per_sequence == pytest.approx(100 / 55, rel=0.05)
    assert estimate_packing(str(tmp_path), Packing(100, 7), "drop") is None


def test_a_mixture_by_weights_and_by_epochs(tmp_path: Path) -> None:
    for name, length in (("short", 100), ("long", 900)):
        write_report(tmp_path / name, [length] * 10)
        meta = tmp_path / name / ".nv-meta"
        meta.mkdir()
        (meta / ".info.json").write_text(json.dumps({"shard_counts": {"0.tar": 10}}))
        (meta / "split.yaml").write_text("split_parts:\n  train:\n  - 0.tar\nexclude: []\n")
    for key, values in (("weight", (3, 1)), ("epochs", (3, 1))):
        file = tmp_path / f"{key}.yaml"
        file.write_text(
            f"datasets:\n  a:\n    path: short\n    {key}: {values[0]}\n"
            f"  b:\n    path: long\n    {key}: {values[1]}\n"
        )
        found = estimate_packing(str(file), Packing(400, 1000), "truncate")
        # Of four samples one is long and takes a sequence with a short one; ten others fill one.
        assert found is not None and found.samples_per_sequence == pytest.approx(4 / 1.2, rel=0.05)
    (tmp_path / "long/report.json").unlink()
    assert estimate_packing(str(file), Packing(400, 1000), "truncate") is None


def test_without_counted_tokens_nothing_is_estimated(tmp_path: Path) -> None:
    write_report(tmp_path, [5], tokens="characters")
    assert TokenLengths.read(str(tmp_path)) is None
    for damaged in ("{", "[]", '{"histograms": {"tokens": {}}, "settings": {"tokenizer_load_dir": "hf"}}'):
        (tmp_path / "report.json").write_text(damaged)
        assert TokenLengths.read(str(tmp_path)) is None


def test_lengths_of_their_own_in_one_histogram(tmp_path: Path) -> None:
    """What a bin of long samples is like says nothing of one of short samples."""
    write_report(tmp_path, [100] * 50 + [5000] * 50)
    for overlong, expected in (("drop", 20), ("truncate", 100 / 55)):
        found = estimate_packing(str(tmp_path), Packing(200, 1000), overlong)
        assert found is not None and found.samples_per_sequence == pytest.approx(expected, rel=0.03)
    report = json.loads((tmp_path / "report.json").read_text())
    del report["histograms"]["tokens"]["sums"]  # of an older version
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert estimate_packing(str(tmp_path), Packing(200, 1000), "drop") is not None
