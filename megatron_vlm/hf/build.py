"""Joins a text model, a vision tower and a projector, new or trained, into a Hugging Face LLaVA.

No model is built: tensors stream from the folders of the two into the new one. transformers reads and writes
configs, tokenizers and image processors, and is imported where it is used.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_vlm.config.checkpoint import appearing_folder
from megatron_vlm.config.families import TEXT_FAMILIES, TOWERS, check_keys, check_text, check_tower
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.hf.convert import check_apart, check_target, write_conversion, write_weights
from megatron_vlm.hf.folder import HFFolder, TensorInfo, cast, split_into_shards, write_index
from megatron_vlm.hf.hub import locate
from megatron_vlm.hf.mapping import PREFIXES, build_table
from megatron_vlm.hf.projector import MMProjector, read_projector
from megatron_vlm.hf.streaming import Meter, Progress, check_finite, check_free_space, dtype_name, same_bits
from megatron_vlm.hf.tokenizer import IMAGE_TOKEN, add_tokens, chat_template, load_tokenizer

VOCAB_MULTIPLE = 128
_SHARD_BYTES = 5 * 10**9
_ROWS_AT_ONCE = 4096

# The names that LLaVA checkpoints of the hub have, which every release of transformers reads.
_TARGET = {part: choices[0] for part, choices in PREFIXES.items()}
# What the tensors of a text model or a tower begin with, alone or in a larger model, and one that each has.
_TEXT_PREFIXES, _EMBEDDING = (*PREFIXES["text"], "model.", ""), "embed_tokens.weight"
_TOWER_PREFIXES, _PATCHES = (*PREFIXES["tower"], "vision_model.", ""), "embeddings.patch_embedding.weight"
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # of old releases, computed from the config


@dataclass(frozen=True)
class _Family:
    """What a kind of tower needs in LLaVA."""

    feature_strategy: str
    class_tokens: int


# -2 is LLaVA's feature layer for both. SigLIP has no class token to drop.
_FEATURE_LAYER = -2
_FAMILIES = {"clip_vision_model": _Family("default", 1), "siglip_vision_model": _Family("full", 0)}


@dataclass(frozen=True)
class _Given:
    """A model that the user named: the flag with its value, the folder, and the part's config."""

    flag: str
    folder: Path
    config: Any
    tied: bool  # the config says that embedding and head are one


