"""FP8 in the model: which part gets which precision, and the projector's rows.

Without Transformer Engine megatron-core enters no FP8 region, and all else is as it would be: the configs,
the padding, what is cut off.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_vlm import parallel
from megatron_vlm.config.fp8 import Fp8Config
from megatron_vlm.config.model import ModelConfig
from megatron_vlm.models import projector as projector_module
from megatron_vlm.models.projector import Projector
from megatron_vlm.models.transformer_configs import transformer_configs
from megatron_vlm.models.vlm import build_model
from megatron_vlm.parallel import optimizer as optimizer_module
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from tests.distributed import Pool
from tests.tiny import tiny_config

MODEL = ModelConfig.from_hf(tiny_config().to_dict())


def built(fp8: Fp8Config | None) -> tuple[dict[str, Any], bool, str | None]:
    """What the configs of the parts, of data parallelism and of the optimizer say of precision."""
    layout = parallel.initialize()
    configs = transformer_configs(MODEL, layout, torch.bfloat16, fp8=fp8)
    gather = fp8 is not None and fp8.param_gather
    models = wrap_model(
        build_model(MODEL, layout, torch.bfloat16, impl="local", fp8=fp8),
        distributed_optimizer=gather,
        overlap_grad_reduce=False,
        fp8_param_gather=gather,
    )
    optimizer = Optimizer(models, 0.1, 0.9, 0.999, 1e-8, 1.0)
    parts = {part: precision(getattr(configs, part)) for part in ("vision", "projector", "language")}
    return parts, models[0].ddp_config.fp8_param_gather, optimizer.config.fp8_recipe


def precision(config: Any) -> dict[str, Any]:
    names = ("bf16", "fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "fp8_amax_history_len")
    names += ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "fp8_dot_product_attention")
    return {name: getattr(config, name) for name in names}


def test_the_tower_stays_bfloat16(pool: Pool) -> None:
    ((parts, gathers, recipe),) = pool.run(1, built, Fp8Config(param_gather=True, bf16_at_end=1))
    assert all(part["bf16"] for part in parts.values())
    assert parts["vision"]["fp8"] is None
    for name in ("projector", "language"):
        assert (parts[name]["fp8"], parts[name]["fp8_recipe"]) == ("hybrid", "tensorwise")
        assert not parts[name]["fp8_dot_product_attention"]
    language, of_projector = parts["language"], parts["projector"]
    assert language["fp8_param"] and not of_projector["fp8_param"] and gathers
    assert (language["first_last_layers_bf16"], of_projector["first_last_layers_bf16"]) == (True, False)
    assert (language["num_layers_at_start_in_bf16"], language["num_layers_at_end_in_bf16"]) == (0, 1)
    assert recipe == "tensorwise"


def test_with_delayed_scaling_the_projector_does_too(pool: Pool) -> None:
    """Its scales are exchanged when FP8 was used, and a rank without images runs no projector."""
    ((parts, gathers, recipe),) = pool.run(1, built, Fp8Config("delayed"))
    assert [parts[name]["fp8"] for name in ("vision", "projector", "language")] == [None, None, "hybrid"]
    assert parts["language"]["fp8_amax_history_len"] == 1024 and recipe == "delayed" and not gathers


def test_without_fp8_nothing_is(pool: Pool) -> None:
    ((parts, gathers, recipe),) = pool.run(1, built, None)
    assert [part["fp8"] for part in parts.values()] == [None] * 3 and recipe is None and not gathers


def gathered(overlap: bool) -> list[int]:
    """How many weights are turned over for the backward pass when they are gathered for a checkpoint."""
    layout = parallel.initialize()
    chunks = build_model(MODEL, layout, torch.bfloat16)
    models = wrap_model(chunks, True, overlap, overlap)
    optimizer = Optimizer(models, 0.1, 0.9, 0.999, 1e-8, 1.0)
    turned: list[int] = []
    with (
        mock.patch.object(optimizer_module, "is_float8tensor", lambda p: p.dim() > 1),
        mock.patch.object(optimizer_module, "post_all_gather_processing", lambda ps: turned.append(len(ps))),
    ):
        optimizer.gather_weights()
    assert not turned or turned == [sum(p.dim() > 1 for p in chunks[0].parameters())]
    return turned


def test_gathered_weights_are_turned_over(pool: Pool) -> None:
    """megatron-core 0.16.1 leaves the transposes of the weights before where it gathers ahead of a pass."""
    assert pool.run(1, gathered, False) == [[]]  # each step has gathered them
    assert pool.run(1, gathered, True)[0]


def refused() -> str:
    layout = parallel.initialize()
    with pytest.raises(ValueError) as error:
        build_model(MODEL, layout, fp8=Fp8Config())
    return str(error.value)


def test_the_local_layers_are_not_taken_for_it(pool: Pool) -> None:
    assert "Transformer Engine needs GPUs" in pool.run(1, refused)[0]


def projected(model: ModelConfig, recipe: str, tiles: int) -> dict[bool, dict[str, Any]]:
    """By whether it is FP8: the projector's output and gradients, the rows that its linears saw, the FP8
    regions that it entered."""
    layout = parallel.initialize(tp=2)
    torch.manual_seed(0)
    features = torch.randn(tiles, model.tile_tokens, model.projector.input_size)
    weights: dict[str, torch.Tensor] = {}
    results: dict[bool, dict[str, Any]] = {}
    for fp8 in (None, Fp8Config(recipe)):
        projector = Projector(model, transformer_configs(model, layout, fp8=fp8).projector, "local")
        rows: list[int] = []
        for name, module in projector.named_modules():
            if name.startswith("encoder."):
                module.register_forward_hook(lambda _, args, __, rows=rows: rows.append(len(args[0])))
        for name, parameter in projector.named_parameters():
            parameter.data = weights.setdefault(name, torch.randn_like(parameter) / 3)
        given = features.clone().requires_grad_()
        with mock.patch.object(projector_module, "get_fp8_context", return_value=nullcontext()) as entered:
            output = projector(given)
        (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
        gradients = {"features": given.grad, **{name: p.grad for name, p in projector.named_parameters()}}
        results[fp8 is not None] = {
            "output": output.detach(),
            "gradients": gradients,
            "rows": rows,
            "entered": entered.call_args.args[0].fp8,
        }
    return results


@pytest.mark.parametrize(
    ("kind", "recipe", "tiles", "rows"),
    [
        ("llava", "tensorwise", 1, 32),
        ("llava", "mxfp8", 4, 128),
        ("llava", "tensorwise", 16, 400),
        ("vipllava", "tensorwise", 3, 80),  # its norm would make its bias of a row of zeros
    ],
)
def test_the_projectors_rows_are_padded_and_cut_off(
    pool: Pool, kind: str, recipe: str, tiles: int, rows: int
) -> None:
    layers = {"vision_feature_layers": [-2, 1]} if kind == "vipllava" else {}
    model = ModelConfig.from_hf(tiny_config(kind, **layers).to_dict())
    assert model.tile_tokens == 25
    for result in pool.run(2, projected, model, recipe, tiles):
        plain, padded = result[False], result[True]
        assert (plain["rows"], padded["rows"]) == ([tiles, tiles], [rows, rows])
        assert plain["entered"] is None and padded["entered"] == ("e4m3" if recipe == "mxfp8" else "hybrid")
        # fp32, and sums of the same numbers and zeros.
        torch.testing.assert_close(padded["output"], plain["output"], rtol=1e-6, atol=1e-6)
        for name, expected in plain["gradients"].items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(padded["gradients"][name], expected, rtol=0, atol=1e-6 * scale)
