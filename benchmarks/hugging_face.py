"""One rank of transformers' Trainer under DDP, on the same data; started by benchmarks.compare."""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch import Tensor

from benchmarks.workload import IGNORE, OPTIMIZER, Workload, make_batches, peak_memory


class FromMemory(torch.utils.data.Dataset):
    """Collated microbatches; the Trainer deals them to its ranks in turn."""

    def __init__(self, batches: list[dict[str, Tensor]], processor: Any) -> None:
        images = processor.image_processor
        self.mean = torch.tensor(images.image_mean).view(1, -1, 1, 1)
        self.std = torch.tensor(images.image_std).view(1, -1, 1, 1)
        self.rescale = images.rescale_factor
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = self.batches[index]
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "pixel_values": (batch["pixels"].float() * self.rescale - self.mean) / self.std,
            "attention_mask": torch.ones_like(batch["input_ids"]),
        }


class FromShards(torch.utils.data.Dataset):
    """The raw samples of webdataset shards; pictures stay encoded until a loader's worker takes them."""

    def __init__(self, folder: Path) -> None:
        samples: dict[str, dict[str, bytes]] = {}
        for shard in sorted(folder.glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    key, _, part = member.name.partition(".")
                    if content is not None:
                        samples.setdefault(key, {})[part] = content.read()
        self.samples = [samples[key] for key in sorted(samples)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        return self.samples[index]


class Collate:
    """Decode, tokenise and pad with transformers' processor; train the answers."""

    def __init__(self, processor: Any, sequence: int) -> None:
        self.processor = processor
        self.sequence = sequence

    def __call__(self, samples: list[dict[str, bytes]]) -> dict[str, Tensor]:
        images, texts, prompts = [], [], []
        for sample in samples:
            images.append(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
            question = {"type": "text", "text": json.loads(sample["json"])["question"]}
            user = {"role": "user", "content": [{"type": "image"}, question]}
            text = [{"type": "text", "text": sample["txt"].decode()}]
            turns = [user, {"role": "assistant", "content": text}]
            texts.append(self.processor.apply_chat_template(turns))
            prompts.append(self.processor.apply_chat_template([user], add_generation_prompt=True))
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        lengths = [len(self.processor.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name][:, : self.sequence]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
        image_tokens = int((batch["input_ids"][0] == self.processor.image_token_id).sum())
        for row, length in enumerate(lengths):  # the prompt alone has one placeholder for its image
            labels[row, : length + image_tokens - 1] = IGNORE
        return {**batch, "labels": labels}


class Timed(transformers.Trainer):
    """The Trainer as it is, with the time of each update and the tokens that went in."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.tokens = 0
        self.ends: list[tuple[float, int]] = []

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *rest)

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        if "loss" in logs:  # once an update, after it
            self.ends.append((time.perf_counter(), self.tokens))
        super().log(logs, *rest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--workload", type=json.loads, required=True)
    parser.add_argument("--all-trained", action="store_true")
    parser.add_argument("--loader", action="store_true")
    args = parser.parse_args()
    workload = Workload(**args.workload)
    cuda = torch.cuda.is_available()
    processor = transformers.AutoProcessor.from_pretrained(args.folder / "hf", backend="pil")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        args.folder / "hf", attn_implementation="sdpa", dtype=torch.float32
    )
    model.model.vision_tower.requires_grad_(False)

    ranks = int(os.environ["WORLD_SIZE"])
    dataset: torch.utils.data.Dataset
    if args.loader:
        dataset = FromShards(args.folder / "data")
    else:
        dataset = FromMemory(make_batches(workload, processor.image_token_id, args.all_trained), processor)
    trainer = Timed(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(args.folder / "hugging_face"),
            max_steps=workload.warmup + workload.iterations,
            per_device_train_batch_size=workload.micro_batch if args.loader else 1,
            gradient_accumulation_steps=workload.global_batch // workload.micro_batch // ranks,
            learning_rate=OPTIMIZER["lr"],
            lr_scheduler_type="constant",
            weight_decay=OPTIMIZER["weight_decay"],
            adam_beta1=OPTIMIZER["beta1"],
            adam_beta2=OPTIMIZER["beta2"],
            adam_epsilon=OPTIMIZER["eps"],
            max_grad_norm=OPTIMIZER["clip_grad"],
            optim="adamw_torch_fused",
            bf16=cuda,
            use_cpu=not cuda,
            ddp_backend="nccl" if cuda else "gloo",
            ddp_find_unused_parameters=False,
            dataloader_num_workers=1 if args.loader else 0,
            dataloader_pin_memory=cuda,
            train_sampling_strategy="random" if args.loader else "sequential",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        data_collator=Collate(processor, workload.sequence) if args.loader else lambda batches: batches[0],
    )
    start = time.perf_counter()
    trainer.train()
    ends = [(start, 0), *trainer.ends]
    result = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": [b[0] - a[0] for a, b in pairwise(ends)],
        "tokens": [b[1] - a[1] for a, b in pairwise(ends)],
        "peak_mib": peak_memory(),
    }
    args.result.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(result))
    # Not through the interpreter's end: DDP's reducer destroys its gloo group with Python's lock held, and
    # waits there for a thread of gloo's that may be waiting for this lock.
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
