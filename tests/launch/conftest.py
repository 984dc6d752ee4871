"""A folder with all that a run needs, as far as the launcher looks: small files, one tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import HF_FOLDER, write_manifest
from megatron_vlm.hf.formats.native import NativeWriter
from megatron_vlm.hf.tables.ops import Chunk

TEXT = {"model_type": "llama", "num_attention_heads": 6, "hidden_size": 96, "intermediate_size": 96}
CONFIG = {"model_type": "llava", "text_config": TEXT, "image_token_index": 7}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """``ckpt`` and ``data`` for CLIP ViT-L/14 at 336 pixels, which makes 576 tokens of an image."""
    write_checkpoint(tmp_path / "ckpt")
    write_dataset(tmp_path / "data")
    return tmp_path


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first ``nvidia-smi`` in PATH: a script that the test writes, and may remove."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return tool


def write_checkpoint(folder: Path, config: dict[str, Any] = CONFIG, **manifest: Any) -> None:
    hf = folder / HF_FOLDER
    hf.mkdir(parents=True)
    writer = NativeWriter(folder)
    writer.write("weight", torch.zeros(100), [Chunk((0,), (100,))])
    writer.close()
    write_json(hf / "config.json", config)
    write_json(hf / "tokenizer.json", {"added_tokens": [{"id": 7, "content": "<image>"}], "model": {}})
    write_json(hf / "tokenizer_config.json", {"eos_token": "</s>"})
    size = {"shortest_edge": 336}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": 336}
    write_json(hf / "preprocessor_config.json", processor)
    found = {"format": "torch_dist", "iteration": 0, "has_optimizer": False, "layout": {}, "tensors": {}}
    write_manifest(folder, {**found, "model": ModelConfig.from_hf(config).to_dict(), **manifest})


def write_dataset(folder: Path, samples: int = 9) -> None:
    (folder / ".nv-meta").mkdir(parents=True)
    write_shard(folder / "0.tar", samples)
    (folder / ".nv-meta" / "index.sqlite").write_bytes(b"SQLite format 3\0")
    write_json(folder / ".nv-meta" / ".info.json", {"shard_counts": {"0.tar": samples}})
    split = "split_parts:\n  train:\n  - 0.tar\n  val: []\n  test: []\nexclude: []\n"
    (folder / ".nv-meta" / "split.yaml").write_text(split)


def write_shard(path: Path, samples: int) -> None:
    """A file of 100 bytes, and the index that tells where its samples begin and end."""
    path.write_bytes(b"x" * 100)
    path.with_name(f"{path.name}.idx").write_bytes(struct.pack(f"<{samples + 1}Q", *bytes(samples), 100))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
