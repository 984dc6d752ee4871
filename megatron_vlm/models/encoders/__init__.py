"""The modules of encoders, a file for each kind that is described in ``architecture/encoders``.

A file has ``KIND`` and ``build(model, config, impl)``, which returns a module from an encoder's input to
``[tiles, ModelConfig.tile_tokens, ProjectorConfig.input_size]``.
"""

from megatron_vlm.system.registry import Registry

BUILD_ENCODER = Registry(__name__, "build")
