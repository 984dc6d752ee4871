"""The join of a text model, a vision tower and a projector, new or trained, to a Hugging Face LLaVA.

No model is built: tensors stream from the folders of the two into the new one. transformers reads and writes
configs, tokenizers and image processors, and is imported where it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.architecture.families.known import (
    FAMILIES,
    PLAIN,
    TEXT_FAMILIES,
    TOWERS,
    check_keys,
    check_text,
    check_tower,
    original_llava,
)
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.architecture.projector import usual_activation
from megatron_vlm.artifacts.chat_template import chat_template
from megatron_vlm.artifacts.checkpoint import appearing_folder
from megatron_vlm.hf.build.hub import locate
from megatron_vlm.hf.build.parts import Part, Vocabulary, check_sources, projector_sources
from megatron_vlm.hf.build.tokenizer import (
    IMAGE_TOKEN,
    add_tokens,
    answer_end,
    drop_appended_end,
    load_tokenizer,
    template_with_images,
)
from megatron_vlm.hf.convert import write_weights
from megatron_vlm.hf.formats.folder import SHARD_BYTES, HFFolder, small_files, split_into_shards
from megatron_vlm.hf.formats.streaming import Meter, Progress, check_free_space, dtype_name
from megatron_vlm.hf.mm_projector import read_projector
from megatron_vlm.hf.target import check_apart, check_target
from megatron_vlm.system.files import read_json

VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class _Family:
    """The settings of LLaVA that a kind of tower needs.

    Attributes:
        class_tokens: to drop.
        image_processor: transformers' class; it resizes the shorter side and crops, or makes a square of all.
        pooled: the tower may hold a head that pools its features, under this name.
    """

    feature_strategy: str
    class_tokens: int
    image_processor: str
    crops: bool
    pooled: str = ""


# -2 is LLaVA's feature layer for both. SigLIP has no class token to drop.
_FEATURE_LAYER = -2
_FAMILIES = {
    "clip_vision_model": _Family("default", 1, "CLIPImageProcessor", crops=True),
    "siglip_vision_model": _Family("full", 0, "SiglipImageProcessor", crops=False, pooled="head.probe"),
}


@dataclass(frozen=True)
class _Given:
    """A model that the user named: the flag with its value, the folder, and the part's config."""

    flag: str
    folder: Path
    config: Any
    tied: bool  # the config says that embedding and head are one


def build_llava(
    save_dir: str | os.PathLike[str],
    text_model: str,
    vision_model: str,
    projector_type: str | None = None,
    vocab_size_padding: bool = False,
    lang: str = "jp",
    seed: int = 0,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    projector: str | os.PathLike[str] | None = None,
    verify: bool = False,
    model_type: str = PLAIN,
    grid_pinpoints: Sequence[tuple[int, int]] | None = None,
) -> Path:
    """Make a LLaVA folder that transformers loads.

    The text model's body and head and the whole tower are copied, bit for bit where the dtype stays.
    ``<image>`` and, if the tokenizer has no padding token of its own, ``<pad>`` are added; their rows in the
    embedding and in the head, and those that fill up the vocabulary, are the mean of the rows that belong to
    tokens. The text model's own chat template stays if it places images, otherwise one in ``lang`` takes
    its place.

    Memory: two embeddings at most, and what waits to be written.

    Args:
        save_dir: the folder to make; must not hold anything unless ``force``.
        text_model: folder or tag of a causal language model of a family in ``families.TEXT_FAMILIES``, or of
            a LLaVA, whose language model is taken.
        vision_model: folder or tag of a CLIP or SigLIP model or tower, or of a LLaVA.
        projector_type: a kind in ``architecture/connectors``; None: as ``projector``, or ``mlp2x_gelu``.
        vocab_size_padding: round the vocabulary up to a multiple of 128.
        lang: ``jp`` or ``en``, the chat template's language.
        seed: of the projector's weights.
        dtype: of all weights; None: as the text model is stored.
        progress: called with the bytes done and in all.
        projector: a trained projector, as ``projector.read_projector`` takes it.
        verify: read every tensor back from the files written, and compare.
        model_type: one of ``families.BUILT``.
        grid_pinpoints: of a family that cuts images into tiles, ``(height, width)`` in pixels that images are
            padded to; None: the family's own, in tiles of this tower.

    Returns:
        ``save_dir``.

    Raises:
        ValueError: a model cannot be found, is of a kind that is not supported, or lacks a tensor; the disk
            is too full, or the output is there already.
        Difference: what was read back is not what was written.
    """
    target = Path(save_dir)
    text = _given("--text-model", text_model, "text_config")
    vision = _given("--vision-model", vision_model, "vision_config")
    for given in (text, vision):
        check_apart(given.folder, target)
    check_target(target, force)
    trained = read_projector(projector) if projector is not None else None
    if trained is not None and projector_type not in (None, trained.kind):
        raise ValueError(f"--projector {projector}: of type {trained.kind}, not {projector_type}")
    kind = trained.kind if trained is not None else projector_type or "mlp2x_gelu"
    language = Part(text.flag, HFFolder(text.folder), "text")
    tower = Part(vision.flag, HFFolder(vision.folder), "tower")
    stored = getattr(torch, dtype) if dtype else language.dtype

    tokenizer, vocabulary = _vocabulary(text, VOCAB_MULTIPLE if vocab_size_padding else 1)
    text.config.vocab_size = vocabulary.size
    text.config.pad_token_id = tokenizer.pad_token_id
    pooled = _FAMILIES[vision.config.model_type].pooled
    if pooled:
        vision.config.vision_use_head = tower.holds(pooled)
    values: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}
    if FAMILIES[model_type].built_grids:
        side, grids = vision.config.image_size, FAMILIES[model_type].built_grids
        sizes = grid_pinpoints or [(side * rows, side * columns) for rows, columns in grids]
        values["image_grid_pinpoints"] = [list(size) for size in sizes]
    config, model = _llava_config(model_type, text, vision, kind, stored, values)
    processor = _processor(model_type, vision, model, tokenizer, lang)
    generation_config = _generation_config(text, tokenizer)

    sources = {
        **tower.sources(stored),
        **projector_sources(model, stored, seed, trained),
        **language.text_sources(stored, text.tied, vocabulary),
    }
    check_sources(sources, model, language, tower)
    files = split_into_shards([source.info for source in sources.values()], SHARD_BYTES)
    size = sum(source.info.nbytes for source in sources.values())
    check_free_space(target, size)

    with appearing_folder(target, replace=force) as output:
        for part in (config, processor, generation_config):
            part.save_pretrained(output)
        drop_appended_end(output)
        metadata = {file: {"format": "pt"} for file in files}

        def read(name: str) -> Tensor:
            return sources[name].read()

        about = {"text_model": text_model, "vision_model": vision_model}
        write_weights(output, files, metadata, sources, read, Meter(size, progress), verify, about)
    return target


