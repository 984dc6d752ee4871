"""Joins a text model and a vision tower into a new Hugging Face LLaVA, its projector untrained.

The only part of the package that builds transformers models, so transformers is imported where it
is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.checkpoint import appearing_folder, check_absent
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.hf.mapping import LANGUAGE_TABLES

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
VOCAB_MULTIPLE = 128

# One turn after the other; an image stands in front of its turn's text. Content is a string or a
# list of parts. The generation marks tell transformers which tokens the assistant said.
_CHAT_TEMPLATE = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + text(message['content']) + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + text(message['content']) + 'BREAK' }}"
    "{% else %}{{ text(message['content']) + 'BREAK' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_CHAT_WORDS = {
    "en": {"USER": "USER", "ASSISTANT": "ASSISTANT", "BREAK": " "},  # as Vicuna and LLaVA-1.5
    "jp": {"USER": "ユーザー", "ASSISTANT": "アシスタント", "BREAK": "\\n"},
}


@dataclass(frozen=True)
class _Family:
    """What a kind of tower needs in LLaVA."""

    model_class: str
    feature_strategy: str
    class_tokens: int


# -2 is LLaVA's feature layer for both. SigLIP has no class token to drop.
_FEATURE_LAYER = -2
_FAMILIES = {
    "clip_vision_model": _Family("CLIPVisionModel", "default", 1),
    "siglip_vision_model": _Family("SiglipVisionModel", "full", 0),
}


def build_llava(
    save_dir: str | os.PathLike[str],
    text_model: str,
    vision_model: str,
    projector_type: str = "mlp2x_gelu",
    vocab_size_padding: bool = False,
    lang: str = "jp",
    seed: int = 0,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Make a LLaVA folder that transformers loads.

    The text model's body and head and the whole tower are copied. ``<image>`` and, if the tokenizer
    has no padding token, ``<pad>`` are added; their rows in the embedding and in the head start as
    the mean of the others. The text model's own chat template stays if it places images, otherwise
    one in ``lang`` takes its place.

    Args:
        save_dir: the folder to make; must not hold anything unless ``force``.
        text_model: folder or tag of a Llama, Mistral, Qwen2 or Qwen3 causal language model.
        vision_model: folder or tag of a CLIP or SigLIP model or tower.
        projector_type: ``mlp2x_gelu`` or ``linear``.
        vocab_size_padding: round the vocabulary up to a multiple of 128.
        lang: ``jp`` or ``en``, the chat template's language.
        seed: of the projector's weights.
        dtype: of all weights; None: as the text model is stored.

    Returns:
        ``save_dir``.

    Raises:
        ValueError: a model cannot be found or is of a kind that is not supported, or the output is
            there already.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    if not force:
        check_absent(save_dir)
    text_config = _load("--text-model", AutoConfig, text_model)
    vision_config = _load("--vision-model", AutoConfig, vision_model)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    _check_type("--text-model", text_model, text_config, LANGUAGE_TABLES)
    _check_type("--vision-model", vision_model, vision_config, _FAMILIES)
    family = _FAMILIES[vision_config.model_type]

    tokenizer, added = _tokenizer(text_model)
    text_vocab_size, known = text_config.vocab_size, min(text_config.vocab_size, len(tokenizer) - len(added))
    vocab_size = max(text_vocab_size, len(tokenizer))
    if vocab_size_padding:
        vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    text_config.vocab_size = vocab_size
    text_config.pad_token_id = tokenizer.pad_token_id
    linear = projector_type == "linear"
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy=family.feature_strategy,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    config.mm_projector_type = projector_type
    model_config = ModelConfig.from_hf(json.loads(config.to_json_string(use_diff=False)))
    config.image_seq_length = model_config.image_tokens
    processor = LlavaProcessor(
        image_processor=_image_processor(vision_model, model_config),
        tokenizer=tokenizer,
        patch_size=model_config.vision.patch_size,
        vision_feature_select_strategy=family.feature_strategy,
        num_additional_image_tokens=family.class_tokens,
        chat_template=_chat_template(tokenizer, lang),
    )
    _check_image_tokens(processor, model_config, vision_model)

    text, tower = _load_models(text_model, vision_model, family, dtype)
    text.resize_token_embeddings(vocab_size, mean_resizing=False)
    new_rows = sorted({*added, *range(text_vocab_size, vocab_size)})
    embeddings = [text.get_input_embeddings(), text.get_output_embeddings()]
    for weight in {id(module.weight): module.weight.data for module in embeddings}.values():
        _fill_with_mean(weight, known, new_rows)

    config.dtype = text.dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    if linear:
        torch.nn.init.eye_(projector.linear_2.weight)
        torch.nn.init.zeros_(projector.linear_2.bias)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector.to(text.dtype)
    model.model.language_model = text.model
    model.lm_head = text.lm_head
    model.generation_config = text.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id

    with appearing_folder(save_dir, replace=force) as output:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    return Path(save_dir)


def _check_type(flag: str, name: str, config: Any, supported: Iterable[str]) -> None:
    if config.model_type not in supported:
        raise ValueError(
            f"{flag} {name}: model_type is {config.model_type!r}; supported: {', '.join(supported)}"
        )


def _load(flag: str, kind: Any, name: str, **kwargs: Any) -> Any:
    """``kind.from_pretrained(name)``; that it isn't there, or is no such thing, is the user's error."""
    try:
        return kind.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{flag} {name}: cannot be loaded ({reason})") from None


def _tokenizer(text_model: str) -> tuple[Any, list[int]]:
    """The tokenizer with ``<image>`` and a padding token, and the ids of tokens that were added."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = _load("--text-model", AutoTokenizer, text_model)
    if tokenizer.eos_token is None:
        raise ValueError(f"--text-model {text_model}: the tokenizer has no eos_token to end an answer with")
    before = len(tokenizer)
    wanted = [IMAGE_TOKEN] if tokenizer.pad_token is not None else [IMAGE_TOKEN, PAD_TOKEN]
    # normalized=False: found in the text as it is, whatever the tokenizer does to other text.
    tokens = [AddedToken(token, special=True, normalized=False) for token in wanted]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer, list(range(before, len(tokenizer)))


