"""The learning rate of every iteration equals Megatron-LM's scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vlm.training.schedule import Schedule


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_equals_megatron(style: str, warmup: int) -> None:
    schedule = Schedule(lr=3e-3, min_lr=1e-5, warmup_iters=warmup, decay_iters=20, style=style)
    group = {"params": [], "max_lr": 3e-3, "min_lr": 1e-5}
    theirs = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]),
        init_lr=0.0,
        max_lr=3e-3,
        min_lr=1e-5,
        lr_warmup_steps=warmup,
        lr_decay_steps=20,
        lr_decay_style=style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    for iteration in range(1, 30):
        assert schedule.at(iteration) == group["lr"], iteration
        theirs.step(1)


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="--lr-decay-style sine; supported: cosine, linear, constant"):
        Schedule(1.0, 0.0, 0, 10, "sine").at(3)