def _given(flag: str, name: str, part: str) -> _Given:
    """Find a model and read its config, or the part's config where it has several."""
    from transformers import AutoConfig

    folder, where = locate(flag, name), f"{flag} {name}: "
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}no config.json in it; give the folder of a Hugging Face model")
    list(small_files(folder))  # transformers would wait for a pipe among them
    try:
        raw = read_json(folder / "config.json")
        own = raw[part] if isinstance(raw.get(part), dict) else raw
        kind, tied = own.get("model_type"), bool(raw.get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}its config.json cannot be read ({error})") from None
    original = original_llava(raw)
    if original:
        raise ValueError(f"{where}{original}")
    if kind in (TOWERS if part == "text_config" else TEXT_FAMILIES):
        other = "--vision-model" if part == "text_config" else "--text-model"
        raise ValueError(f"{where}model_type is {kind!r}; it belongs behind {other}")
    check_keys(raw, where)
    check = check_text if part == "text_config" else check_tower
    check(own, where)
    try:
        whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a config that it doesn't take
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}its config.json cannot be used ({reason})") from None
    config = getattr(whole, part, whole)
    check({"model_type": config.model_type}, where)  # which JSON may leave to the whole model's class
    config._name_or_path = "" if os.path.isdir(name) else name  # no one else has this machine's folders
    return _Given(f"{flag} {name}", folder, config, tied or getattr(config, "tie_word_embeddings", False))


