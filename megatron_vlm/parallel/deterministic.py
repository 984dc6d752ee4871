"""Determinism: the same bits from every run of the same layout."""

from __future__ import annotations

import os

import torch

from megatron_vlm.config.run import DETERMINISTIC_ENVIRONMENT


def use_deterministic_algorithms(device: str) -> None:
    """Let torch use reproducible kernels only, and fail where it has none.

    To be called before anything is computed. What libraries read from the environment when they start
    (cuBLAS, NCCL, Transformer Engine) has to be there already; ``scripts/train/run.py`` sees to it.

    Args:
        device: "cuda" or "cpu".

    Raises:
        ValueError: on a GPU, a variable is missing.
    """
    missing = [f"{k}={v}" for k, v in DETERMINISTIC_ENVIRONMENT.items() if os.environ.get(k) != v]
    if device == "cuda" and missing:
        raise ValueError(
            f"--deterministic needs {' '.join(missing)} in the environment; start with scripts/train/run.py, "
            "which sets it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
