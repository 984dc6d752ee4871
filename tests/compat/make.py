"""Make the old things of this folder, with the code of the commit that they are of.

    python -m tests.compat.make 928f091

writes ``<commit>.tar.xz`` and ``<commit>.json`` beside this file; README.md says what is in them. All is
computed on the CPU in one thread per process, by the scripts of that commit as a user starts them, in a
folder that is the same everywhere, since checkpoints and configs name it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.same_numbers import CHECKOUT, Tree, copy_of_commit, hash_hf, read_metrics

HERE = Path(__file__).parent
WORK = Path("/tmp/megatron-vlm-compat")
HALF, ALL = (
    5,
    10,
)  # iterations of a run: those that the stored checkpoint has, and those of the recorded losses
COMMON = (
    *("-g", "2", "--tp", "2", "--device", "cpu", "--fp32", "--seq-length", "80", "--lang", "en"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--data-workers", "2"),
    *("--shuffle-buffer-size", "10", "--lr", "2e-3", "--lr-warmup-iters", "2", "--lr-decay-iters", str(ALL)),
    *("--save-optim", "--eval-interval", str(HALF), "--eval-iters", "1", "--name", "run"),
)
# Of each run, what it does otherwise.
RUNS: dict[str, tuple[str, ...]] = {
    "full": ("--stage", "2", "--train-vision"),
    "lora": ("--lora-rank", "2", "--lora-dropout", "0.1"),
}
KEPT = ("hf", "data", "adapter", *RUNS)


def make_model_and_data(folder: str) -> None:
    """Make a LLaVA as small as can be cut for TP 2, and questions about pictures, by that tree's helpers."""
    from pathlib import Path

    import torch
    import transformers

    from tests.data.tiny_data import jpeg, make_processor, write_shards

    processor = make_processor("llava")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=20, patch_size=4),
        text_config=transformers.LlamaConfig(
            **sizes, vocab_size=424, num_key_value_heads=2, initializer_range=0.1
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(Path(folder) / "hf")
    processor.save_pretrained(Path(folder) / "hf")
    samples: list[dict[str, bytes | str]] = []
    for i in range(36):
        sample: dict[str, bytes | str] = {"key": f"{i:05d}", "json": b'{"question": "What is it?"}'}
        sample["txt"] = f"The answer is {i}.".encode()
        if i % 4 != 3:
            sample["jpg"] = jpeg(i)
        samples.append(sample)
    write_shards(Path(folder) / "data", samples, 6)


def main() -> None:
    """Make all in :data:`WORK`, store it, and record what the commit's code computes from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit")
    args = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    tree = copy_of_commit(args.commit, WORK / "tree")
    tree.call(make_model_and_data, str(WORK))
    prepare()
    convert(tree, "hf_to_megatron", "--hf-dir", WORK / "hf", "--megatron-dir", WORK / "megatron")
    for name in RUNS:
        train(tree, name, HALF)
    convert(
        tree,
        "megatron_to_hf",
        "--megatron-dir",
        WORK / "lora/run",
        "--hf-dir",
        WORK / "adapter",
        "--adapter-only",
    )
    scrub()
    archive = HERE / f"{args.commit}.tar.xz"
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name in KEPT:
            tar.add(WORK / name, name, filter=without_owner)

    recorded: dict[str, Any] = {
        "versions": {
            name: version(name) for name in ("torch", "megatron-core", "megatron-energon", "transformers")
        },
        "status": json.loads(tree.run("scripts/train/status.py", WORK / "full/run", "--json").stdout),
        "flags": flags_by_config(tree),
    }
    convert(tree, "megatron_to_hf", "--megatron-dir", WORK / "full/run", "--hf-dir", WORK / "full-hf")
    recorded["full as Hugging Face"] = hash_hf(WORK / "full-hf")
    recorded["adapter"] = hash_hf(WORK / "adapter")
    for name in RUNS:  # the stored runs go on
        train(tree, name, ALL)
        recorded[name] = read_metrics(WORK / name / "run")
    train(
        tree, "lora", 2, "--lora-load-dir", WORK / "adapter", "--name", "from-adapter", "--lora-dropout", "0"
    )
    recorded["from the adapter"] = read_metrics(WORK / "lora/from-adapter")
    text = json.dumps(recorded, indent=1, ensure_ascii=False)
    (HERE / f"{args.commit}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{archive}: {archive.stat().st_size:,} bytes")


def prepare() -> None:
    """Let energon index the data, as the README of that time says."""
    field_map = {"image": "jpg", "context": "json[question]", "answers": "txt"}
    command = [Path(sys.executable).with_name("energon"), "prepare", "--non-interactive", "--no-progress"]
    command += ["--num-workers", "1", "--split-ratio", "5,1,0", "--sample-type", "VQASample"]
    subprocess.run([*command, "--field-map", json.dumps(field_map), WORK / "data"], check=True)


def flags_of(folder: Path, name: str, iterations: int, *more: object) -> list[str]:
    """Return the flags of a run with which it begins in ``folder``, or goes on."""
    return [
        *COMMON,
        *("--megatron-load-dir", str(folder / "megatron"), "--tokenizer-load-dir", str(folder / "hf")),
        *("--data-path", str(folder / "data"), "--save-dir", str(folder / name)),
        *("--train-iters", str(iterations), *RUNS[name], *map(str, more)),
    ]


def train(tree: Tree, name: str, iterations: int, *more: object) -> None:
    tree.run("scripts/train/run.py", *flags_of(WORK, name, iterations, *more))


def flags_by_config(tree: Tree) -> list[str]:
    """Return the flags that the ranks get when a run's ``config.json`` is all that is given."""
    script = "scripts/train/run.py"
    shown = tree.run(script, "--config", WORK / "full/run/config.json", "-g", "2", "--dry-run").stdout
    return flags_of_ranks(shown, WORK)


def flags_of_ranks(shown: str, folder: Path) -> list[str]:
    """Return what stands behind the module that ranks run, in the command that run.py shows."""
    words = shown.strip().replace(str(folder), "{folder}").split()
    return words[words.index("--") + 2 :]


def convert(tree: Tree, direction: str, *flags: object) -> None:
    tree.run(f"scripts/convert/convert_{direction}.py", *flags)


def scrub() -> None:
    """Name no interpreter of this machine in what is stored."""
    for path in (path for name in RUNS for path in (WORK / name / "run").rglob("*") if path.is_file()):
        data = path.read_bytes()
        scrubbed = data.replace(str(Path(sys.executable)).encode(), b"/opt/venv/bin/python")
        assert str(CHECKOUT).encode() not in scrubbed, path
        if scrubbed != data:
            assert path.suffix in (".json", ".log"), path
            path.write_bytes(scrubbed)


def without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry that names nobody."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    main()
