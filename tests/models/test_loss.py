"""The fused output layer and loss equals torch's cross entropy over whole logits, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm import parallel
from megatron_vlm.models.loss import LossParts, find_trained, linear_cross_entropy
from tests.distributed import Pool

SEQUENCE, BATCH, HIDDEN = 14, 3, 24
CHUNK = 8  # several chunks, the last one shorter
SOURCES = (torch.arange(BATCH * SEQUENCE) * 7 % 3).view(BATCH, SEQUENCE)  # of a mixture, in some order


@dataclass(frozen=True)
class Case:
    """A case that the loss is tested on."""

    tp: int = 1
    sequence_parallel: bool = False
    vocab_size: int = 37
    padded: int = 48
    trained: float = 0.6  # share of the tokens
    scale: float = 1.0  # of the hidden states: how far the logits go
    grad_output: float = 1.0
    frozen: bool = False
    dtype: torch.dtype = torch.float32


def inputs(case: Case) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(BATCH, SEQUENCE, generator=generator) < case.trained
    labels = torch.randint(0, case.vocab_size, (BATCH, SEQUENCE), generator=generator)
    hidden = case.scale * torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    hidden[~mask.t()] = float("nan")  # what isn't trained has no say
    weight = torch.randn(case.padded, HIDDEN, generator=generator)
    return {
        "hidden": hidden.to(case.dtype),
        "weight": weight.to(case.dtype),
        "labels": labels.masked_fill(~mask, -100),
        "mask": mask,
    }


def expected(case: Case) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss and gradients as torch has them."""
    given = inputs(case)
    hidden = given["hidden"].double().requires_grad_()
    weight = given["weight"].double().requires_grad_()
    rows = hidden.transpose(0, 1)[given["mask"]]
    logits = (rows @ weight.t())[:, : case.vocab_size]
    loss = F.cross_entropy(logits, given["labels"][given["mask"]], reduction="sum")
    (case.grad_output * loss).backward()
    return float(loss.detach()), hidden.grad, weight.grad


def expected_parts(case: Case) -> list[float]:
    """The loss of each source's tokens, one by one as torch has them."""
    given = inputs(case)
    logits = (given["hidden"].double().transpose(0, 1) @ given["weight"].double().t())[..., : case.vocab_size]
    losses = F.cross_entropy(logits.transpose(1, 2), given["labels"], reduction="none")
    return [float(losses[given["mask"] & (source == SOURCES)].sum()) for source in range(3)]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def run(case: Case) -> tuple[float, torch.Tensor, torch.Tensor | None, int, torch.Tensor]:
    """Loss, gradients of this rank's parts, the size of the largest tensor, and each source's loss."""
    layout = parallel.initialize(case.tp)
    given = {name: tensor.to(layout.device) for name, tensor in inputs(case).items()}
    trained = find_trained(given["mask"])
    hidden, weight = given["hidden"], given["weight"].chunk(case.tp)[layout.tp_rank].clone()
    if case.sequence_parallel:
        hidden = hidden.chunk(case.tp)[layout.tp_rank].clone()
    hidden.requires_grad_()
    weight.requires_grad_(not case.frozen)
    with LargestTensor() as largest:
        loss = linear_cross_entropy(
            hidden,
            weight,
            given["labels"],
            trained,
            case.vocab_size,
            layout.tp_group,
            case.sequence_parallel,
            chunk=CHUNK,
        )
        (case.grad_output * loss).backward()
    parts = LossParts(SOURCES.to(layout.device), torch.zeros(3, dtype=torch.float64, device=layout.device))
    with torch.no_grad():
        again = linear_cross_entropy(
            hidden,
            weight,
            given["labels"],
            trained,
            case.vocab_size,
            layout.tp_group,
            case.sequence_parallel,
            parts=parts,
        )
    # Other chunks, no gradients, the same sum up to its order.
    torch.testing.assert_close(again, loss.detach(), rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32 and loss.shape == ()
    return float(loss.detach()), hidden.grad, weight.grad, largest.elements, parts.sums


CASES = {
    "some trained": Case(),
    "all trained": Case(trained=1.0),
    "none trained": Case(trained=0.0),
    "no padding": Case(vocab_size=48),
    "logits of some thousands": Case(scale=300.0),
    "output layer frozen": Case(frozen=True),
    "scaled": Case(grad_output=0.125),
    "tp 2": Case(tp=2),
    "tp 2, all trained": Case(tp=2, trained=1.0),
    "tp 2, none trained": Case(tp=2, trained=0.0),
    "tp 2, a rank of padding alone": Case(tp=2, vocab_size=19),
    "tp 2, logits of some thousands": Case(tp=2, scale=300.0),
    "tp 2, output layer frozen": Case(tp=2, frozen=True),
    "sequence parallel": Case(tp=2, sequence_parallel=True),
    "sequence parallel, none trained": Case(tp=2, sequence_parallel=True, trained=0.0),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, tp 2": Case(dtype=torch.bfloat16, tp=2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_torch(pool: Pool, case: Case) -> None:
    answers = pool.run(case.tp, run, case)
    loss, hidden_gradient, weight_gradient = expected(case)
    # fp32 rounds to 6e-8 and bf16 to 4e-3. A logit of thousands has an absolute error to match, which the
    # softmax turns into a relative one of the gradient.
    allowed = 1e-2 if case.dtype == torch.bfloat16 else 1e-6 * case.scale
    for found_loss, _, _, _, parts in answers:
        assert found_loss == pytest.approx(loss, rel=1e-2 if case.dtype == torch.bfloat16 else 1e-6)
        # A token's loss may be near 0, and its error is that of its logits.
        tolerance = {"rel": 1e-2} if case.dtype == torch.bfloat16 else {"rel": 1e-5, "abs": 1e-4 * case.scale}
        assert parts.tolist() == pytest.approx(expected_parts(case), **tolerance)

    gradients = [answer[1] for answer in answers]
    found = torch.cat(gradients) if case.sequence_parallel else gradients[0]
    check(found, hidden_gradient, allowed)
    if case.frozen:
        assert all(answer[2] is None for answer in answers)
    else:
        check(torch.cat([answer[2] for answer in answers]), weight_gradient, allowed)

    if not case.sequence_parallel:
        for other in gradients:  # summed over the ranks, on every rank
            assert torch.equal(other, gradients[0])


def check(found: torch.Tensor, wanted: torch.Tensor, allowed: float) -> None:
    error = float((found.double() - wanted).abs().max())
    assert error <= allowed * max(float(wanted.abs().max()), 1e-30)


def test_whole_logits_never_exist(pool: Pool) -> None:
    """No tensor is larger than a chunk of logits or the weight itself."""
    case = Case(trained=1.0)
    _, _, _, largest, _ = pool.run(1, run, case)[0]
    assert largest <= max(CHUNK * case.padded, case.padded * HIDDEN) < SEQUENCE * BATCH * case.padded
