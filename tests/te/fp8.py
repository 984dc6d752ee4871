"""FP8 by Transformer Engine's own Python, on a CPU: torch casts to FP8, and multiplies what was cast.

    python -m tests.te.fp8

Two data parallel ranks, of which one has no image, by tensorwise and by delayed scaling: they end alike, with
the same scales; what is to be in FP8 is, each product is aligned, the loss is near bfloat16's, and the same
however much is recomputed; delayed scaling's history moves as often as docs/fp8.md says. Needs the engine's
Python on PYTHONPATH.
"""

from __future__ import annotations

import enum
import itertools
import os
import sys
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.te import stub

RELEASE = stub.install()  # before anything imports megatron-core

from transformer_engine.pytorch import cpp_extensions, distributed, quantization, utils  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention import softmax  # noqa: E402
from transformer_engine.pytorch.tensor.float8_tensor import (  # noqa: E402
    Float8CurrentScalingQuantizer,
    Float8Tensor,
)
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage  # noqa: E402

from megatron_vlm import parallel  # noqa: E402
from megatron_vlm.architecture.fp8 import Fp8Config  # noqa: E402
from megatron_vlm.architecture.model import ModelConfig  # noqa: E402
from megatron_vlm.models import scaling, vlm  # noqa: E402
from megatron_vlm.models.options import ModelOptions  # noqa: E402
from megatron_vlm.parallel.optimizer import wrap_model  # noqa: E402
from megatron_vlm.training.step import compute_gradients, prepare_for_schedules  # noqa: E402
from tests.tiny import tiny_config  # noqa: E402
from tests.workers import global_batch  # noqa: E402

FORMATS = {
    "DType.kFloat8E4M3": (torch.float8_e4m3fn, 448.0),
    "DType.kFloat8E5M2": (torch.float8_e5m2, 57344.0),
}
# Aligned, as tests.tiny's own sizes are not.
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"num_hidden_layers": 4, "head_dim": 16}
LENGTH = 64
products = {"fp8": 0}
moves = {"forward": 0, "backward": 0}  # of the histories
multiply = stub._Extension.generic_gemm


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, _: Any = None) -> Any:
    """Quantize as the library does: scaled, cut off at the format's largest number, cast; turned over if
    asked to."""
    kind, largest = FORMATS[quantizer.dtype]
    x = tensor.detach().float()
    amax = x.abs().max()
    if isinstance(quantizer, Float8CurrentScalingQuantizer):
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, quantizer.amax_reduction_group)
        scale = torch.where(amax > 0, largest / amax, torch.ones(())).view(1)
    else:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.clone().view(1)
    data = (x * scale).clamp(-largest, largest).to(kind).view(torch.uint8)
    turned = _turned(data) if quantizer.columnwise_usage else None
    if output is not None:
        output._data, output._transpose, output._transpose_invalid = data, turned, turned is None
        output._scale_inv.copy_(1 / scale)
        return output
    parts = {"data": data, "fp8_scale_inv": 1 / scale, "fp8_dtype": quantizer.dtype}
    parts |= {"data_transpose": turned, "quantizer": quantizer}
    if quantizer.internal:
        return Float8TensorStorage(**parts)
    return Float8Tensor(shape=data.shape, dtype=tensor.dtype, requires_grad=False, **parts)


