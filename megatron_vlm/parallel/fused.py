"""Fused kernels of Transformer Engine and NVIDIA apex: which are used where.

Both are in NVIDIA's PyTorch images, and run on GPUs only. Nothing needs them: torch does the same in more
kernels. What goes by the name of apex on PyPI is another project, and has none of the modules asked for here.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch


def adam_source(device: str) -> str:
    """Return the package whose Adam updates the weights: "transformer_engine", "apex" or "torch".

    They are tried in megatron-core's order.

    Args:
        device: "cuda" or "cpu".
    """
    for package in ("transformer_engine.pytorch", "apex"):
        if device == "cuda" and _find(f"{package}.optimizers", "FusedAdam"):
            return package.partition(".")[0]
    return "torch"


def norms(device: str) -> dict[str, type[torch.nn.Module]]:
    """Return the norm classes of local layer specs: apex's, else torch's. All take the size and ``eps``."""
    found = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    fused = {name: _find("apex.normalization", f"Fused{name}") for name in found}
    return {name: (device == "cuda" and fused[name]) or found[name] for name in found}


def weight_gradient_kernels(device: str) -> Any:
    """Return apex's module that adds a weight's gradient to its fp32 sum as it is computed; None without
    apex.

    ``wgrad_gemm_accum_fp32(a, b, total)`` is ``total += b.T @ a``, with ``a`` ``[n, in]`` and ``b``
    ``[n, out]`` contiguous and ``total`` fp32 ``[out, in]``. Source: apex, csrc/megatron/
    fused_weight_gradient_dense.cpp.
    """
    return _import("fused_weight_gradient_mlp_cuda") if device == "cuda" else None


def accumulate_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's linears add weight gradients to their fp32 sums as they compute them.

    megatron-core has one switch for these and for its own linears, and the latter need apex for it.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _find(module: str, name: str) -> Any:
    return getattr(_import(module), name, None)


@functools.cache
def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:  # not there, or a library that it needs is not
        return None
