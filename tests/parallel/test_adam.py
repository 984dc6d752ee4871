"""The Adam that megatron-core gets without Transformer Engine: torch's arithmetic, FusedAdam's contract."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.parallel.adam import Adam


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in [(3, 4), (5,)]]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def test_equals_torch_adamw_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    options = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adam, adamw = Adam(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        adam.step()
        adamw.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_fused_adams_contract() -> None:
    """One step count per group, an integer, which advances in an empty group too."""
    (weight, bias) = parameters()
    adam = Adam([{"params": [weight]}, {"params": []}, {"params": [bias], "weight_decay": 0.0}])
    give_gradients([weight], 1)
    adam.step()
    assert [group["step"] for group in adam.param_groups] == [1, 1, 1]
    assert set(adam.state[weight]) == {"exp_avg", "exp_avg_sq"}
    assert bias not in adam.state  # it had no gradient


def test_goes_on_from_its_state() -> None:
    whole, first = parameters(), parameters()
    adam = Adam(whole)
    before = Adam(first)
    for step in range(4):
        give_gradients(whole, step)
        adam.step()
        if step < 2:
            give_gradients(first, step)
            before.step()
    after = Adam(first)
    after.load_state_dict(before.state_dict())
    for step in (2, 3):
        give_gradients(first, step)
        after.step()
    for a, b in zip(whole, first, strict=True):
        assert torch.equal(a, b)


def test_the_other_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="decoupled"):
        Adam(parameters(), adam_w_mode=False)
