"""What an optimizer hands to a checkpoint, whole or in parts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm import parallel
from megatron_vlm.parallel.optimizer import Optimizer, wrap_model
from tests.distributed import Pool

SHAPES = ((7, 5), (3,), (130, 3), (64,))  # two ranks' parts meet within the third
State = dict[str, torch.Tensor]


class Weights(MegatronModule):
    def __init__(self, dtype: torch.dtype) -> None:
        sizes = dict(num_layers=1, hidden_size=8, num_attention_heads=1)
        bf16 = dtype == torch.bfloat16
        super().__init__(
            TransformerConfig(**sizes, bf16=bf16, params_dtype=dtype, calculate_per_token_loss=True)
        )
        self.weights = torch.nn.ParameterList(torch.randn(shape, dtype=dtype) for shape in SHAPES)


def states(dtype: torch.dtype, apart: Sequence[int] = ()) -> list[State]:
    """Return what is saved after a step without the distributed optimizer, with it, and with it after a
    reload.

    Args:
        apart: weights that megatron-core gives an optimizer of their own, as it does with experts'.
    """
    layout = parallel.initialize()
    found = []
    for distributed in (False, True):
        torch.manual_seed(0)
        module = Weights(dtype)
        for number in apart:
            module.weights[number].allreduce = False  # type: ignore[attr-defined]
        optimizer = Optimizer(wrap_model([module], distributed, False), 0.1, 0.9, 0.999, 1e-8, 0.0)
        for parameter in module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape))  # type: ignore[attr-defined]
        optimizer.step([1e-3], optimizer.gradient_norm())
        assert len(optimizer.inner) == (2 if apart else 1)
        moments = [state for inner in optimizer.inner for state in inner.optimizer.state.values()]
        for moment in moments:
            moment["exp_avg"][moment["exp_avg"] < 0] = -0.0  # bits that a sum of numbers would lose
        model_state = {
            name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, 0, layout.dp_rank))
            for name, parameter in module.named_parameters()
        }
        saved = optimizer.sharded_state(model_state)
        found.append({entry.key: entry.data.clone() for part in saved.values() for entry in part.values()})
        read = {index: {key: entry.data for key, entry in part.items()} for index, part in saved.items()}
    with torch.no_grad():
        for moment in moments:
            for tensor in moment.values():
                tensor.fill_(7)
        for group in optimizer.groups:
            for main in group["params"]:
                main.fill_(7)
        optimizer.load_sharded_state(read, steps=1)
    saved = optimizer.sharded_state(model_state)
    found.append({entry.key: entry.data for part in saved.values() for entry in part.values()})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_rank_saves_the_parts_of_all(pool: Pool, dtype: torch.dtype) -> None:
    """Bit for bit what each rank has without the distributed optimizer; the others hold no copy of it."""
    first, second = pool.run(2, states, dtype)
    plain, gathered, reloaded = first
    assert len(plain) == len(SHAPES) * (2 if dtype == torch.float32 else 3)
    for state in (gathered, reloaded):
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[key].view(torch.int32), plain[key].view(torch.int32)) for key in plain)
    assert second[1:] == [{}, {}]


def updated(apart: Sequence[int], distributed: bool) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return squared norms of two gradients, the norm of all, and the weights after a clipped step."""
    parallel.initialize()
    torch.manual_seed(0)
    module = Weights(torch.bfloat16)
    for number in apart:
        module.weights[number].allreduce = False  # type: ignore[attr-defined]
    optimizer = Optimizer(wrap_model([module], distributed, False), 0.1, 0.9, 0.999, 1e-8, 0.5)
    for parameter in module.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape))  # type: ignore[attr-defined]
    norm = optimizer.gradient_norm()
    squares = optimizer.squared_gradients([[module.weights[0]], [module.weights[1]]])
    torch.distributed.all_reduce(squares)
    optimizer.step([1e-3], norm)
    return squares, norm, torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("distributed", [False, True])
def test_several_inner_optimizers_are_one(pool: Pool, distributed: bool) -> None:
    """Weights with an optimizer of their own are updated, clipped and saved as if there were one for all."""
    one, two = ([*pool.run(2, updated, apart, distributed)] for apart in ([], [1, 2]))
    for (squares, norm, weights), (own_squares, own_norm, own_weights) in zip(one, two, strict=True):
        assert torch.equal(squares, own_squares) and norm == pytest.approx(own_norm, rel=1e-6)
        assert torch.equal(weights, own_weights)
    for first, second in zip(
        pool.run(2, states, torch.bfloat16), pool.run(2, states, torch.bfloat16, [1, 2]), strict=True
    ):
        for state, own in zip(first, second, strict=True):
            assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in state)
