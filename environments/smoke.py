"""Train a tiny random LLaVA for one iteration on two CPU ranks: what an image's test section runs.

    python environments/smoke.py

Imports every module of the package first. Takes some 20 seconds on two cores, and writes to a temporary
folder only.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import pkgutil
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import megatron_vlm
from megatron_vlm.artifacts.dataset import prepare_command

ROOT = Path(__file__).resolve().parents[1]

IMAGE_SIZE = 16
SAMPLES = 8


def import_everything() -> None:
    """Import all modules of the package; those that start something do it under ``__main__`` only."""
    for module in pkgutil.walk_packages(megatron_vlm.__path__, "megatron_vlm."):
        importlib.import_module(module.name)


def make_model(folder: Path) -> None:
    """Config, tokenizer and image processor of a LLaVA of two layers; ``--init`` makes the weights."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["What is this?"], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=2 * math.ceil(len(tokenizer) / 2),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    ).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def make_dataset(folder: Path) -> None:
    """One shard of single-coloured pictures, prepared."""
    from PIL import Image

    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for index in range(SAMPLES):
            picture = io.BytesIO()
            Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (30 * index, 0, 0)).save(picture, "JPEG")
            question = json.dumps({"question": "What is this?"}).encode()
            for part, data in ("jpg", picture.getvalue()), ("txt", b"Red"), ("json", question):
                info = tarfile.TarInfo(f"{index:06d}.{part}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    run(*shlex.split(prepare_command(str(folder), ratio="1,0,0")))


def run(*command: str) -> None:
    """Run a command; this script ends where one fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"smoke.py: exit code {done.returncode} from: {shlex.join(command)}")


def main() -> None:
    import_everything()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_dataset(folder / "data")
        run(
            *(sys.executable, str(ROOT / "scripts/train/run.py"), "-g", "2", "--tp", "2", "--device", "cpu"),
            *("--init", "--tokenizer-load-dir", f"{folder}/model", "--data-path", f"{folder}/data"),
            *("--save-dir", f"{folder}/runs", "--name", "smoke", "--train-iters", "1", "--fp32"),
            *("--seq-length", "256", "--micro-batch-size", "4", "--global-batch-size", "8", "--lang", "en"),
        )
        metrics = (folder / "runs/smoke/metrics.jsonl").read_text().splitlines()
        loss = json.loads(metrics[-1])["loss"]
    if not math.isfinite(loss):
        sys.exit(f"smoke.py: the loss is {loss}")
    print(f"smoke.py: one iteration on two CPU ranks, loss {loss:.4f}")


if __name__ == "__main__":
    main()
