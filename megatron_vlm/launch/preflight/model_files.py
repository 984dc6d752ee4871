"""Checks of a Hugging Face folder's JSON files, about tokens and images, against the model.

Training checks the same by loading tokenizer and image processor, which needs transformers and a started
job; here it takes milliseconds on a login node. What JSON does not tell is left to training.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from megatron_vlm.architecture.connectors.anyres import NO_TILES
from megatron_vlm.architecture.families.known import TEXT_FAMILIES
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.chat_template import chat_template
from megatron_vlm.artifacts.end_tokens import end_tokens
from megatron_vlm.artifacts.mixture import MixtureConfig, SourceConfig, is_mixture
from megatron_vlm.artifacts.templates import unfit
from megatron_vlm.config.run import RunConfig

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_FULL_TEXT_SHARE = 0.2  # of --seq-length; below it most answers are cut off
# Of transformers' classes, for what a file leaves out.
_PROCESSOR_DEFAULTS: Dict[str, Dict[str, Any]] = {
    "CLIP": {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 224}},
    "LlavaOnevision": {"do_center_crop": False, "size": {"height": 384, "width": 384}},
    "Llava": {"do_center_crop": True, "crop_size": 224, "size": {"shortest_edge": 224}},
    "Siglip": {"do_center_crop": False, "size": {"height": 224, "width": 224}},
}
_BUILDER = "scripts/convert/build_llava_jp.py"


def tokenizer_problems(folder: str, model: ModelConfig, config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the tokenizer of ``folder``: image token, padding token, chat template."""
    if not any(os.path.isfile(os.path.join(folder, name)) for name in _TOKENIZER_FILES):
        yield f"{_named(folder, config)}: holds no tokenizer; give the Hugging Face folder of the model"
        return
    settings = _read(folder, "tokenizer_config.json")
    added = _added_tokens(folder, settings)
    yield from _special_tokens(folder, added, settings, model, config)
    yield from _template(folder, added, settings, config)


def end_token_problems(folder: str) -> Iterator[str]:
    """Yield what keeps a run from telling an exported model where to stop: files that don't say it now."""
    try:
        end_tokens(Path(folder))
    except ValueError as error:
        yield str(error)