def _turned(data: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return data.flatten(0, -2).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def dequantize(tensor: Any, *_: Any) -> torch.Tensor:
    """Return what was cast, as float32."""
    kind, _largest = FORMATS[tensor._fp8_dtype]
    if tensor._data is not None:
        return tensor._data.view(kind).float() * tensor._scale_inv
    return (tensor._transpose.view(kind).float() * tensor._scale_inv).movedim(0, -1).contiguous()


def generic_gemm(*args: Any, **options: Any) -> Any:
    """A product of two that were cast, in float32; each side of each has to be aligned."""
    values = list(args)
    if not isinstance(args[0], Float8TensorStorage):
        return multiply(*args, **options)
    products["fp8"] += 1
    for place in (0, 2):
        values[place] = dequantize(args[place])
        shape = values[place].shape
        assert shape[-1] % 16 == 0 and shape[:-1].numel() % 16 == 0, shape
    if args[7] is not None and not args[11]:
        values[7] = args[7].float()
    result, *others = multiply(*values, **options)
    return (result if args[4] is not None else result.bfloat16(), *others)


def rmsnorm_fwd(x: Any, weight: Any, eps: float, _: Any = None, quantizer: Any = None, *__: Any) -> Any:
    normed, mu, rsigma = stub._Extension.rmsnorm_fwd(x, weight, eps)
    return (normed if quantizer is None else quantizer(normed)), mu, rsigma


def update_scales(amax: Any, histories: Any, scales: Any, _: str, dtype: str, __: int) -> None:
    """``fused_amax_and_scale_update_after_reduction``, by the largest of the history."""
    moves["forward" if dtype == "DType.kFloat8E4M3" else "backward"] += 1
    for history, scale, latest in zip(
        histories, scales, amax.split([h.shape[1] for h in histories]), strict=True
    ):
        history[0] = latest
        largest = history.amax(0)
        scale.copy_(torch.where(largest > 0, FORMATS[dtype][1] / largest, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


def install() -> None:
    """Put all that into the places of the library's."""
    functions: dict[str, Any] = {
        "quantize": quantize,
        "dequantize": dequantize,
        "generic_gemm": generic_gemm,
        "rmsnorm_fwd": rmsnorm_fwd,
        "fp8_transpose": _turned,
        "bgrad_quantize": lambda gradient, quantizer: (gradient.flatten(0, -2).sum(0), quantizer(gradient)),
        "fused_amax_and_scale_update_after_reduction": update_scales,
        "fused_rope_forward": lambda t, f, _, kind, __, ends, *___: stub._turn(t, f, kind, ends).to(t.dtype),
        "fused_rope_backward": lambda t, f, _, kind, __, ends, *___: stub._turn(t, -f, kind, ends).to(
            t.dtype
        ),
        "FP8FwdTensors": enum.IntEnum("Fwd", ["GEMM1_INPUT", "GEMM1_WEIGHT", "GEMM1_OUTPUT"], start=0),
        "FP8BwdTensors": enum.IntEnum("Bwd", ["GRAD_OUTPUT1", "GRAD_INPUT1"], start=0),
    }
    for place in (sys.modules["transformer_engine_torch"], cpp_extensions):
        for name, function in functions.items():
            setattr(place, name, function)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    for module in (quantization, utils):
        module.get_device_compute_capability = lambda: (9, 0)
    distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    softmax.FusedScaleMaskSoftmax.is_kernel_available = lambda *_: False


def rank(number: int, port: int) -> None:
    """One of two data parallel ranks; only the first has an image."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    install()
    layout = parallel.initialize(timeout_minutes=1.0)
    model = ModelConfig.from_hf(tiny_config(text_extra=TEXT).to_dict())
    found = {}
    for recipe, recompute in itertools.product(
        (None, "tensorwise", "delayed"), ("none", "full", "selective")
    ):
        fp8 = None if recipe is None else Fp8Config(recipe)
        loss, norm, scales = _loss(model, layout, fp8, recompute)
        ends: list[Any] = [None, None]
        dist.all_gather_object(ends, (loss, norm, scales))
        assert ends[0] == ends[1], ends  # gradients are reduced over both
        assert bool(scales) == (recipe == "delayed")
        found[recipe, recompute] = loss, norm
        # Two micro batches; four linears in four layers and the projector's two; forward and two gradients.
        linears = {None: 0, "delayed": 16}.get(recipe, 18)
        assert products["fp8"] == 2 * 3 * linears or recompute != "none", products
        layers = model.language.num_layers
        forward, backward = {
            "none": (1, 1),
            "full": (1 + layers, 4 * layers),
            "selective": (1 + layers, 1 + 2 * layers),
        }[recompute]
        if recipe == "delayed":
            # The norm of a trained tower, which is next after what is recomputed, takes one for its own.
            by_tower = 2 if recompute != "none" else 0
            assert moves["forward"] == 2 * forward, moves
            assert 0 <= moves["backward"] - 2 * backward <= by_tower, moves
        else:
            assert not any(moves.values()), moves
        if number == 0:
            print(
                f"{recipe or 'bfloat16'}, recompute {recompute}: loss {loss:.5f}, moves {moves}", flush=True
            )
    bf16 = found[None, "none"][0]
    for (recipe, _), one in found.items():
        # e4m3 has 3 bits of a number, and errors of many products even out.
        assert abs(one[0] - bf16) <= 0.01 * bf16, found
        assert one == found[recipe, "none"], found
    parallel.finalize()


def _loss(
    model: ModelConfig, layout: parallel.Layout, fp8: Fp8Config | None, recompute: str
) -> tuple[float, float, list[float]]:
    """The loss, the norm of the gradients, and the scales that the next pass goes by."""
    with mock.patch.object(vlm, "choose_transformer_impl", lambda *_: "transformer_engine"):
        chunks = vlm.build_model(model, layout, ModelOptions(torch.bfloat16, recompute=recompute, fp8=fp8))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.1)
    models = wrap_model(chunks, distributed_optimizer=False, overlap_grad_reduce=True)
    prepare_for_schedules(models)
    batch = [_microbatch(model, seed=layout.dp_rank, images=1 - layout.dp_rank), _microbatch(model, 2, 0)]
    products["fp8"] = moves["forward"] = moves["backward"] = 0
    loss, _ = compute_gradients(models, global_batch(batch, model, 16, layout), layout)
    norm = torch.stack([p.main_grad.norm() for p in chunks[0].parameters()]).norm()
    kept = [scaling._kept(linear) for _, linear in scaling._linears(chunks)]
    scales = [
        number for tensors in kept for tensor in tensors.values() for number in tensor.flatten().tolist()
    ]
    return loss, float(norm), scales


def _microbatch(model: ModelConfig, seed: int, images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(3, 190, (2, 1, LENGTH), generator=generator)
    ids[:, : images * model.image_tokens] = model.image_token_id
    size = model.vision.image_size
    pixels = torch.randn(images, 3, size, size, generator=generator).bfloat16()
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


if __name__ == "__main__":
    print(f"Transformer Engine {RELEASE}, torch {torch.__version__}")
    torch.multiprocessing.spawn(rank, args=(29713,), nprocs=2)