def _vocabulary(text: _Given, multiple: int) -> tuple[Any, Vocabulary]:
    """Return the tokenizer with the tokens that LLaVA needs, and what becomes of the embedding."""
    rows = text.config.vocab_size
    try:
        tokenizer = load_tokenizer(text.folder)
        tokenizer.chat_template = chat_template(text.folder)
        known = set(tokenizer.get_vocab().values())
        new = set(add_tokens(tokenizer, rows))
    except ValueError as error:
        raise ValueError(f"{text.flag}: {error}") from None
    size = -(-max([rows, *(i + 1 for i in new)]) // multiple) * multiple
    return tokenizer, Vocabulary(
        rows, size, tuple(sorted(known - new)), tuple(sorted(new | {*range(rows, size)}))
    )


def _llava_config(
    model_type: str, text: _Given, vision: _Given, kind: str, dtype: torch.dtype, values: dict[str, Any]
) -> tuple[Any, ModelConfig]:
    import transformers

    prefix = FAMILIES[model_type].class_prefix
    config = getattr(transformers, f"{prefix}Config")(
        **values,
        vision_config=vision.config,
        text_config=text.config,
        projector_hidden_act=usual_activation(kind),
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy=_FAMILIES[vision.config.model_type].feature_strategy,
        tie_word_embeddings=text.tied,
        architectures=[f"{prefix}ForConditionalGeneration"],
    )
    config.text_config.tie_word_embeddings = text.tied
    config.mm_projector_type = kind
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype_name(dtype)
    model = ModelConfig.from_hf(json.loads(config.to_json_string(use_diff=False)))
    config.image_seq_length = model.tile_tokens
    return config, model


def _processor(model_type: str, vision: _Given, model: ModelConfig, tokenizer: Any, lang: str) -> Any:
    """Return the processor, which turns text and images into the model's input.

    Raises:
        ValueError: it expands an image to another number of tokens than there are features.
    """
    import transformers
    from PIL import Image

    family = _FAMILIES[vision.config.model_type]
    tokenizer.chat_template = template_with_images(tokenizer, lang)
    processor = getattr(transformers, f"{FAMILIES[model_type].class_prefix}Processor")(
        image_processor=_image_processor(vision, model),
        tokenizer=tokenizer,
        patch_size=model.vision.patch_size,
        vision_feature_select_strategy=family.feature_strategy,
        num_additional_image_tokens=family.class_tokens,
        chat_template=tokenizer.chat_template,
    )
    side = model.vision.image_size
    image = Image.new("RGB", (2 * side - 1, side) if model.anyres else (side, side))
    batch = processor(text=IMAGE_TOKEN, images=image, return_tensors="pt")
    tokens = int((batch["input_ids"] == model.image_token_id).sum())
    pixels = tuple(batch["pixel_values"].shape[-2:])
    expected = model.count_tokens((image.height, image.width))
    if tokens != expected or pixels != (side, side):
        raise ValueError(
            f"{vision.flag}: its image processor makes {tokens} image tokens of {pixels[0]} x {pixels[1]} "
            f"pixels, the tower {expected} of {side} x {side}; correct the image size in "
            "preprocessor_config.json"
        )
    return processor


def _image_processor(vision: _Given, model: ModelConfig) -> Any:
    """Return the tower's own image processor, or its family's usual one at the tower's image size; where
    images are cut, one that does so with the same constants."""
    import transformers
    from transformers import AutoImageProcessor, LlavaNextImageProcessor

    family = _FAMILIES[vision.config.model_type]
    usual = getattr(transformers, family.image_processor)
    side = model.vision.image_size
    square = {"height": side, "width": side}
    cropped = dict(size={"shortest_edge": side}, crop_size=square)
    own = None
    if _has_image_processor(vision.folder):
        try:
            own = AutoImageProcessor.from_pretrained(vision.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{vision.flag}: its image processor cannot be used ({reason})") from None
        if model.anyres is None and not hasattr(own, "image_grid_pinpoints"):
            return own
    elif not family.crops:
        own = usual()
    constants = {key: getattr(own, key) for key in ("image_mean", "image_std", "resample")} if own else {}
    if model.anyres is not None:
        pinpoints = [list(size) for size in model.anyres.grid_pinpoints]
        return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, **cropped, **constants)
    return usual(**(cropped if family.crops else dict(size=square)), **constants)


def _has_image_processor(folder: Path) -> bool:
    """Return whether a model's folder says how images are made, in a file of its own or its processor's."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    path = folder / "processor_config.json"
    return path.is_file() and "image_processor" in path.read_text(encoding="utf-8")


def _generation_config(text: _Given, tokenizer: Any) -> Any:
    """Return the text model's generation config, ended by the token that the chat template writes behind
    an answer."""
    from transformers import GenerationConfig

    path = text.folder / "generation_config.json"
    values = {}
    if path.is_file():
        try:
            values = read_json(path)
            values.pop("_from_model_config", None)  # transformers would make it anew from config.json
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{text.flag}: its generation_config.json cannot be read ({error})") from None
    if not values.get("do_sample"):  # transformers doesn't write these for a greedy model, nor use them
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            values.pop(key, None)
    ends = values.get("eos_token_id", text.config.eos_token_id)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    for end in (tokenizer.eos_token_id, answer_end(tokenizer)):
        if end not in (None, *ends):
            ends.insert(0, end)
    values.update(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=values.get("bos_token_id", text.config.bos_token_id),
    )
    try:
        config = GenerationConfig.from_dict(values)
        config.validate(strict=True)  # else transformers refuses to write it
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{text.flag}: its generation_config.json cannot be used ({reason})") from None
    return config
