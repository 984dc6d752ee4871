"""Adam as megatron-core expects it, for machines where Transformer Engine's and apex's don't run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from megatron_vlm.parallel.fused import adam_source


class Adam(torch.optim.Optimizer):
    """AdamW with the contract of Transformer Engine's and apex's ``FusedAdam``.

    The step count is one integer per parameter group, not a tensor per parameter, and it advances in
    groups without parameters too. megatron-core's distributed optimizer relies on both; with
    ``torch.optim.AdamW`` it can't be saved on a pipeline stage where nothing trains, nor reloaded.
    The arithmetic is ``torch.optim.AdamW``'s (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101).

    Args:
        params: parameters or parameter groups; a group may be empty.
        adam_w_mode: decoupled weight decay; the only mode there is here.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("this Adam decays weights the decoupled way only")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            # adamw counts the step itself, in tensors; it is given the count before this step.
            done = torch.full((len(params),), group["step"] - 1.0, device=params[0].device)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(done.unbind()),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def use_in_megatron_core(device: str) -> None:
    """Let megatron-core build this Adam, unless it has found a fused one and ``device`` is "cuda"."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if adam_source(device) != "torch":
        return
    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True  # the one whose contract this Adam keeps
