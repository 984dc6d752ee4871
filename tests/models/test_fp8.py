"""FP8 in the model: which part gets which precision, and the projector's rows.

Without Transformer Engine megatron-core enters no FP8 region, and all else is as it would be: the configs,
the padding, what is cut off.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from megatron_vlm import parallel
from megatron_vlm.architecture.fp8 import Fp8Config
from megatron_vlm.architecture.model import ModelConfig
from megatron_vlm.artifacts.checkpoint import read_manifest
from megatron_vlm.hf.convert import import_hf
from megatron_vlm.models import projector as projector_module
from megatron_vlm.models.options import ModelOptions
from megatron_vlm.models.projector import Projector
from megatron_vlm.models.transformer_configs import transformer_configs
from megatron_vlm.models.vlm import build_model
from megatron_vlm.models.weights import load_weights, named_parameters, saved_name, sharded_weights
from megatron_vlm.parallel import optimizer as optimizer_module
from megatron_vlm.parallel import sharded_files
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from megatron_vlm.training.checkpoint import RunState, load_optimizer
from tests.distributed import Pool
from tests.tiny import save_tiny_llava, tiny_config

MODEL = ModelConfig.from_hf(tiny_config().to_dict())


def built(fp8: Fp8Config | None) -> tuple[dict[str, Any], bool, str | None]:
    """Return what the configs of the parts, of data parallelism and of the optimizer say of precision."""
    layout = parallel.initialize()
    configs = transformer_configs(MODEL, layout, ModelOptions(torch.bfloat16, fp8=fp8))
    gather = fp8 is not None and fp8.param_gather
    models = wrap_model(
        build_model(MODEL, layout, ModelOptions(torch.bfloat16, impl="local", fp8=fp8)),
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
    """Return how many weights are turned over for the backward pass when they are gathered for a
    checkpoint."""
    layout = parallel.initialize()
    chunks = build_model(MODEL, layout, ModelOptions(torch.bfloat16))
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


def masters(checkpoint: str, folder: Path) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Return for each FP8 weight of a new run, and of one that goes on, what its master weight has to be,
    the master weight, and the weight. Rounded ones stand for the engine's, which keep what they were made
    of, too."""
    layout = parallel.initialize()
    model = ModelConfig.from_dict(read_manifest(checkpoint)["model"])

    def start() -> tuple[Any, Optimizer, list[torch.Tensor]]:
        (chunk,) = build_model(model, layout, ModelOptions(torch.bfloat16))
        entries, in_fp8 = sharded_weights([chunk]), Fp8Config().weights(model.language.num_layers)
        for name, parameter in named_parameters([chunk]):
            if saved_name(entries[name]) in in_fp8:
                kept = torch.zeros(parameter.shape, dtype=torch.bfloat16)
                parameter.get_high_precision_init_val = partial(_given, kept)
                parameter.clear_high_precision_init_val = lambda: None
        load_weights(Path(checkpoint), [chunk])
        exact = [parameter.float() for parameter in chunk.parameters() if is_fp8(parameter)]
        for parameter in filter(is_fp8, chunk.parameters()):
            parameter.data = parameter.data.to(torch.float8_e4m3fn).bfloat16()
        models = wrap_model([chunk], True, False, fp8_param_gather=True)
        with mock.patch.object(distrib_optimizer, "is_float8tensor", is_fp8):
            return chunk, Optimizer(models, 0.1, 0.9, 0.999, 1e-8, 1.0), exact

    def results(chunk: Any, expected: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        weights = filter(is_fp8, chunk.parameters())
        return [
            (e, p.main_param.view(p.shape).clone(), p.detach().clone())
            for e, p in zip(expected, weights, strict=True)
        ]

    chunk, optimizer, exact = start()
    new = results(chunk, exact)
    for parameter in filter(is_fp8, chunk.parameters()):
        parameter.main_param.add_(torch.randn_like(parameter.main_param) / 300)
    saved = [master for _, master, _ in results(chunk, exact)]
    sharded_files.save({"optimizer": optimizer.sharded_state(sharded_weights([chunk]))}, str(folder))
    chunk, optimizer, _ = start()
    load_optimizer(folder, [chunk], optimizer, RunState())
    return {"new": new, "goes on": results(chunk, saved)}


def is_fp8(parameter: Any) -> bool:
    return hasattr(parameter, "get_high_precision_init_val")


def _given(kept: torch.Tensor) -> torch.Tensor:
    return kept


def test_master_weights_are_not_of_rounded_ones(pool: Pool, tmp_path: Path) -> None:
    """A new run has those of its checkpoint, and one that goes on, from a run without FP8 weights as well,
    those that were saved; only its weights are rounded, again from these."""
    save_tiny_llava(tmp_path / "hf", "clip-llama")
    import_hf(tmp_path / "hf", tmp_path / "megatron", tp=1, pp=1)
    (tmp_path / "saved").mkdir()
    (results,) = pool.run(1, masters, str(tmp_path / "megatron/release"), tmp_path / "saved")
    for expected, master, weight in results["new"]:
        assert torch.equal(master, expected) and not torch.equal(master, weight.float())
    for expected, master, weight in results["goes on"]:
        assert torch.equal(master, expected) and torch.equal(weight, expected.bfloat16())
    assert len(results["new"]) == len(results["goes on"]) > 0


def refused() -> str:
    layout = parallel.initialize()
    with pytest.raises(ValueError) as error:
        build_model(MODEL, layout, ModelOptions(fp8=Fp8Config()))
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
        projector = Projector(
            model, transformer_configs(model, layout, ModelOptions(fp8=fp8)).projector, "local"
        )
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
