"""LLaVA's ``mlp2x_gelu`` projector, and those of any other number of linears: ``mlpNx_gelu``.

An activation stands between each two. Source: LLaVA ``multimodal_projector/builder.py``.
"""

from __future__ import annotations

from typing import Iterator

from megatron_vlm.architecture.layers import COLUMN, ROW, Layer, Linear
from megatron_vlm.architecture.projector import ProjectorConfig

KIND = "mlpNx_gelu"
MOST = 16  # linears; a name that asks for more is wrong


def depth(kind: str) -> int:
    """Return the number of linears, the N of ``mlpNx_gelu``."""
    return int(kind[len("mlp") : kind.index("x")])


def in_fp8(kind: str) -> bool:
    """Return whether Transformer Engine multiplies it: megatron-core's MLP has two linears."""
    return depth(kind) == 2


def problem(projector: ProjectorConfig, hidden_size: int) -> str:
    """Return what is wrong with such a projector, or empty."""
    linears = depth(projector.kind)
    if not 1 <= linears <= MOST:
        return f"has {linears} linear layers; supported: 1 to {MOST}"
    if linears == 1 and projector.activation != "linear":
        return (
            f"has nothing to activate: it needs projector_hidden_act 'linear', not {projector.activation!r}"
        )
    return ""


def connector_layers(projector: ProjectorConfig, hidden_size: int) -> Iterator[Layer]:
    """Yield the projector's linears, which are cut along output and input features in turns."""
    inputs = projector.input_size
    for number in range(1, depth(projector.kind) + 1):
        cut = COLUMN if number % 2 else ROW
        yield Linear(f"encoder.linear_fc{number}", inputs, hidden_size, cut, projector.bias)
        inputs = hidden_size
