"""Ask a Hugging Face LLaVA about the held-out digits, with transformers alone, and print its accuracy."""

import argparse
import io
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


@dataclass
class Sample:
    key: str
    image: Image.Image
    question: str
    answer: str


def read_shards(directory: Path, pattern: str) -> list[Sample]:
    """The samples of webdataset shards: for each key a .jpg, a .txt and a .json in the tar."""
    samples = []
    for shard in sorted(directory.glob(pattern)):
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    key, _, kind = member.name.partition(".")
                    files.setdefault(key, {})[kind] = content.read()
        samples += [
            Sample(
                key=key,
                image=Image.open(io.BytesIO(parts["jpg"])).convert("RGB"),
                question=json.loads(parts["json"])["question"],
                answer=parts["txt"].decode(),
            )
            for key, parts in files.items()
        ]
    return samples


@torch.inference_mode()
def generate(directory: Path, samples: list[Sample], batch_size: int) -> list[str]:
    """The model's answer to each sample, by greedy decoding of at most 8 tokens."""
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for start in range(0, len(samples), batch_size):
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": sample.image},
                        {"type": "text", "text": sample.question},
                    ],
                }
            ]
            for sample in samples[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new_tokens, skip_special_tokens=True)]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-dir", type=Path, required=True, help="the model, a Hugging Face folder")
    parser.add_argument("--data-path", type=Path, required=True, help="the folder of the shards")
    parser.add_argument("--shards", default="held-out-*.tar", help="which of them (default: %(default)s)")
    parser.add_argument(
        "--predictions", type=Path, help="write key, question, answer, prediction here, as JSON"
    )
    parser.add_argument("--expect", type=float, default=0.0, help="exit 1 when the accuracy is below this")
    parser.add_argument("--batch-size", type=int, default=99)
    args = parser.parse_args()

    samples = read_shards(args.data_path, args.shards)
    if not samples:
        sys.exit(f"error: {args.data_path}: no shard matches {args.shards}")
    predictions = generate(args.hf_dir, samples, args.batch_size)
    correct = sum(
        sample.answer == prediction for sample, prediction in zip(samples, predictions, strict=True)
    )
    for sample, prediction in list(zip(samples, predictions, strict=True))[:3]:
        print(f'{sample.key}: "{sample.question}" answer {sample.answer}, the model says {prediction!r}')
    accuracy = correct / len(samples)
    print(f"accuracy: {accuracy:.2%} ({correct} of {len(samples)} held-out digits)")

    if args.predictions:
        rows = [
            {
                "key": sample.key,
                "question": sample.question,
                "answer": sample.answer,
                "prediction": prediction,
            }
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        args.predictions.write_text(json.dumps(rows, indent=1) + "\n")
    if accuracy < args.expect:
        sys.exit(f"error: accuracy {accuracy:.2%} is below the expected {args.expect:.2%}")


if __name__ == "__main__":
    main()
