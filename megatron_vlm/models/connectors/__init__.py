"""The modules of connectors, a file for each kind that is described in ``architecture/connectors``.

A file has ``KIND`` and ``build(projector, config, impl)``, which returns a module from
``[tiles, tokens, ProjectorConfig.input_size]`` to ``[tiles, tokens, hidden_size]`` and a bias to be added, or
None.
"""

from megatron_vlm.system.registry import Registry

BUILD_CONNECTOR = Registry(__name__, "build")
