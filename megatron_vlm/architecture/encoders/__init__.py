"""Encoders, which turn pixels, frames or sound into features, a file for each kind.

A file has these names:

    KIND                           ``VisionConfig.family``
    MODEL_TYPE                     ``model_type`` of its ``config.json``
    DEFAULTS                       what transformers' config class assumes for a key that is left out
    PREFIX_TOKENS                  positions in front of the patches
    embedding_layers(vision)       yields the layers that turn pixels into the first block's input
    block_layers(vision, lora)     yields the layers of one block
"""

from megatron_vlm.system.registry import Registry

ENCODERS = Registry(__name__)