@dataclass(frozen=True)
class _Source:
    """A tensor of the new model: what it will be, and how it is read."""

    info: TensorInfo
    read: Callable[[], Tensor]


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
) -> Path:
    """Make a LLaVA folder that transformers loads.

    The text model's body and head and the whole tower are copied, bit for bit where the dtype stays.
    ``<image>`` and, if the tokenizer has no padding token of its own, ``<pad>`` are added; their rows in the
    embedding and in the head, and those that fill up the vocabulary, are the mean of the rows that belong to
    tokens. The text model's own chat template stays if it places images, otherwise one in ``lang`` takes
    its place.

    Memory: one embedding, and what waits to be written.

    Args:
        save_dir: the folder to make; must not hold anything unless ``force``.
        text_model: folder or tag of a causal language model of a family in ``families.TEXT_FAMILIES``, or of
            a LLaVA, whose language model is taken.
        vision_model: folder or tag of a CLIP or SigLIP model or tower, or of a LLaVA.
        projector_type: ``mlp2x_gelu`` or ``linear``; None: as ``projector``, or ``mlp2x_gelu``.
        vocab_size_padding: round the vocabulary up to a multiple of 128.
        lang: ``jp`` or ``en``, the chat template's language.
        seed: of the projector's weights.
        dtype: of all weights; None: as the text model is stored.
        progress: called with the bytes done and in all.
        projector: a trained projector, as ``projector.read_projector`` takes it.

    Returns:
        ``save_dir``.

    Raises:
        ValueError: a model cannot be found, is of a kind that is not supported, or lacks a tensor; the disk
            is too full, or the output is there already.
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
    text_folder, vision_folder = HFFolder(text.folder), HFFolder(vision.folder)
    text_prefix = _prefix(text, text_folder, _TEXT_PREFIXES, _EMBEDDING)
    vision_prefix = _prefix(vision, vision_folder, _TOWER_PREFIXES, _PATCHES)
    stored = getattr(torch, dtype) if dtype else _widest(text_folder, text_prefix)

    rows = text.config.vocab_size
    tokenizer, known, new = _tokenizer(text, rows)
    vocab_size = max([rows, *(i + 1 for i in new)])
    if vocab_size_padding:
        vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    new = sorted({*new, *range(rows, vocab_size)})
    text.config.vocab_size = vocab_size
    text.config.pad_token_id = tokenizer.pad_token_id
    if vision.config.model_type == "siglip_vision_model":
        vision.config.vision_use_head = vision_prefix + "head.probe" in vision_folder.tensors
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config, model = _llava_config(text, vision, image_token_id, kind, stored)
    processor = _processor(vision, model, tokenizer, lang)

    extend = functools.partial(_extended, known=known, new=new, vocab_size=vocab_size, rows=rows)
    sources = {
        **_copied(vision_folder, vision_prefix, _TARGET["tower"], stored),
        **_new_projector(model, seed, stored),
        **_copied(text_folder, text_prefix, _TARGET["text"], stored),
        **_head(text, text_folder, text_prefix, stored),
    }
    if trained is not None:
        trained.fit(model)
        sources.update(_trained_projector(trained, stored))
    for name in (_TARGET["text"] + _EMBEDDING, _TARGET["head"] + "weight"):
        if name in sources:
            sources[name] = _with_rows(text, sources[name], rows, vocab_size, extend)
    _check(sources, model, text, vision)
    files = split_into_shards([source.info for source in sources.values()], _SHARD_BYTES)
    size = sum(source.info.nbytes for source in sources.values())
    check_free_space(target, size)

    with appearing_folder(target, replace=force) as output:
        config.save_pretrained(output)
        processor.save_pretrained(output)
        _generation_config(text, tokenizer).save_pretrained(output)
        metadata = {file: {"format": "pt"} for file in files}
        names = list(sources)
        written = write_weights(
            output, files, metadata, names, lambda name: sources[name].read(), Meter(size, progress), False
        )
        if len(files) > 1:
            write_index(output, files)
        write_conversion(output, {"text_model": text_model, "vision_model": vision_model}, written)
    return target


def _given(flag: str, name: str, part: str) -> _Given:
    """Find a model and read its config, or the part's config where it has several."""
    from transformers import AutoConfig

    folder, where = locate(flag, name), f"{flag} {name}: "
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}no config.json in it; give the folder of a Hugging Face model")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        own = raw[part] if isinstance(raw.get(part), dict) else raw
        kind, tied = own.get("model_type"), bool(raw.get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}its config.json cannot be read ({error})") from None
    if kind in (TOWERS if part == "text_config" else TEXT_FAMILIES):
        other = "--vision-model" if part == "text_config" else "--text-model"
        raise ValueError(f"{where}model_type is {kind!r}; it belongs behind {other}")
    check_keys(raw, where)
    check = check_text if part == "text_config" else check_tower
    check(own, where)
    try:
        whole = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for a config that it doesn't take
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}its config.json cannot be used ({reason})") from None
    config = getattr(whole, part, whole)
    check({"model_type": config.model_type}, where)  # which JSON may leave to the whole model's class
    return _Given(f"{flag} {name}", folder, config, tied or getattr(config, "tie_word_embeddings", False))


def _prefix(given: _Given, folder: HFFolder, prefixes: tuple[str, ...], probe: str) -> str:
    for prefix in prefixes:
        if prefix + probe in folder.tensors:
            return prefix
    raise ValueError(
        f"{given.flag}: its weights have no {probe}; they are not of a {given.config.model_type}"
    )


def _widest(folder: HFFolder, prefix: str) -> torch.dtype:
    """The dtype that loses nothing of a text model."""
    dtypes = [
        i.dtype for n, i in folder.tensors.items() if n.startswith(prefix) and i.dtype.is_floating_point
    ]
    return functools.reduce(torch.promote_types, dtypes)


