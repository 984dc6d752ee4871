"""Tiny tokenizers, image processors, pictures and shards for the tests of the data pipeline."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Callable

import numpy as np
import tokenizers
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_vlm.data.batch import Microbatch
from megatron_vlm.data.loading.loader import TrainLoader
from megatron_vlm.data.prepare.workers import call_forked
from megatron_vlm.data.templates import Turn

MICRO_BATCH = 3
SCRIPT = Path(__file__).parents[2] / "scripts/data/prepare.py"
# As llava-hf/llava-1.5-7b-hf has it: content in parts, no end token after an answer.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{# Render all images first #}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As Qwen2's tokenizer has it: content as a string, a default system turn, a newline after the end token.
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2's: strips what it is given, writes bos_token itself.
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_CORPUS = [
    "USER: What is in this picture? ASSISTANT: The answer is a cat and two dogs.",
    "A chat between a curious user and an artificial intelligence assistant, who gives helpful answers.",
    "この画像には何が写っていますか。これは猫と犬の会話です。質問に丁寧に答えます。",
    "system user assistant You are a helpful assistant. Describe the image. 0 1 2 3 4 5 6 7 8 9",
] * 4


def llama_tokenizer() -> Any:
    """Metaspace BPE with byte fallback and a bos_token that is added, as Llama's."""
    specials = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    raw.train_from_iterator(_CORPUS, trainer)
    model = json.loads(raw.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.add_tokens([tokenizers.AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def qwen_tokenizer() -> Any:
    """Byte-level BPE without a bos_token, as Qwen2's."""
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(_CORPUS, trainer)
    model = json.loads(raw.to_str())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<image>")]
    )
    return tokenizer


def _clip_processor() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})


def _siglip_processor() -> Any:
    return SiglipImageProcessorPil(size={"height": 22, "width": 22})


# name: tokenizer, image processor, chat template, tower, number of tokens beside the patches
FOLDERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str | None, dict[str, Any], int]] = {
    "llava": (llama_tokenizer, _clip_processor, LLAVA_TEMPLATE, {"image_size": 20, "patch_size": 4}, 1),
    "qwen": (qwen_tokenizer, _siglip_processor, CHATML_TEMPLATE, {"image_size": 22, "patch_size": 4}, 0),
    "llama2": (llama_tokenizer, _clip_processor, LLAMA2_TEMPLATE, {"image_size": 20, "patch_size": 4}, 1),
    "bare": (llama_tokenizer, _clip_processor, None, {"image_size": 20, "patch_size": 4}, 1),
}


def make_processor(name: str) -> transformers.LlavaProcessor:
    """The processor of one of :data:`FOLDERS`."""
    make_tokenizer, make_images, chat_template, tower, extra = FOLDERS[name]
    return transformers.LlavaProcessor(
        make_images(),
        make_tokenizer(),
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default" if extra else "full",
        num_additional_image_tokens=extra,
        chat_template=chat_template,
    )


