"""Throughput and utilisation that a run reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.plan.flops import Work, causal_pairs, training_flops
from tests.distributed import Pool
from tests.training.conftest import Trainable
from tests.training.test_run import metrics
from tests.workers import train


def flops(line: dict[str, float], ranks: int, name: str = "tflops_per_gpu") -> float:
    """Operations of an iteration, from what was reported of it."""
    return line[name] * 1e12 * ranks * line["iteration_seconds"]


def test_every_layout_reports_the_same_work(
    pool: Pool, trainables: dict[str, Trainable], tmp_path: Path
) -> None:
    """Counted from the data and from what is trained anywhere, however model and data are cut."""
    one = trainables["untied"]
    model = ModelConfig.from_dict(read_manifest(str(one.checkpoint))["model"])
    lines = {}
    for name, ranks, flags in [
        ("one", 1, ["--peak-tflops", "0.5"]),
        ("pp2", 2, ["--pp", "2"]),
        ("tp2-dp2", 4, ["--tp", "2", "--peak-tflops", "0.5"]),
    ]:
        argv = one.flags(tmp_path, name, "--stage", "2", "--train-iters", "3", "--no-save", *flags)
        pool.run(ranks, train, argv)
        lines[name] = [(ranks, line) for line in metrics(tmp_path / name)]
    for (ranks, line), *others in zip(*lines.values(), strict=True):
        total = flops(line, ranks)
        without = flops(line, ranks, "tflops_per_gpu_without_vision")
        for other_ranks, other in others:
            assert flops(other, other_ranks) == pytest.approx(total, rel=1e-9)
            assert other["tokens"] == line["tokens"] and other["images"] == line["images"]

        def expected(pairs: int, line: dict[str, float] = line) -> float:
            work = Work(int(line["tokens"]), int(line["trained_tokens"]), pairs, int(line["images"]))
            return training_flops(model, work, lambda name: not name.startswith("vision_model.")).total

        # The lengths aren't reported: at least all the same, at most one token each but for one sample.
        length = int(line["tokens"] / line["samples"])
        assert expected(causal_pairs([length] * 4)) <= total <= expected(causal_pairs([int(line["tokens"])]))
        assert without < total if line["images"] else without == total

        assert line["mfu"] == pytest.approx(line["tflops_per_gpu"] / 0.5)
        assert line["mfu_without_vision"] == pytest.approx(line["tflops_per_gpu_without_vision"] / 0.5)
        assert line["images_per_second"] * line["iteration_seconds"] == pytest.approx(line["images"])
        assert 0 <= line["data_seconds"] <= line["iteration_seconds"]
        assert 0.05 < line["peak_memory_gib"] < 16
    assert lines["pp2"][0][1]["mfu"] is None  # nobody knows a CPU's peak
    assert [line["seconds_left"] > 0 for _, line in lines["one"]] == [True, True, False]


def test_gpu_hours_go_on(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """Added up over starts at any number of ranks; less work with less to train."""
    flags = trainables["untied"].flags(tmp_path, "run", "--save-optim", "--freeze-lm")
    pool.run(1, train, [*flags, "--train-iters", "2"])
    pool.run(2, train, [*flags, "--train-iters", "4"])
    lines = metrics(tmp_path / "run")
    hours = [line["gpu_hours"] for line in lines]
    for (before, after), line, ranks in zip(
        zip([0.0, *hours], hours, strict=False), lines, [1, 1, 2, 2], strict=True
    ):
        assert after - before >= ranks * line["iteration_seconds"] / 3600 * (1 - 1e-9)


def test_adapters_are_counted(pool: Pool, trainables: dict[str, Trainable], tmp_path: Path) -> None:
    """A run with LoRA knows its adapters by the names that the count has for them."""
    one = trainables["untied"]
    flags = ["--stage", "2", "--train-iters", "1", "--no-save", "--lora-rank", "4"]
    pool.run(2, train, one.flags(tmp_path, "run", "--pp", "2", *flags))
    (line,) = metrics(tmp_path / "run")
    model = ModelConfig.from_dict(read_manifest(str(one.checkpoint))["model"])
    language = model.language
    query, key = (
        language.num_attention_heads * language.head_dim,
        language.num_key_value_heads * language.head_dim,
    )
    hidden, ffn = language.hidden_size, language.ffn_hidden_size
    base = language.num_layers * (2 * hidden * (query + key) + 3 * hidden * ffn)
    sides = 2 * (hidden + query) + 2 * (hidden + key) + 3 * (hidden + ffn)  # of the seven projections
    adapters = language.num_layers * 4 * sides
    # Frozen maps pass gradients on, trained ones have their own too; then attention and the output layer.
    maps = (
        line["tokens"] * (4 * base + 6 * adapters) + 4 * line["trained_tokens"] * hidden * language.vocab_size
    )
    projector = line["images"] * model.image_tokens * hidden * (4 * model.vision.hidden_size + 6 * hidden)
    attention = flops(line, 2, "tflops_per_gpu_without_vision") - maps - projector
    pairs = attention / (3 * 4 * query * language.num_layers)
    assert pairs == pytest.approx(round(pairs), abs=1e-3)  # nothing is left over
    length = int(line["tokens"] / line["samples"])
    assert causal_pairs([length] * 4) <= round(pairs) <= causal_pairs([int(line["tokens"])])
