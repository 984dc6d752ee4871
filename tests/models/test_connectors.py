"""LLaVA's other projectors: logits and gradients equal transformers' LLaVA with LLaVA's own module in it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed import Pool
from tests.hf.test_mm_projector import INNER, OUTER, build_vision_projector
from tests.models.test_parity import LAYOUTS, Reference, check
from tests.tiny import build, tiny_config
from tests.workers import Layout


def save(folder: Path, family: str, kind: str) -> Any:
    """A tiny LLaVA with a projector of LLaVA's, as ``save_tiny_llava``."""
    torch.manual_seed(3)
    if kind == "identity":
        net = build(tiny_config(text_extra=dict(hidden_size=INNER), projector_hidden_act="linear")).eval()
        for linear in (net.model.multi_modal_projector.linear_1, net.model.multi_modal_projector.linear_2):
            torch.nn.init.eye_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
            linear.requires_grad_(False)
    else:
        net = build(tiny_config()).eval()
        net.model.multi_modal_projector = build_vision_projector(kind, INNER, OUTER)
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**json.loads(net.config.to_json_string(use_diff=False)), "mm_projector_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    return net


@pytest.fixture(scope="module", params=["mlp3x_gelu", "mlp4x_gelu", "identity"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    kind = request.param
    return Reference(kind, tmp_path_factory.mktemp(kind), save=functools.partial(save, kind=kind))


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equals_llava(reference: Reference, pool: Pool, sizes: Layout) -> None:
    check(reference, pool, sizes)
