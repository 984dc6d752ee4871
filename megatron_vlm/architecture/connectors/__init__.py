"""Connectors, which stand between an encoder and the language model, a file for each kind.

A file has these names:

    KIND                                       ``ProjectorConfig.kind``, config.json's ``mm_projector_type``
    in_fp8(kind)                               whether Transformer Engine multiplies its linears in FP8
    problem(projector, hidden_size)            what is wrong with such a projector, or empty
    connector_layers(projector, hidden_size)   yields its layers, in the order of its pass
"""

from megatron_vlm.system.registry import Registry

CONNECTORS = Registry(__name__)
