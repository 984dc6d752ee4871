"""The entry of a published kind of vision-language model; each stands in a file of its own here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from megatron_vlm.architecture.connectors.anyres import AnyRes, Size


@dataclass(frozen=True)
class Family:
    """A kind of vision-language model and what sets it apart, by the ``model_type`` of its ``config.json``.

    Attributes:
        class_prefix: begins the names of transformers' classes, as ``LlavaNext`` of ``LlavaNextConfig``.
        defaults: what transformers' config class assumes for a key that ``config.json`` leaves out; the first
            two are the parts of a config that says nothing of them.
        fixed: what the model does whatever ``config.json`` says.
        renamed: names of keys in configs of older releases, with today's.
        read_tiles: reads how images are cut from a config whose defaults are filled in and from a tile's side
            in pixels, and raises ValueError with a key's name; None: each image is one tile.
        projector_norm: a LayerNorm stands before the projector, with ``projector_layernorm_eps``.
        built: ``hf.build`` makes such a model of a text model and a tower.
        built_grids: rows and columns of tiles that a model built without sizes pads its images to.
    """

    class_prefix: str
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    read_tiles: Optional[Callable[[Mapping[str, Any], int], AnyRes]] = None
    projector_norm: bool = False
    built: bool = False
    built_grids: Tuple[Size, ...] = ()

    def fill_in(self, config: Mapping[str, Any]) -> Dict[str, Any]:
        """Return a config with what is assumed where a key is left out."""
        given = {key: value for key, value in config.items() if value not in (None, {})}
        renamed = {new: given[old] for old, new in self.renamed.items() if old in given}
        return {**self.defaults, **given, **renamed, **self.fixed}


# What the config classes of LLaVA 1.5 and of those made after it assume.
LLAVA_DEFAULTS: Dict[str, Any] = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 336,
    },
    "text_config": {"model_type": "llama"},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "image_token_index": 32000,
}
