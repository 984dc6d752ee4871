"""Conversion of a 7B-size LLaVA beside ``cp`` of the same bytes: time, and peak anonymous memory.

    python -m benchmarks.conversion --folder <scratch>

Makes a LLaVA-1.5 of random weights (14.1 GB in bfloat16; ``--layers 2`` makes one of 1.8 GB), converts it to
Megatron and back, builds one anew from its language model and tower, and copies it before and after each
step, since other users of a disk come and go. Files are flushed and dropped from the page cache before each
step, and each step ends when what it wrote is on the disk. Needs three times the model's size; removes what
it made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.hf.formats.folder import TensorInfo, WeightsWriter, split_into_shards, write_index
from megatron_vlm.hf.tables.model import build_table
from megatron_vlm.hf.tables.table import detect_prefixes

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


def measure(command: list[str], target: Path) -> tuple[float, int, float]:
    """Run a command that writes ``target``.

    Returns:
        Seconds until it is on the disk, peak RssAnon in bytes, seconds of processor time.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command}: ended with {process.returncode}")
    _for_each_file(target, os.fsync)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, peak, busy


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
    """Make the model in a folder of its own, measure each step, print a row for each, remove it."""
    parser = argparse.ArgumentParser(
        description="Conversion beside cp of the same bytes.", allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="scratch, on the disk to measure")
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=args.folder) as folder:
        compare(Path(folder), args.layers)


def compare(folder: Path, layers: int) -> None:
    """Measure each step in an empty folder.

    Args:
        layers: of the language model.
    """
    source, megatron, back, copied = (folder / name for name in ("hf", "megatron", "back", "copy"))
    size = make_llava(source, layers)
    print(f"{size / 1e9:.2f} GB of weights, largest tensor {32064 * 4096 * 2 / 2**20:.0f} MiB", flush=True)

    def step(name: str, command: list[str], inputs: Path, output: Path) -> float:
        shutil.rmtree(output, ignore_errors=True)
        drop_from_cache(inputs)
        seconds, peak, busy = measure(command, output)
        print(
            f"{name:24} {seconds:6.1f} s {size / seconds / 1e9:5.2f} GB/s {busy:6.1f} s of CPU "
            f"{peak / 2**20:6.0f} MiB",
            flush=True,
        )
        return seconds

    def copy() -> float:
        return step("cp", ["cp", "-r", str(source), str(copied)], source, copied)

    to_megatron = [sys.executable, f"{SCRIPTS}/convert_hf_to_megatron.py", f"--hf-dir={source}", "--tp=2"]
    to_megatron += [f"--megatron-dir={megatron}"]
    to_hf = [sys.executable, f"{SCRIPTS}/convert_megatron_to_hf.py", f"--hf-dir={back}"]
    to_hf += [f"--megatron-dir={megatron}"]
    build = [sys.executable, f"{SCRIPTS}/build_llava_jp.py", f"--save-dir={back}"]
    build += [f"--text-model={source}", f"--vision-model={source}", "--vocab-size-padding"]
    before = copy()
    for name, command, inputs, output in (
        ("to Megatron", to_megatron, source, megatron),
        ("to Megatron, --verify", [*to_megatron, "--verify"], source, megatron),
        ("to Hugging Face", to_hf, megatron, back),
        ("to Hugging Face, --verify", [*to_hf, "--verify"], megatron, back),
        ("build", build, source, back),
    ):
        if command is build:
            write_tokenizer(source)
        shutil.rmtree(copied)
        seconds = step(name, command, inputs, output)
        if output == back:
            shutil.rmtree(back)
        after = copy()
        print(f"{name:24} {(before + after) / 2 / seconds:6.2f} x the speed of cp", flush=True)
        before = after


if __name__ == "__main__":
    main()