def jpeg(seed: int, width: int = 31, height: int = 24) -> bytes:
    """A random but smooth picture."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def asked(question: str, answer: str) -> list[Turn]:
    """One question and its answer."""
    return [Turn("user", question), Turn("assistant", answer)]


def content(microbatch: Microbatch) -> tuple[Any, ...]:
    """Everything in a microbatch, comparable and exact; its sources, counts and worker come last."""
    media = microbatch.media.values()
    tensors = [microbatch.input_ids, microbatch.labels]
    tensors += [tensor for own in media for tensor in (*own.tensors.values(), own.sizes)]
    arrays = tuple((tuple(t.shape), t.numpy().tobytes()) for t in tensors)
    samples = (microbatch.lengths.tolist(), microbatch.keys, microbatch.sources)
    return (*arrays, *microbatch.media, *samples, microbatch.counts, microbatch.worker)


def take(loader: TrainLoader, count: int) -> list[tuple[Any, ...]]:
    return [content(next(loader)) for _ in range(count)]


def write_shards(root: Path, samples: list[dict[str, bytes | str]], shards: int) -> None:
    """Write samples (``key`` and one entry per file) to ``shards`` tars of about the same length."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(root / f"{shard:06d}.tar", "w") as tar:
            for sample in samples[shard * len(samples) // shards : (shard + 1) * len(samples) // shards]:
                for part, data in sample.items():
                    if isinstance(data, bytes):
                        info = tarfile.TarInfo(f"{sample['key']}.{part}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))


def prepare(command: str) -> None:
    """Run an ``energon prepare`` command line, in a process that has imported energon already."""
    program, *argv = shlex.split(command)
    assert (program, argv[0]) == ("energon", "prepare")
    call_forked(_energon, [argv[0], "--no-progress", "--num-workers", "1", *argv[1:]])


def _energon(argv: list[str]) -> None:
    from megatron.energon.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()):
        main.main(argv, standalone_mode=False)


def prepare_as_a_user(command: str) -> None:
    """Prepare a dataset in a shell, with this environment's energon."""
    energon = Path(sys.executable).with_name("energon")
    command = command.replace("energon prepare", f"{energon} prepare --no-progress --num-workers 1", 1)
    subprocess.run(command, shell=True, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def make_samples(count: int) -> list[dict[str, bytes | str]]:
    """Question-answer samples in the layout that users have: some without an image, some damaged."""
    samples: list[dict[str, bytes | str]] = []
    for i in range(count):
        sample: dict[str, bytes | str] = {"key": f"{i:05d}"}
        if i % 7 == 3:
            sample["key"] = f"{i:05d}-noimage"
        elif i % 7 != 5:
            sample["jpg"] = b"not a picture" if i % 29 == 4 else jpeg(i, 20 + i % 9, 20 + i % 7)
        question = "" if i % 11 == 6 else f"What is in picture {i}?"
        sample["json"] = json.dumps({"question": question, "id": i}).encode()
        sample["txt"] = ("" if i % 13 == 8 else f"The answer is {i}. " * (1 + i % 3)).encode()
        samples.append(sample)
    return samples


def make_conversations(count: int) -> list[dict[str, bytes | str]]:
    """Conversations of one to three rounds with no image, one or two; some can't be used."""
    samples: list[dict[str, bytes | str]] = []
    for i in range(count):
        names = ["0.jpg", "1.png"][: i % 3]
        messages: list[dict[str, Any]] = []
        if i % 4 == 1:
            messages.append({"role": "system", "content": "Be brief."})
        for turn in range(1 + i % 3):
            marker = "<image>\n" * len(names) * (turn == 0)
            messages.append({"role": "user", "content": f"{marker}Question {turn} of {i}?"})
            answer = {"role": "assistant", "content": f"Answer {turn} of {i}."}
            messages.append({**answer, "loss": False} if i % 5 == 2 and turn == 0 and i % 3 else answer)
        sample: dict[str, bytes | str] = {"key": f"{i:05d}"}
        for number, name in enumerate(names):
            sample[name] = jpeg(i + number)
        if i % 10 == 7:  # one image too many
            messages[-2]["content"] += " <image>"
        sample["json"] = json.dumps({"id": i, "messages": messages, "images": names}).encode()
        samples.append(sample)
    return samples


def picture(seed: int, form: str = "JPEG", width: int = 31, mode: str = "RGB") -> bytes:
    """Return a picture as :func:`jpeg` does, in other forms."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed, width))).convert(mode).save(buffer, form)
    return buffer.getvalue()


def llava(number: int, image: Any, **more: Any) -> dict[str, Any]:
    """A record of LLaVA's JSON."""
    turns = [
        {"from": "human", "value": f"<image>\nQuestion {number}?" if image else f"Question {number}?"},
        {"from": "gpt", "value": f"答え {number}"},
    ]
    return {"id": str(number), "image": image, "conversations": turns, **more}


def samples_in(folder: Path) -> list[dict[str, Any]]:
    """A prepared folder's: the JSON, the key, the shard and the images' bytes. Read with tarfile alone."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                files.setdefault(key, {})[part] = tar.extractfile(member).read()  # type: ignore[union-attr]
        for key, parts in files.items():
            value = json.loads(parts.pop("json"))
            assert sorted(parts) == sorted(value["images"])
            data = [parts[name] for name in value["images"]]
            found.append({**value, "key": key, "shard": shard.name, "data": data})
    return found


def samples_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a dataset's samples, by the ids they had."""
    samples = samples_in(folder)
    by_id = {str(sample["id"]): sample for sample in samples}
    assert len(by_id) == len(samples)
    return by_id


def hf_folder(name: str, root: Path) -> Path:
    """A Hugging Face LLaVA folder (without weights) as transformers writes it: one of ``FOLDERS``."""
    _, _, _, tower, extra = FOLDERS[name]
    processor = make_processor(name)
    tower_class = transformers.CLIPVisionConfig if extra else transformers.SiglipVisionConfig
    config = transformers.LlavaConfig(
        vision_config=tower_class(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **tower),
        text_config=transformers.LlamaConfig(vocab_size=512, hidden_size=32, num_attention_heads=4),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
    )
    config.save_pretrained(root / name)
    processor.save_pretrained(root / name)
    return root / name
