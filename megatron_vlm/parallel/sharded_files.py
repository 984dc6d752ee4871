"""The writer of megatron-core's sharded checkpoints."""

from __future__ import annotations

import queue
import tempfile
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException


def save(sharded_state_dict: dict[str, Any], folder: str) -> None:
    """Save as ``dist_checkpointing.save`` does, without the process that it would leave behind; a collective
    call.

    megatron-core passes the results of its writers through a ``multiprocessing`` manager, so that
    they could also be written in the background. That manager is a process which imports everything
    anew, and which goes on for ever when its rank is killed. A save that is waited for needs a queue.

    Args:
        sharded_state_dict: nested dictionaries of sharded tensors; changed by the call.
        folder: empty.

    Raises:
        OSError: a rank could not write, for want of space for one; on every rank.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(sharded_state_dict, folder)
    except CheckpointException:
        # On every rank, but only one has the causes, as text: torch's writer tells of a full disk as
        # "unexpected pos".
        reasons: list[tuple[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, _why_not_writable(folder))
        for reason in filter(None, reasons):
            raise OSError(*reason, folder) from None
        raise


def _why_not_writable(folder: str) -> tuple[int, str] | None:
    """Return the number and text of the error that writing a little to ``folder`` ends in, if it does."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
    except OSError as error:
        return error.errno or 0, error.strerror or str(error)
    return None