def _chat_template(tokenizer: Any, lang: str) -> str:
    own = tokenizer.chat_template
    if isinstance(own, str) and "image" in own:
        return own
    template = _CHAT_TEMPLATE
    for word, replacement in {**_CHAT_WORDS[lang], "IMAGE": IMAGE_TOKEN}.items():
        template = template.replace(word, replacement)
    return template


def _image_processor(vision_model: str, model: ModelConfig) -> Any:
    """The tower's own image processor, or its family's usual one at the tower's image size."""
    from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(vision_model)
    except (OSError, ValueError):  # the folder has no preprocessor_config.json
        side = model.vision.image_size
        square = {"height": side, "width": side}
        if model.vision.family == "clip":
            return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        return SiglipImageProcessor(size=square)


def _check_image_tokens(processor: Any, model: ModelConfig, vision_model: str) -> None:
    """Check with a blank image that the processor expands it to as many tokens as there are features."""
    from PIL import Image

    side = model.vision.image_size
    batch = processor(text=IMAGE_TOKEN, images=Image.new("RGB", (side, side)), return_tensors="pt")
    tokens = int((batch["input_ids"] == model.image_token_id).sum())
    pixels = tuple(batch["pixel_values"].shape[-2:])
    if tokens != model.image_tokens or pixels != (side, side):
        raise ValueError(
            f"--vision-model {vision_model}: its image processor makes {tokens} image tokens of "
            f"{pixels[0]} x {pixels[1]} pixels, the tower {model.image_tokens} of {side} x {side}; "
            "correct the image size in preprocessor_config.json"
        )


def _load_models(text_model: str, vision_model: str, family: _Family, dtype: str | None) -> tuple[Any, Any]:
    import transformers

    text = _load_weights(
        "--text-model",
        transformers.AutoModelForCausalLM,
        text_model,
        getattr(torch, dtype) if dtype else "auto",
    )
    tower_class = getattr(transformers, family.model_class)
    return text, _load_weights("--vision-model", tower_class, vision_model, text.dtype)


def _load_weights(flag: str, kind: Any, name: str, dtype: torch.dtype | str) -> Any:
    model, info = _load(flag, kind, name, dtype=dtype, output_loading_info=True)
    # transformers only warns, and fills in random values.
    for key in sorted(info["missing_keys"]):
        raise ValueError(f"{flag} {name}: {key} is missing in its weights")
    return model


def _fill_with_mean(weight: Tensor, known: int, rows: list[int]) -> None:
    """Set ``rows`` of an embedding to the mean of its first ``known`` rows."""
    weight[rows] = weight[:known].float().mean(dim=0).to(weight.dtype)
