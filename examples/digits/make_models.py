"""Make a small text model and a small vision tower with random weights, as Hugging Face folders.

They stand for the pretrained models that one would name by their tags: build_llava_jp.py joins
either kind in the same way.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE = 32

# What the tokenizer's merges are learned from; it is byte level, so that it can write any text.
CORPUS = [
    "Which digit is this? What is in this picture? Describe the image. Answer the question.",
    "USER: ASSISTANT: Human: ### system user assistant A chat between a curious human and an assistant.",
    "zero one two three four five six seven eight nine 0 1 2 3 4 5 6 7 8 9",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts ``<s>`` in front, as Llama's does."""
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", specials.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=256,
    )


def make_text_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vision_model() -> CLIPVisionModel:
    # LLaVA takes the features of the last block but one: of three blocks, two run.
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=8,
            initializer_range=0.1,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    text_dir, vision_dir = args.save_dir / "text-model", args.save_dir / "vision-model"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(text_dir)
    text_model = make_text_model(tokenizer)
    text_model.save_pretrained(text_dir)
    vision_model = make_vision_model()
    vision_model.save_pretrained(vision_dir)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(vision_dir)
    for kind, directory, model in ("text", text_dir, text_model), ("vision", vision_dir, vision_model):
        print(f"{kind} model of {model.num_parameters():,} parameters: {directory}")


if __name__ == "__main__":
    main()
