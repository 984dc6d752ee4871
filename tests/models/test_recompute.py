"""Recomputed activations: less is kept, and every gradient is as without."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.models.modalities.table import place_media
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.vlm import build_model
from tests.distributed import DEVICE, Pool
from tests.media import image_media
from tests.tiny import tiny_config

Result = tuple[dict[str, torch.Tensor], int]


def forward_and_backward(model: ModelConfig, recompute: str, only_layers: bool) -> Result:
    """Gradients of one pass, and the bytes that the forward pass kept for the backward pass.

    Args:
        only_layers: train the language model's layers alone, so that nothing before them needs a gradient.
    """
    layout = parallel.initialize()
    (chunk,) = build_model(model, layout, ModelOptions(recompute=recompute))
    torch.manual_seed(1)
    for name, parameter in chunk.named_parameters():
        parameter.data.normal_(0.0, 0.15)
        parameter.requires_grad = name.startswith("language_model.decoder.") or not only_layers
    length, device = 64, layout.device
    ids = torch.randint(3, 190, (2, length))
    ids[0, 2 : 2 + model.image_tokens] = model.image_token_id
    pixels = torch.randn(1, 3, model.vision.image_size, model.vision.image_size)
    labels = torch.randint(3, 190, ids.shape)
    media = place_media(ids, image_media(pixels, name="pixel_values"), chunk.modalities)

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = chunk(
            ids.to(device),
            {kind: placed.to(device) for kind, placed in media.items()},
            labels=labels.to(device),
            trained=torch.arange(ids.numel(), device=device),
        )
    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    loss.backward()
    gradients = {name: p.grad for name, p in chunk.named_parameters() if p.requires_grad}
    return gradients, sum(size for at, size in storages.items() if at not in weights)


@pytest.mark.parametrize("only_layers", [False, True], ids=["all trained", "only layers trained"])
def test_gradients_are_those_without(pool: Pool, only_layers: bool) -> None:
    model = ModelConfig.from_hf(tiny_config().to_dict())

    def result(recompute: str) -> Result:
        return pool.run(1, forward_and_backward, model, recompute, only_layers)[0]

    expected, everything = result("none")
    selective, some = result("selective")
    full, inputs = result("full")
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    for gradients in (selective, full):
        # The same operations on the same numbers. On a GPU the parts of some sums come in any order.
        for name, gradient in expected.items():
            allowed = 0.0 if DEVICE == "cpu" else 1e-6 * float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=allowed)
    if DEVICE == "cpu":  # fused kernels keep less to begin with
        assert inputs < 0.5 * some and some < 0.7 * everything, (inputs, some, everything)
