"""The architecture of a LLaVA model, read from a Hugging Face ``config.json``.

Nothing architectural is chosen here: every value comes from the config, and a value that the
config leaves out takes the default of transformers' own config class for that model type.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

from megatron_vlm.architecture.connectors import CONNECTORS
from megatron_vlm.architecture.connectors.anyres import AnyRes, Size, Tiling, extremes, tile
from megatron_vlm.architecture.encoders import ENCODERS
from megatron_vlm.architecture.families.known import (
    check_choice,
    check_keys,
    family_of,
    other_model,
)
from megatron_vlm.architecture.language import LanguageConfig, RopeScaling, language_config
from megatron_vlm.architecture.lora import LoRAConfig
from megatron_vlm.architecture.projector import ProjectorConfig, projector_config
from megatron_vlm.architecture.vision import VisionConfig, vision_config
from megatron_vlm.system.files import check_readable

MAX_LAYERS = 10_000  # a file that says more than that is wrong, and tables of them would take for ever


@dataclass(frozen=True)
class ModelConfig:
    """A LLaVA model: tower, projector, language model, and how they are joined.

    Source: transformers ``LlavaConfig`` and ``LlavaForConditionalGeneration``, and those of LLaVA-NeXT,
    LLaVA-OneVision and ViP-LLaVA.
    """

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image_token_id: int
    feature_layers: Tuple[int, ...]  # indices into the tower's hidden states, 0 = its embeddings
    feature_strategy: str  # "default" drops the first position, "full" keeps all
    dtype: str  # of the weights as stored: "float32", "bfloat16" or "float16"
    lora: Optional[LoRAConfig] = None  # adapters that stand beside the weights
    anyres: Optional[AnyRes] = None  # how images are cut into tiles; None: each is one tile

    @property
    def precision(self) -> str:
        """The precision of training and generation where no flag gives one: ``bf16`` or ``fp32``."""
        return "bf16" if self.dtype == "bfloat16" else "fp32"

    @property
    def num_vision_layers_run(self) -> int:
        """Tower blocks that the features need; the later ones are carried, not run."""
        return max(self.feature_layers)

    @property
    def tile_tokens(self) -> int:
        """Features of one tile of an image."""
        return self.vision.sequence_length - int(self.feature_strategy == "default")

    @property
    def image_tokens(self) -> int:
        """Visual tokens per image in the language model's sequence; where images are cut, at most."""
        return self._extremes[1]

    @property
    def min_image_tokens(self) -> int:
        """Visual tokens of the image that has the fewest."""
        return self._extremes[0]

    @property
    def image_tiles(self) -> int:
        """Tiles per image, which go through the tower one by one; at most."""
        return self._extremes[2]

    def text_tokens(self, seq_length: int) -> int:
        """Return the tokens that an image, the largest, leaves of a sequence for text."""
        return max(0, seq_length - self.image_tokens)

    @property
    def _extremes(self) -> Tuple[int, int, int]:
        if self.anyres is None:
            return self.tile_tokens, self.tile_tokens, 1
        return extremes(self.anyres, self.vision.image_size, self._tile_side)

    @property
    def _tile_side(self) -> int:
        return self.vision.image_size // self.vision.patch_size

    def count_tokens(self, size: Size) -> int:
        """Return the visual tokens of an image.

        Args:
            size: as for :meth:`tiling`; of no account where images aren't cut.
        """
        return self.tile_tokens if self.anyres is None else self.tiling(size).tokens

    def tiling(self, size: Size) -> Tiling:
        """Return how an image is cut; of models that cut images.

        Args:
            size: height and width in pixels, or ``UNCUT``.
        """
        assert self.anyres is not None
        return tile(size, self.anyres, self.vision.image_size, self._tile_side)

    @classmethod
    def from_hf(cls, config: Dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face LLaVA ``config.json``.

        Args:
            config: the parsed JSON.

        Raises:
            ValueError: the model is of a kind that is not supported; the message names the key,
                its value, and what is supported.
        """
        family = family_of(config)
        config = family.fill_in(config)
        check_keys(config)
        vision = vision_config(config["vision_config"])
        language = language_config(config["text_config"], config)
        layer = config["vision_feature_layer"]
        layers: List[int] = [layer] if isinstance(layer, int) else list(layer)
        if not layers:
            raise ValueError("config.json: vision_feature_layer is empty; name a layer, such as -2")
        num_states = vision.num_layers + 1
        for index in layers:
            if not -num_states <= index < num_states:
                raise ValueError(
                    f"config.json: vision_feature_layer {index} is outside the tower's {num_states} "
                    f"hidden states; use {-num_states} to {num_states - 1}"
                )
        strategy = config["vision_feature_select_strategy"]
        check_choice("vision_feature_select_strategy", strategy, ("default", "full"))
        if family.read_tiles and int(strategy == "default") != vision.prefix_tokens:
            square = "default" if vision.prefix_tokens else "full"
            raise ValueError(
                f"config.json: vision_feature_select_strategy is {strategy!r}; only with {square!r} do the "
                f"features of a {vision.family} tower's tiles make a square, as {config['model_type']} needs"
            )
        projector = projector_config(
            config, vision.hidden_size * len(layers), language.hidden_size, norm=family.projector_norm
        )
        image_token_id = config.get("image_token_id", config["image_token_index"])
        if not 0 <= image_token_id < language.vocab_size:
            raise ValueError(
                f"config.json: image_token_index {image_token_id} is outside the vocabulary of "
                f"{language.vocab_size}; add the token with scripts/convert/build_llava_jp.py"
            )
        dtype = (
            config.get("dtype")
            or config.get("torch_dtype")
            or config["text_config"].get("dtype")
            or config["text_config"].get("torch_dtype")
            or "float32"
        )
        check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        return cls(
            vision=vision,
            projector=projector,
            language=language,
            image_token_id=image_token_id,
            feature_layers=tuple(index % num_states for index in layers),
            feature_strategy=strategy,
            dtype=dtype,
            anyres=family.read_tiles(config, vision.image_size) if family.read_tiles else None,
        )

    @classmethod
    def from_hf_dir(cls, directory: str, flag: str = "") -> ModelConfig:
        """Read ``config.json`` of a Hugging Face model folder.

        Args:
            flag: names the folder in messages.

        Raises:
            ValueError: there is no readable ``config.json``, or as :meth:`from_hf`.
        """
        where, path = f"{flag} {directory}".lstrip(), os.path.join(directory, "config.json")
        check_readable(path)
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
        except FileNotFoundError:
            raise ValueError(f"{where}: no config.json; give a Hugging Face LLaVA folder") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None
        other = other_model(config, directory) if isinstance(config, dict) else ""
        if other:
            raise ValueError(f"{where}: {other}")
        try:
            model = cls.from_hf(config)
        except (TypeError, AttributeError, KeyError, ArithmeticError) as error:
            raise ValueError(f"{path}: a value is not of its key's kind ({error})") from None
        except ValueError as error:
            if str(error).startswith("config.json"):
                raise ValueError(f"{flag} {path}{str(error)[len('config.json') :]}".lstrip()) from None
            raise ValueError(f"{path}: a value is not of its key's kind ({error})") from None
        _check_numbers(path, model)
        return model

    def to_dict(self) -> Dict[str, Any]:
        """Return the model as plain JSON values; :meth:`from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> ModelConfig:
        """Build a model from the values of :meth:`to_dict`.

        Raises:
            ValueError: a key is missing or unknown, or its value is of another type.
        """
        try:
            values = dict(values)
            lora, anyres = values.pop("lora", None), values.pop("anyres", None)
            language = dict(values.pop("language"))
            scaling = language.pop("rope_scaling", None)
            model = cls(
                lora=LoRAConfig(**{**lora, "targets": tuple(lora["targets"])}) if lora else None,
                vision=VisionConfig(**values.pop("vision")),
                projector=ProjectorConfig(**values.pop("projector")),
                language=LanguageConfig(rope_scaling=RopeScaling(**scaling) if scaling else None, **language),
                feature_layers=tuple(values.pop("feature_layers")),
                anyres=AnyRes.from_dict(anyres) if anyres else None,
                **values,
            )
            if not (ENCODERS.knows(model.vision.family) and CONNECTORS.knows(model.projector.kind)):
                raise TypeError(f"{model.vision.family} or {model.projector.kind} is not known")
            for part in (model.vision, model.projector, model.language):
                _check_types(part)
            if any(type(number) is not int for number in (model.image_token_id, *model.feature_layers)):
                raise TypeError("image_token_id or feature_layers is no integer")
            return model
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a description of a model ({error}); is the manifest damaged?") from None

    def check_layout(self, tp: int, pp: int) -> None:
        """Check that the model can be cut into ``tp`` tensor and ``pp`` pipeline parts.

        Raises:
            ValueError: it cannot; the message says what divides and which sizes would work.
        """
        heads = {
            "attention heads of the language model": self.language.num_attention_heads,
            "key-value heads of the language model": self.language.num_key_value_heads,
            "attention heads of the vision tower": self.vision.num_attention_heads,
            "MLP columns of the language model": self.language.ffn_hidden_size,
            "MLP columns of the vision tower": self.vision.ffn_hidden_size,
            "hidden columns of the language model": self.language.hidden_size,
        }
        works = [n for n in range(1, 257) if all(count % n == 0 for count in heads.values())]
        for what, count in heads.items():
            if count % tp:
                raise ValueError(f"--tp {tp} does not divide the {count} {what}; try {_alternatives(works)}")
        layers = self.language.num_layers
        if pp > layers:
            raise ValueError(f"--pp {pp}: the language model has only {layers} layers; use {layers} or fewer")


def _check_numbers(path: str, model: ModelConfig) -> None:
    parts: List[Any] = [model.vision, model.language]
    if model.language.rope_scaling is not None:
        parts.append(model.language.rope_scaling)
    for part in parts:
        for name, value, kind in _given_values(part):
            if kind == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"{path}: {name} is {value!r}; it has to be a positive integer")
            if kind == "float" and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{path}: {name} is {value!r}; it has to be a positive number")
    if type(model.image_token_id) is not int:
        raise ValueError(f"{path}: image_token_index is {model.image_token_id!r}; it has to be an integer")
    for what, count in (
        ("num_layers", model.vision.num_layers),
        ("num_layers", model.language.num_layers),
        ("layers times num_experts", model.language.num_layers * (model.language.num_experts or 1)),
    ):
        if count > MAX_LAYERS:
            raise ValueError(f"{path}: {what} is {count}; supported are up to {MAX_LAYERS}")


def padded_vocab_size(vocab_size: int, tp: int, divisible_by: int = 128) -> int:
    """Return the rows of the embedding when each of ``tp`` equal parts is a multiple of ``divisible_by``.

    Source: Megatron-LM ``_vocab_size_with_padding``.
    """
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def _check_types(part: Any) -> None:
    """Check the values of a part that a file describes; all its integers are sizes or counts.

    Raises:
        TypeError: one is of another type, or a size is not above 0.
    """
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for name, value, kind in _given_values(part):
        most = MAX_LAYERS if name == "num_layers" else 1 << 40
        other = kind in types and type(value) not in types[kind]
        if other or (kind == "int" and not 0 < value <= most):
            raise TypeError(f"{name} is {value!r}")


def _given_values(part: Any) -> Iterator[Tuple[str, Any, str]]:
    """Name, value and type of each field of a part, but for those that may be left out and are."""
    for field in dataclasses.fields(part):
        value, kind = getattr(part, field.name), str(field.type)
        if kind.startswith("Optional["):
            if value is None:
                continue
            kind = kind[len("Optional[") : -1]
        yield field.name, value, kind


def _alternatives(numbers: List[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}"
