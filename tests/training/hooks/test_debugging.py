"""Python's debugger opens only where somebody can answer it, and anomaly detection finds only true ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_vlm.training.freezing import Regime
from megatron_vlm.training.hooks import debugging


@pytest.mark.parametrize(
    ("wanted", "world", "terminal"), [(True, 1, True), (False, 1, True), (True, 2, True), (True, 1, False)]
)
def test_post_mortem(monkeypatch: pytest.MonkeyPatch, wanted: bool, world: int, terminal: bool) -> None:
    opened = []
    monkeypatch.setattr(debugging.pdb, "post_mortem", opened.append)
    monkeypatch.setattr(debugging.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(debugging.sys.stdin, "isatty", lambda: terminal, raising=False)
    with pytest.raises(ZeroDivisionError), debugging.post_mortem(wanted):
        1 / 0  # noqa: B018
    assert len(opened) == (wanted and world == 1 and terminal)


class _AddsToMainGrad(torch.autograd.Function):
    """A linear like Transformer Engine's with ``fuse_wgrad_accumulation``, memory's content included.

    Source: Transformer Engine 2.11, ``pytorch/module/linear.py``, ``get_dummy_wgrad``.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        x, weight = ctx.saved_tensors
        weight.main_grad += gradients[0].t() @ x
        content = 0.0 if getattr(weight, "zero_out_wgrad", False) else math.nan
        return None, torch.full_like(weight, content)


def test_what_fused_kernels_leave_to_autograd_is_no_nan() -> None:
    """--debug looks for NaN in what backward functions return, of which DDP drops this."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.main_grad = torch.zeros(2, 3)  # type: ignore[attr-defined]
    regime = Regime((), {}, {}, [("projector.weight", weight)])
    try:
        debugging.Debugger(regime, None, None, None, print)  # type: ignore[arg-type]
        _AddsToMainGrad.apply(torch.ones(1, 3), weight).sum().backward()
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert torch.equal(weight.main_grad, torch.ones(2, 3))  # type: ignore[attr-defined]