def image_problems(folders: Sequence[str], model: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with the image processor, which is that of the first folder that has one."""
    with_images = [f for f in folders if any(os.path.isfile(os.path.join(f, p)) for p in _PROCESSOR_FILES)]
    if not with_images:
        yield (
            f"{' and '.join(folders)}: no image processor ({' or '.join(_PROCESSOR_FILES)}); give the "
            f"Hugging Face folder that {_BUILDER} made"
        )
        return
    folder = with_images[0]
    # transformers looks there first, and in the older file where there is nothing.
    processor = _read(folder, "processor_config.json").get("image_processor")
    if not isinstance(processor, dict):
        processor = _read(folder, "preprocessor_config.json")
    vision = model.vision
    wanted = (vision.image_size, vision.image_size)
    made = _processed_size(processor)
    if made == (None, None):
        yield (
            f"{folder}: its image processor keeps the shape of an image, and the vision tower takes "
            f"{wanted[0]} x {wanted[1]} pixels; set do_center_crop and crop_size"
        )
    elif made is not None and made != wanted:
        yield (
            f"{folder}: its image processor makes images of {made[0]} x {made[1]} pixels, and the vision "
            f"tower takes {wanted[0]} x {wanted[1]}; give the folder of the model being trained"
        )
    if model.anyres is not None:
        pinpoints = processor.get("image_grid_pinpoints")
        if pinpoints is not None and tuple(map(tuple, pinpoints)) != model.anyres.grid_pinpoints:
            yield (
                f"{folder}: its image processor's image_grid_pinpoints are not those of the model's "
                "config.json; give the folder of the model being trained"
            )
    mean = processor.get("image_mean")
    if isinstance(mean, list) and len(mean) != vision.num_channels:
        yield (
            f"{folder}: its image processor has an image_mean for {len(mean)} channels, and the vision "
            f"tower takes {vision.num_channels}"
        )


def uncut_problems(model: ModelConfig, config: RunConfig) -> Iterator[str]:
    """Yield the datasets of a mixture that want tiles from a model that has none."""
    for source in _sources(config):
        if source.options.get("image_aspect_ratio") == "anyres" and model.anyres is None:
            yield _where(config, source) + NO_TILES


def image_warnings(folders: Sequence[str], model: ModelConfig) -> Iterator[str]:
    """Yield warnings of what trains, but not as one would think: how many tokens an image is."""
    if model.feature_strategy == "default" and not model.vision.prefix_tokens:
        yield (
            f"vision_feature_select_strategy 'default' drops the first position of an image, and the "
            f"{model.vision.family} tower has no class token there: a patch of every image is lost; "
            "'full' in config.json keeps it, when the model is built"
        )
    for folder in folders:
        processor = _read(folder, "processor_config.json")
        theirs = _processor_tokens(processor, model)
        if theirs is not None and theirs != model.tile_tokens:
            yield (
                f"{folder}/processor_config.json: by its patch_size, num_additional_image_tokens and "
                f"vision_feature_select_strategy transformers would give an image {theirs} tokens, and the "
                f"model makes {model.tile_tokens}; an exported model would not run there"
            )
        ratio, most = processor.get("vision_aspect_ratio"), model.anyres and model.anyres.max_tiles
        if ratio is not None and most and ratio != f"anyres_max_{most}":
            yield (
                f"{folder}/processor_config.json: vision_aspect_ratio is {ratio!r}, and the model's "
                f"'anyres_max_{most}': transformers would give large images other numbers of tokens; an "
                "exported model would not run there"
            )


def sequence_warnings(model: ModelConfig, seq_length: int) -> Iterator[str]:
    """Yield warnings of sequences that leave little room for text, or are longer than the model has seen."""
    text, image = model.text_tokens(seq_length), "an image" if model.anyres is None else "the largest image"
    if seq_length > model.min_image_tokens and text < _FULL_TEXT_SHARE * seq_length:
        fits = -(-int(model.image_tokens / (1 - _FULL_TEXT_SHARE)) // 64) * 64
        yield (
            f"{image} takes {model.image_tokens} of --seq-length {seq_length} and leaves {text} tokens for "
            f"its text, prompt included; longer samples are cut off or dropped; --seq-length {fits} leaves "
            f"{model.text_tokens(fits)}"
        )
    positions = model.language.max_position_embeddings
    if seq_length > positions:
        yield (
            f"--seq-length {seq_length} is longer than the {positions} positions that the language model was "
            f"made for; --seq-length {positions} is the most that it knows"
        )


def _special_tokens(
    folder: str, added: Dict[int, str], settings: Dict[str, Any], model: ModelConfig, config: RunConfig
) -> Iterator[str]:
    wanted, flag = model.image_token_id, ""
    if config.model.image_token_id is not None:
        wanted, flag = config.model.image_token_id, f"--image-token-id {config.model.image_token_id}: "
    if added and wanted not in added:  # a tokenizer.model alone doesn't tell
        own = [number for number, text in added.items() if text == "<image>"]
        hint = f"its <image> is token {own[0]}" if own else "it has no <image>"
        kind = _read(folder, "config.json").get("model_type")
        hint += f", and is that of a text model, {kind!r}" if kind in TEXT_FAMILIES else ""
        yield (
            f"{flag}{_named(folder, config)}: the model's image token is {wanted}, and no added token of "
            f"this tokenizer ({hint}); give the Hugging Face folder that {_BUILDER} made"
        )
    if added and max(added) >= model.language.vocab_size:
        yield (
            f"{_named(folder, config)}: the tokenizer has a token {max(added)}, and the model embeds only "
            f"{model.language.vocab_size}; give the folder of the model being trained"
        )
    if config.model.pad_token_id is not None:
        pad, source = config.model.pad_token_id, f"--pad-token-id {config.model.pad_token_id}"
    else:
        text = _text(settings.get("pad_token"))
        pad = next((number for number, known in added.items() if known == text), -1)
        source = f"{folder}: the tokenizer's pad token"
    if pad == wanted:
        yield f"{source} is the image token; choose another with --pad-token-id"


def _template(
    folder: str, added: Dict[int, str], settings: Dict[str, Any], config: RunConfig
) -> Iterator[str]:
    """Yield the rules of data/processing.py and data/templates.py, as far as files tell."""
    has_chat = chat_template(Path(folder)) is not None
    default = "chat" if has_chat else "plain" if config.training.stage == 1 else "v1"
    names = {"": config.data.template or default}
    names.update((_where(config, source), source.options.get("template", "")) for source in _sources(config))
    special = _read(folder, "special_tokens_map.json")
    bos, eos = (_text(settings.get(key)) or _text(special.get(key)) for key in ("bos_token", "eos_token"))
    for where, name in names.items():
        if name == "chat" and not has_chat:
            instead = "use --template v1 or plain, or leave it out"
            yield f"{where}--template chat: {folder} has no chat template; {instead}"
        problem = unfit(name, added.values(), bos, eos) if name else ""
        if problem and (added or name == "v1"):  # a tokenizer.model alone doesn't tell
            yield f"{where}{problem} ({folder})"


def _named(folder: str, config: RunConfig) -> str:
    """Return a folder, and the flag that gave it."""
    return f"--tokenizer-load-dir {folder}" if folder == config.model.tokenizer_load_dir else folder


def _sources(config: RunConfig) -> Tuple[SourceConfig, ...]:
    """Return the datasets of a mixture. None of a file that can't be read: another check says so."""
    path = config.data.data_path
    try:
        return MixtureConfig.load(path).sources if path is not None and is_mixture(path) else ()
    except ValueError:
        return ()


def _where(config: RunConfig, source: SourceConfig) -> str:
    return f"--data-path {config.data.data_path}: dataset {source.name}: "


def _added_tokens(folder: str, settings: Dict[str, Any]) -> Dict[int, str]:
    """Return the tokens that tokenisation never splits, by their ids."""
    found = {int(number): text for text, number in _read(folder, "added_tokens.json").items()}
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        found[int(number)] = _text(token) or ""
    for token in _list_in_tokenizer(os.path.join(folder, "tokenizer.json")):
        found[int(token["id"])] = token["content"]
    return found


def _list_in_tokenizer(path: str) -> List[Dict[str, Any]]:
    """Return ``added_tokens`` of a ``tokenizer.json``, without parsing the vocabulary of some 10 MB after
    it."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    key = text.find('"added_tokens"')
    start = text.find("[", key)
    try:
        tokens = json.JSONDecoder().raw_decode(text, start)[0] if key >= 0 <= start else []
    except ValueError:
        return []
    # What is odd in them is transformers' to tell.
    found = [token for token in tokens if isinstance(token, dict)]
    return [t for t in found if isinstance(t.get("id"), int) and isinstance(t.get("content"), str)]


def _processed_size(processor: Dict[str, Any]) -> Optional[Tuple[Optional[int], Optional[int]]]:
    """Return height and width of processed images: None and None where they vary, None where JSON doesn't
    tell."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    defaults = next((d for name, d in _PROCESSOR_DEFAULTS.items() if kind.startswith(name)), {})
    known = {**defaults, **processor}
    if known.get("do_center_crop"):
        return _height_and_width(known.get("crop_size"))
    if not known.get("do_resize", True):
        return None, None
    size = known.get("size")
    if isinstance(size, dict) and "shortest_edge" in size:
        return None if known.get("do_pad") else (None, None)  # some pad to a square before
    return _height_and_width(size)


def _height_and_width(size: Any) -> Optional[Tuple[int, int]]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= set(size):
        return size["height"], size["width"]
    return None


def _processor_tokens(processor: Dict[str, Any], model: ModelConfig) -> Optional[int]:
    """Return the tokens that transformers' ``LlavaProcessor`` writes for an image of the tower's size."""
    if isinstance(processor.get("num_image_tokens"), int):  # of LlavaOnevisionProcessor
        return int(processor["num_image_tokens"])
    patch, strategy = processor.get("patch_size"), processor.get("vision_feature_select_strategy")
    if not isinstance(patch, int) or strategy is None:
        return None
    patches = (model.vision.image_size // patch) ** 2
    return patches + int(processor.get("num_additional_image_tokens") or 0) - int(strategy == "default")


def _read(folder: str, name: str) -> Dict[str, Any]:
    """Return a JSON object; empty where there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            loaded = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return loaded


def _text(token: Any) -> Optional[str]:
    """Return a token as files write it: its text, or an object with its ``content``."""
    return token.get("content") if isinstance(token, dict) else token
