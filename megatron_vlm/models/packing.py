"""The boundaries of samples in a sequence that holds several."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams


def boundaries(lengths: Sequence[int], total: int, device: torch.device) -> PackedSeqParams:
    """Return the boundaries that attention and rotary positions need, in megatron-core's ``thd`` format.

    Padding after the last sample is a sample of its own, since every position has to belong to one.

    Args:
        lengths: positions of each sample, in order; at least one of each.
        total: positions of the sequence, padding included.
    """
    padding = total - sum(lengths)
    lengths = [*lengths, padding] if padding else lengths
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
