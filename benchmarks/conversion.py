"""Conversion of a 7B-size LLaVA beside ``cp`` of the same bytes: time, and peak anonymous memory.

    python -m benchmarks.conversion --folder <scratch>

Makes a LLaVA-1.5 of random weights (14.1 GB in bfloat16; ``--layers 2`` makes one of 1.8 GB), copies
it, converts it to Megatron and back, and builds one anew from its language model and tower. Files are
flushed and dropped from the page cache before each step, and each step ends when what it wrote is on the
disk. Needs three times the model's size; removes what it made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_vlm.config.model import ModelConfig
from megatron_vlm.hf.folder import TensorInfo, WeightsWriter, split_into_shards, write_index
from megatron_vlm.hf.mapping import build_table, detect_prefixes

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = CHECKOUT / "scripts" / "convert"
# https://huggingface.co/llava-hf/llava-1.5-7b-hf/blob/main/config.json, written out
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
SHARD_BYTES = 5 * 10**9


def make_llava(folder: Path, layers: int = 32, hidden_size: int = 4096, vision_layers: int = 24) -> int:
    """Write a LLaVA-1.5 of random bfloat16 weights, sharded; returns the bytes of its weights."""
    text = dict(CONFIG["text_config"], num_hidden_layers=layers, hidden_size=hidden_size)
    vision = dict(CONFIG["vision_config"], num_hidden_layers=vision_layers)
    config = dict(CONFIG, text_config=text, vision_config=vision)
    model = ModelConfig.from_hf(config)
    prefixes = detect_prefixes(["vision_tower.vision_model.x"])  # the hub's names
    table = build_table(model, model.language.vocab_size, prefixes)
    tensors = [pair for row in table.rows for pair in row.hf]
    tensors += [pair for carry in table.carries if not carry.optional for pair in carry.hf]
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in tensors]
    files = split_into_shards(infos, SHARD_BYTES)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    # Random numbers cost more time than anything else here, so each tensor is a window on the same.
    largest = max(info.nbytes for info in infos) // 2
    numbers = torch.randn(largest + len(infos), generator=torch.Generator().manual_seed(0)).bfloat16()
    with WeightsWriter(folder, files, {file: {"format": "pt"} for file in files}) as writer:
        for number, info in enumerate(infos):
            window = numbers[number : number + info.nbytes // 2]
            writer.write(info.name, window.view(info.shape))
    write_index(folder, files)
    return sum(info.nbytes for info in infos)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, without which no LLaVA is built from a model."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(words[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def measure(command: list[str], target: Path) -> tuple[float, int]:
    """Run a command that writes ``target``; seconds until it is on the disk, and peak RssAnon in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command}: ended with {process.returncode}")
    _for_each_file(target, os.fsync)
    return time.perf_counter() - start, peak


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process, in bytes; 0 when it has ended. Pages of mapped files don't count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def drop_from_cache(folder: Path) -> None:
    """Let the next reader of these files find them on the disk, not in memory."""
    _for_each_file(folder, lambda file: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))


def _for_each_file(folder: Path, function: Callable[[int], None]) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                function(descriptor)
            finally:
                os.close(descriptor)


def main() -> None:
    """Make the model, measure each step, and print a row for each."""
    parser = argparse.ArgumentParser(
        description="Conversion beside cp of the same bytes.", allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch; what is made in it is removed")
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default: %(default)s)")
    args = parser.parse_args()
    source, megatron, copy = (args.folder / name for name in ("hf", "megatron", "copy"))
    shutil.rmtree(source, ignore_errors=True)
    size = make_llava(source, args.layers)
    print(f"{size / 1e9:.2f} GB of weights, largest tensor {32064 * 4096 * 2 / 2**20:.0f} MiB", flush=True)

    def step(name: str, command: list[str], inputs: Path, output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        drop_from_cache(inputs)
        seconds, peak = measure(command, output)
        print(
            f"{name:24} {seconds:6.1f} s {size / seconds / 1e9:5.2f} GB/s {peak / 2**20:6.0f} MiB", flush=True
        )

    to_megatron = [sys.executable, f"{SCRIPTS}/convert_hf_to_megatron.py", f"--hf-dir={source}", "--tp=2"]
    to_megatron += [f"--megatron-dir={megatron}"]
    to_hf = [sys.executable, f"{SCRIPTS}/convert_megatron_to_hf.py", f"--hf-dir={copy}"]
    to_hf += [f"--megatron-dir={megatron}"]
    build = [sys.executable, f"{SCRIPTS}/build_llava_jp.py", f"--save-dir={copy}"]
    build += [f"--text-model={source}", f"--vision-model={source}", "--vocab-size-padding"]
    try:
        step("cp", ["cp", "-r", str(source), str(copy)], source, copy)
        step("to Megatron", to_megatron, source, megatron)
        step("to Megatron, --verify", [*to_megatron, "--verify"], source, megatron)
        step("to Hugging Face", to_hf, megatron, copy)
        step("to Hugging Face, --verify", [*to_hf, "--verify"], megatron, copy)
        write_tokenizer(source)
        step("build", build, source, copy)
        step("cp", ["cp", "-r", str(source), str(copy)], source, copy)
    finally:
        for folder in (source, megatron, copy):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
