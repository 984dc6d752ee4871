"""Tiny models that can be trained on a tiny dataset, as converted checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_vlm.architecture.families.known import FAMILIES
from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.hf.convert import import_hf
from tests.data.tiny_data import make_samples, prepare, write_shards
from tests.tiny import save_llava


@dataclass(frozen=True)
class Trainable:
    """The values of ``--megatron-load-dir``, ``--tokenizer-load-dir`` and ``--data-path``."""

    checkpoint: Path
    hf: Path
    data: Path
    text_only: Path
    seq_length: int = 96

    def flags(self, save_dir: Path, name: str, *more: str) -> list[str]:
        """A short run with small batches, in float32 unless ``more`` says otherwise."""
        precision = [] if "--bf16" in more else ["--fp32"]
        return [
            *("--megatron-load-dir", str(self.checkpoint), "--tokenizer-load-dir", str(self.hf)),
            *("--data-path", str(self.data), "--save-dir", str(save_dir), "--name", name),
            *("--micro-batch-size", "2", "--global-batch-size", "4", "--data-workers", "2"),
            *(
                "--seq-length",
                str(self.seq_length),
                "--shuffle-buffer-size",
                "20",
                "--lang",
                "en",
                *precision,
            ),
            *("--lr", "2e-3", "--lr-warmup-iters", "0", "--max-corrupt-rate", "0.5", *more),
        ]


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset with samples with and without images, and one without any."""
    mixed, text_only = tmp_path_factory.mktemp("mixed"), tmp_path_factory.mktemp("text")
    write_shards(mixed, make_samples(140), 7)
    write_shards(text_only, [{k: v for k, v in s.items() if k != "jpg"} for s in make_samples(70)], 7)
    for root in (mixed, text_only):
        prepare(prepare_command(str(root), ratio="6,1,0"))
    return mixed, text_only


@pytest.fixture(scope="session")
def trainables(tmp_path_factory: pytest.TempPathFactory, datasets: tuple[Path, Path]) -> dict[str, Trainable]:
    """With untied and with tied embeddings; the deep one has layers for several, unequal pipeline stages;
    and those that cut images into tiles."""
    found = {}
    for name, layers in (("untied", 2), ("tied", 2), ("deep", 5), ("experts", 2)):
        root = tmp_path_factory.mktemp(name)
        tied = name in ("tied", "deep")
        save_llava(root / "hf", tied, num_layers=layers, experts=name == "experts")
        import_hf(root / "hf", root / "megatron", tp=1, pp=1)
        found[name] = Trainable(root / "megatron", root / "hf", *datasets)
    for kind in (kind for kind, family in FAMILIES.items() if family.read_tiles):
        root = tmp_path_factory.mktemp(kind)
        save_llava(root / "hf", tie_word_embeddings=False, kind=kind)
        import_hf(root / "hf", root / "megatron", tp=1, pp=1)
        found[kind] = Trainable(root / "megatron", root / "hf", *datasets, seq_length=192)
    return found
