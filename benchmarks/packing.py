"""This trainer on padded, grouped and packed micro batches: ``python -m benchmarks.packing``.

The samples' lengths are spread as in LLaVA's instruction data: most are an image and a short text, some a
long one, and one in sixteen is a long text without an image (665,298 samples, 40,688 of ShareGPT among them;
https://arxiv.org/abs/2310.03744, table 7).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.workload import Workload, save_model, save_shards
from megatron_vlm import parallel
from megatron_vlm.config.run import RunConfig
from megatron_vlm.training.run import run

WORKLOAD = Workload(
    vocab_size=8000,
    hidden_size=256,
    ffn_hidden_size=704,
    vision_hidden_size=192,
    vision_ffn_hidden_size=768,
    vision_layers=3,
    vision_heads=4,
    image_size=128,
    sequence=1024,
)
SAMPLES = 1200
TIMED = slice(1, None)  # the first iteration forks the loader's workers
# LLaVA's stage 2 has micro batches of 16 samples. Packed, 4 sequences are about as many.
PADDED = ("--micro-batch-size", "16", "--global-batch-size", "32")
RUNS = {
    "padded": PADDED,
    "by length": (*PADDED, "--group-by-length"),
    "packed": ("--micro-batch-size", "4", "--global-batch-size", "8", "--packing"),
}


def sample_lengths(samples: int) -> list[tuple[bool, int]]:
    """Return whether each sample has an image, and the number of words of its text."""
    random = np.random.default_rng(0)
    lengths = []
    for _ in range(samples):
        has_image = bool(random.random() > 1 / 16)
        median, spread = (90, 0.8) if has_image else (450, 0.7)
        lengths.append((has_image, int(np.clip(random.lognormal(np.log(median), spread), 8, 600))))
    return lengths


def save_dataset(folder: Path) -> None:
    """Write and prepare shards of questions and answers."""
    picture = io.BytesIO()
    Image.effect_noise((WORKLOAD.image_size,) * 2, 64).convert("RGB").save(picture, "JPEG")
    lengths = sample_lengths(SAMPLES)

    def parts(index: int) -> dict[str, bytes]:
        has_image, words = lengths[index]
        parts = {"jpg": picture.getvalue()} if has_image else {}
        parts["json"] = json.dumps({"question": "tree " * (words // 2)}).encode()
        parts["txt"] = ("bird " * (words - words // 2)).encode()
        return parts

    save_shards(folder, 4, SAMPLES, parts)


def train(name: str, folder: Path, iterations: int) -> None:
    """One run, in this process."""
    argv = ["--megatron-load-dir", str(folder / "megatron"), "--tokenizer-load-dir", str(folder / "hf")]
    argv += ["--data-path", str(folder / "data"), "--save-dir", str(folder / "runs"), "--name", name]
    argv += ["--seq-length", str(WORKLOAD.sequence), "--train-iters", str(iterations), "--stage", "2"]
    argv += ["--lang", "en", "--fp32", "--no-save", "--restart", "--data-workers", "1", *RUNS[name]]
    argv += ["--packing-buffer-size", "300"] if name != "padded" else []
    run(RunConfig.from_flags(argv), parallel.initialize())
    parallel.finalize()


def measure(name: str, folder: Path, iterations: int) -> dict[str, float]:
    """One run, in a process of its own: tokens/s, and the shares of padding and of waiting for data."""
    command = [sys.executable, "-m", "benchmarks.packing", "--run", name, "--folder", str(folder)]
    ended = subprocess.run([*command, "--iterations", str(iterations)], capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"error: {name} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    log = folder / "runs" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()][TIMED]
    seconds = sum(line["iteration_seconds"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    return {
        "tokens_per_second": tokens / seconds,
        "padding": sum(line["padding"] * line["tokens"] for line in lines) / tokens,
        "samples_per_sequence": statistics.mean(line["samples_per_sequence"] for line in lines),
        "waiting": sum(line["data_seconds"] for line in lines) / seconds,
    }


def main() -> None:
    """Measure all runs in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--repetitions", type=int, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=6, help="of each run (default: %(default)s)")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        train(args.run, args.folder, args.iterations)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_model(WORKLOAD, folder)
        save_dataset(folder / "data")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
        for turn in range(args.repetitions):
            for name in RUNS:
                start = time.perf_counter()
                found[name].append(measure(name, folder, args.iterations))
                speed = found[name][-1]["tokens_per_second"]
                took = time.perf_counter() - start
                print(
                    f"{turn + 1}/{args.repetitions} {name}: {speed:.0f} tokens/s ({took:.0f} s)", flush=True
                )
    print("\n| | tokens/s | ratio | padding | samples per sequence | waiting for data |")
    print("|---|---|---|---|---|---|")
    for name, turns in found.items():
        row = {what: statistics.median(turn[what] for turn in turns) for what in turns[0]}
        # Of the turns that ran one after the other, so that a load that comes and goes cancels.
        ratio = statistics.median(
            one["tokens_per_second"] / other["tokens_per_second"]
            for one, other in zip(turns, found["padded"], strict=True)
        )
        print(
            f"| {name} | {row['tokens_per_second']:.0f} | {ratio:.2f} | {row['padding']:.1%} "
            f"| {row['samples_per_sequence']:.1f} | {row['waiting']:.1%} |"
        )


if __name__ == "__main__":
    main()