def _tokenizer(text: _Given, rows: int) -> tuple[Any, list[int], list[int]]:
    """The tokenizer with what LLaVA needs, the ids whose rows of the embedding it was trained with, and the
    ids whose rows mean nothing yet."""
    try:
        tokenizer = load_tokenizer(text.folder)
        own = set(tokenizer.get_vocab().values())
        new = add_tokens(tokenizer, rows)
    except ModuleNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{text.flag}: {error}") from None
    return tokenizer, sorted(own.difference(new)), new


def _llava_config(
    text: _Given, vision: _Given, image_token_id: int, projector_type: str, dtype: torch.dtype
) -> tuple[Any, ModelConfig]:
    from transformers import LlavaConfig

    linear = projector_type == "linear"
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=image_token_id,
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_layer=_FEATURE_LAYER,
        vision_feature_select_strategy=_FAMILIES[vision.config.model_type].feature_strategy,
        tie_word_embeddings=text.tied,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.text_config.tie_word_embeddings = text.tied
    config.mm_projector_type = projector_type
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype_name(dtype)
    model = ModelConfig.from_hf(json.loads(config.to_json_string(use_diff=False)))
    config.image_seq_length = model.image_tokens
    return config, model


def _processor(vision: _Given, model: ModelConfig, tokenizer: Any, lang: str) -> Any:
    """What turns text and images into the model's input.

    Raises:
        ValueError: it expands an image to another number of tokens than there are features.
    """
    from PIL import Image
    from transformers import LlavaProcessor

    family = _FAMILIES[vision.config.model_type]
    tokenizer.chat_template = chat_template(tokenizer, lang)
    processor = LlavaProcessor(
        image_processor=_image_processor(vision, model),
        tokenizer=tokenizer,
        patch_size=model.vision.patch_size,
        vision_feature_select_strategy=family.feature_strategy,
        num_additional_image_tokens=family.class_tokens,
        chat_template=tokenizer.chat_template,
    )
    side = model.vision.image_size
    batch = processor(text=IMAGE_TOKEN, images=Image.new("RGB", (side, side)), return_tensors="pt")
    tokens = int((batch["input_ids"] == model.image_token_id).sum())
    pixels = tuple(batch["pixel_values"].shape[-2:])
    if tokens != model.image_tokens or pixels != (side, side):
        raise ValueError(
            f"{vision.flag}: its image processor makes {tokens} image tokens of {pixels[0]} x {pixels[1]} "
            f"pixels, the tower {model.image_tokens} of {side} x {side}; correct the image size in "
            "preprocessor_config.json"
        )
    return processor


def _image_processor(vision: _Given, model: ModelConfig) -> Any:
    """The tower's own image processor, or its family's usual one at the tower's image size."""
    from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(vision.folder)
    except (OSError, ValueError):  # the folder has no preprocessor_config.json
        side = model.vision.image_size
        square = {"height": side, "width": side}
        if model.vision.family == "clip":
            return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        return SiglipImageProcessor(size=square)


def _generation_config(text: _Given, tokenizer: Any) -> Any:
    """The text model's, ended by the token that the chat template writes behind an answer."""
    from transformers import GenerationConfig

    path = text.folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not values.get("do_sample"):  # transformers doesn't write these for a greedy model, nor use them
        for key in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            values.pop(key, None)
    ends = values.get("eos_token_id", text.config.eos_token_id)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    values.update(
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=values.get("bos_token_id", text.config.bos_token_id),
    )
    return GenerationConfig.from_dict(values)


def _copied(folder: HFFolder, prefix: str, target: str, dtype: torch.dtype) -> dict[str, _Source]:
    """The tensors of a folder under a prefix, under another prefix."""
    found = {}
    for info in (info for infos in folder.files.values() for info in infos):
        name = target + info.name.removeprefix(prefix)
        if info.name.startswith(prefix) and not name.endswith(_BUFFERS):
            stored = dtype if info.dtype.is_floating_point else info.dtype
            read = functools.partial(_read, folder, info.name, stored)
            found[name] = _Source(TensorInfo(name, stored, info.shape), read)
    return found


def _read(folder: HFFolder, name: str, dtype: torch.dtype) -> Tensor:
    tensor = folder.read(name)
    check_finite(name, tensor)
    return cast(name, tensor, dtype)


