"""The output layer and its cross entropy in one, so that logits of a whole microbatch never exist.

Where every token is trained, upstream's path keeps the logits, their fp32 copy, the softmax and its
gradient: several times ``tokens x vocabulary``. Here they exist for :data:`CHUNK` tokens at a time,
and not at all for tokens that nothing is trained on: image tokens, prompts and padding.

Sources: Liger Kernel's fused linear cross entropy, which computes gradients as it goes forward
(https://arxiv.org/abs/2410.10989), and megatron-core's ``vocab_parallel_cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_vlm.parallel.fused import weight_gradient_kernels

# Tokens whose logits exist at once. Each chunk reads and writes the whole weight gradient once, so it has
# to hold enough of them to keep the multiplications busy; a GPU needs more than a CPU core.
CHUNK = {"cpu": 256, "cuda": 1024}


def find_trained(loss_mask: Tensor) -> Tensor:
    """Return the rows of ``[s * b, h]`` that the loss is taken of, in that order.

    Args:
        loss_mask: bool ``[b, s]``, True where a token is trained; best on the CPU, since the result's size
            depends on the data, and a GPU would have to be waited for.

    Returns:
        int64 ``[trained tokens]``.
    """
    return loss_mask.t().flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class LossParts:
    """A microbatch's loss by the datasets of a mixture; filled on the last stage.

    Attributes:
        sources: int64 ``[b, s]``, the dataset of each token.
        sums: float64 ``[datasets]``, to which the losses of their trained tokens are added.
    """

    sources: Tensor
    sums: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    trained: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    sequence_parallel: bool = False,
    chunk: int | None = None,
    parts: LossParts | None = None,
) -> Tensor:
    """Return the summed cross entropy of the trained tokens; a collective call over the tensor parallel
    ranks.

    Equals ``torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")`` over the
    trained tokens and the first ``vocab_size`` columns, gradients included. Softmax and sums are fp32
    whatever the weights are; a microbatch without trained tokens has loss 0 and gradients 0.

    Args:
        hidden: ``[s, b, h]``; ``[s / tp, b, h]`` with sequence parallelism.
        weight: this rank's rows of the output layer, ``[padded vocabulary / tp, h]``.
        labels: int64 ``[b, s]``, below ``vocab_size`` where trained.
        trained: int64 ``[trained tokens]``, of :func:`find_trained`.
        vocab_size: columns of the softmax; padding beyond takes no part in it.
        group: the tensor parallel ranks.
        sequence_parallel: ``hidden`` is this rank's part of the sequence.
        chunk: tokens whose logits exist at once; None for what suits the device.
        parts: takes the loss of each source's tokens too.

    Returns:
        fp32 scalar, the same on every rank of the group.
    """
    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
    rows = hidden.flatten(0, 1).index_select(0, trained)
    if not sequence_parallel:  # there, the gather's backward sums the ranks' gradients already
        rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=group)
    targets = labels.t().flatten()[trained]
    chunk = chunk or CHUNK[rows.device.type]
    losses = None if parts is None else torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    loss: Tensor = _LinearCrossEntropy.apply(
        rows, weight, targets, vocab_size, group, chunk, torch.is_grad_enabled(), losses
    )
    if parts is not None and losses is not None:
        parts.sums.index_add_(0, parts.sources.t().flatten()[trained], losses.to(parts.sums.dtype))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and, at once, both gradients. The backward pass only scales them.

    Computing logits again in the backward pass instead would save no memory: it comes right after
    the forward pass of the same microbatch, and takes a fourth multiplication of this size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        chunk: int,
        with_gradients: bool,
        losses: Tensor | None,
    ) -> Tensor:
        columns = len(weight)
        first = dist.get_rank(group) * columns
        real_columns = max(0, vocab_size - first)  # padding stands at the end
        for_rows, for_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        rows_gradient = torch.empty_like(rows) if for_rows else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None

        loss = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            some, target = rows[part], targets[part]
            logits = (some @ weight.t()).float()
            logits[:, real_columns:] = float("-inf")
            own = (target >= first) & (target < first + columns)
            index = torch.arange(len(some), device=rows.device), (target - first).clamp(0, columns - 1)
            target_logits = logits[index].where(own, 0.0)
            # Of a rank whose columns are all padding it is -inf, and -inf - -inf is not a number.
            maximum = logits.amax(dim=1).clamp(min=torch.finfo(torch.float32).min)
            exponentials = logits.sub_(maximum.unsqueeze(1)).exp_()
            log_sum = exponentials.sum(dim=1).log() + maximum
            log_sum, target_logits = _over_ranks(log_sum, target_logits, group)
            of_tokens = log_sum - target_logits
            loss += of_tokens.sum()
            if losses is not None:
                losses[part] = of_tokens

            if rows_gradient is None and weight_gradient is None:
                continue
            # d loss / d logits = softmax - one hot, in the same memory
            gradient = exponentials.mul_((maximum - log_sum).exp().unsqueeze(1))
            gradient[index] -= own.float()
            gradient = gradient.to(rows.dtype)
            if rows_gradient is not None:
                torch.mm(gradient, weight, out=rows_gradient[part])
            if weight_gradient is not None:
                _add_product(weight_gradient, gradient, some)
        ctx.save_for_backward(rows_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        rows_gradient, weight_gradient = ctx.saved_tensors
        if rows_gradient is not None:
            rows_gradient = rows_gradient * scale
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(scale).to(ctx.weight_dtype)
        return rows_gradient, weight_gradient, None, None, None, None, None, None


def _over_ranks(log_sum: Tensor, target_logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the log of the sum of exponentials, and the target's logit, over all ranks' columns.

    One exchange for both, without agreeing on a maximum before: the ranks' sums are added in the log
    domain, where nothing overflows.
    """
    if dist.get_world_size(group) == 1:
        return log_sum, target_logits
    mine = torch.stack([log_sum, target_logits])
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyones, mine, group=group)
    log_sums, logits_of_targets = torch.stack(everyones, dim=1)
    return log_sums.logsumexp(dim=0), logits_of_targets.sum(dim=0)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a.T @ b`` to ``total`` where ``total`` is fp32 and the factors may not be."""
    kernels = weight_gradient_kernels(total.device.type)
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif kernels is not None:
        kernels.wgrad_gemm_accum_fp32(b, a, total)  # the product isn't rounded before it is added
    else:
        total += a.t() @ b
