"""The model and the data that the benchmarks train on, made from random numbers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from megatron_vlm.artifacts.dataset import prepare_command
from megatron_vlm.hf.convert import import_hf

# Both sides: AdamW as LLaVA's recipe has it, at a constant learning rate.
OPTIMIZER: dict[str, Any] = dict(lr=1e-4, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, clip_grad=1.0)
IGNORE = -100
IMAGES_ON_DISK = 336  # pixels of an edge; the processor has to make them smaller

_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
_TEXT = "the picture shows a small red house near an old tree with two people who look at some birds"


@dataclass(frozen=True)
class Workload:
    """Sizes of model, batches and runs. The defaults fit two CPU cores and some ten minutes."""

    vocab_size: int = 32000
    hidden_size: int = 512
    ffn_hidden_size: int = 1408
    num_layers: int = 4
    num_heads: int = 8
    num_key_value_heads: int = 4
    vision_hidden_size: int = 384
    vision_ffn_hidden_size: int = 1536
    vision_layers: int = 7  # the last one is not run: LLaVA takes the features before it
    vision_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    sequence: int = 512
    answer: int = 192  # trained tokens of a sample, at its end
    micro_batch: int = 2
    global_batch: int = 8
    warmup: int = 1  # iterations that aren't timed
    iterations: int = 4  # that are

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def save_model(workload: Workload, folder: Path) -> None:
    """Write ``hf/``, a LLaVA with tokenizer and image processor, and ``megatron/``, the same converted."""
    tokenizer = _make_tokenizer()
    config = llava_config(workload, tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder / "hf")
    edge = workload.image_size
    transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer,
        patch_size=workload.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "megatron", tp=2, pp=1)


def llava_config(workload: Workload, image_token_id: int) -> transformers.LlavaConfig:
    """Return a Llama behind a CLIP tower."""
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(
            vocab_size=workload.vocab_size,
            hidden_size=workload.hidden_size,
            intermediate_size=workload.ffn_hidden_size,
            num_hidden_layers=workload.num_layers,
            num_attention_heads=workload.num_heads,
            num_key_value_heads=workload.num_key_value_heads,
            max_position_embeddings=workload.sequence,
        ),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=workload.vision_hidden_size,
            intermediate_size=workload.vision_ffn_hidden_size,
            num_hidden_layers=workload.vision_layers,
            num_attention_heads=workload.vision_heads,
            image_size=workload.image_size,
            patch_size=workload.patch_size,
        ),
        image_token_index=image_token_id,
        tie_word_embeddings=False,
    )


def _make_tokenizer() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    tokenizer.train_from_iterator(
        [_TEXT],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def make_batches(workload: Workload, image_token_id: int, all_trained: bool) -> list[dict[str, Tensor]]:
    """Collated microbatches of every iteration, in the order of their global batches.

    Each sample is an image, a prompt and an answer, as long as every other.

    Returns:
        ``input_ids`` and ``labels`` int64 ``[b, s]``, labels not shifted yet, and ``pixels`` uint8
        ``[b, 3, H, W]``.
    """
    generator = torch.Generator().manual_seed(1)
    shape = workload.micro_batch, workload.sequence
    edge = workload.image_size
    batches = []
    for _ in range((workload.warmup + workload.iterations) * workload.global_batch // workload.micro_batch):
        ids = torch.randint(500, workload.vocab_size, shape, generator=generator)
        labels = ids.clone()
        if all_trained:  # image positions too, of any token: it is the work that counts
            labels[:, 0] = IGNORE
        else:
            labels[:, : -workload.answer] = IGNORE
        ids[:, 8 : 8 + workload.image_tokens] = image_token_id
        pixels = torch.randint(0, 256, (workload.micro_batch, 3, edge, edge), generator=generator)
        batches.append({"input_ids": ids, "labels": labels, "pixels": pixels.to(torch.uint8)})
    return batches


def save_dataset(workload: Workload, folder: Path) -> None:
    """Write and prepare webdataset shards of pictures, questions and answers of about one length."""
    random = np.random.default_rng(2)
    samples = 2 * (workload.warmup + workload.iterations) * workload.global_batch
    # A word takes about 4/3 tokens of this tokenizer.
    words = [
        3 * count // 4
        for count in (workload.sequence - workload.image_tokens - workload.answer, workload.answer)
    ]

    def parts(index: int) -> dict[str, bytes]:
        noise = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        size = (IMAGES_ON_DISK, IMAGES_ON_DISK)
        picture = io.BytesIO()
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(picture, "JPEG")
        question, answer = (" ".join(random.choice(_TEXT.split(), count)) for count in words)
        return {
            "jpg": picture.getvalue(),
            "json": json.dumps({"question": question}).encode(),
            "txt": answer.encode(),
        }

    save_shards(folder, 8, samples, parts)


def save_shards(folder: Path, shards: int, samples: int, parts: Callable[[int], dict[str, bytes]]) -> None:
    """Write and prepare webdataset shards, all of them for training.

    Args:
        parts: the files of a sample, by their extensions, from its index; asked for shard by shard.
    """
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for index in range(shard, samples, shards):
                for part, data in parts(index).items():
                    info = tarfile.TarInfo(f"{index:06d}.{part}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    command = prepare_command(str(folder), ratio="1,0,0")
    energon = Path(sys.executable).with_name("energon")
    command = command.replace("energon prepare", f"{energon} prepare --no-progress --num-workers 1", 1)
    subprocess.run(command, shell=True, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MiB; on a GPU, of its allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) / 1024