def _head(text: _Given, folder: HFFolder, text_prefix: str, dtype: torch.dtype) -> dict[str, _Source]:
    """The output layer, if the model has one of its own."""
    own = next((p + "weight" for p in PREFIXES["head"] if p + "weight" in folder.tensors), None)
    if not text.tied:
        if own is None:
            raise ValueError(f"{text.flag}: lm_head.weight is missing; give a causal language model")
        name = _TARGET["head"] + "weight"
        read = functools.partial(_read, folder, own, dtype)
        return {name: _Source(TensorInfo(name, dtype, folder.tensors[own].shape), read)}
    if own is not None and not same_bits(folder.read(own), folder.read(text_prefix + _EMBEDDING)):
        raise ValueError(
            f"{text.flag}: {own} differs from the embedding, but config.json ties them; set "
            "tie_word_embeddings to false"
        )
    return {}


def _with_rows(
    text: _Given, source: _Source, rows: int, vocab_size: int, extend: Callable[[Tensor], Tensor]
) -> _Source:
    """An embedding or a head, with rows for what was added."""
    found, *rest = source.info.shape
    if found != rows:
        raise ValueError(
            f"{text.flag}: {source.info.name} has {found} rows, config.json says vocab_size {rows}"
        )
    info = replace(source.info, shape=(vocab_size, *rest))
    return _Source(info, lambda: extend(source.read()))


def _extended(tensor: Tensor, known: list[int], new: list[int], vocab_size: int, rows: int) -> Tensor:
    """``[rows, hidden]`` to ``[vocab_size, hidden]``, with the mean of rows ``known`` in rows ``new``.

    The mean is taken in float64 and rounded to float32, then to the tensor's dtype.
    """
    result = tensor.new_empty(vocab_size, *tensor.shape[1:])
    result[:rows] = tensor
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for some in torch.tensor(known).split(_ROWS_AT_ONCE):
        total += tensor[some].double().sum(0)
    result[new] = (total / len(known)).float().to(result.dtype)
    return result


def _new_projector(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, _Source]:
    """A projector as LLaVA's starts, by torch's own initialisation; of ``linear``, the second layer is the
    identity."""
    outer, inner = model.language.hidden_size, model.projector.input_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [torch.nn.Linear(inner, outer), torch.nn.Linear(outer, outer)]
    if model.projector.kind == "linear":
        torch.nn.init.eye_(layers[1].weight)
        torch.nn.init.zeros_(layers[1].bias)
    found = {}
    for number, layer in enumerate(layers, 1):
        for part, parameter in layer.named_parameters():
            name = f"{_TARGET['projector']}linear_{number}.{part}"
            tensor = parameter.detach().to(dtype)
            info = TensorInfo(name, dtype, tuple(tensor.shape))
            found[name] = _Source(info, tensor.detach)
    return found


def _trained_projector(projector: MMProjector, dtype: torch.dtype) -> dict[str, _Source]:
    found = {}
    for own, tensor in projector.tensors.items():
        name = _TARGET["projector"] + own
        info = TensorInfo(name, dtype, tuple(tensor.shape))
        found[name] = _Source(info, functools.partial(cast, name, tensor, dtype))
    return found


def _check(sources: dict[str, _Source], model: ModelConfig, text: _Given, vision: _Given) -> None:
    """Check that the tensors are those of the model that the config describes.

    Raises:
        ValueError: one is missing, has another shape, or is none of them.
    """
    table = build_table(model, model.language.vocab_size, _TARGET)
    shapes = {name: shape for row in table.rows for name, shape in row.hf}
    shapes.update(pair for carry in table.carries if not carry.optional for pair in carry.hf)
    allowed = {**shapes, **{name: shape for carry in table.carries for name, shape in carry.hf}}
    for name in [name for name in shapes if name not in sources] or sources:
        of_vision = name.startswith(_TARGET["tower"])
        flag = (vision if of_vision else text).flag
        own = name.removeprefix(_TARGET["tower" if of_vision else "text"])
        if name not in sources:
            raise ValueError(f"{flag}: {own} is missing in its weights")
        if name not in allowed:
            raise ValueError(f"{flag}: {own} is no part of the model that its config.json describes")
        if sources[name].info.shape != allowed[name]:
            found = list(sources[name].info.shape)
            raise ValueError(f"{flag}: {own} has shape {found}; config.json implies {list(allowed[name])}")
