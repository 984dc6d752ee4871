"""Writing megatron-core's sharded checkpoints."""

from __future__ import annotations

import queue
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async


def save(sharded_state_dict: dict[str, Any], folder: str) -> None:
    """``dist_checkpointing.save``, without the process that it would leave behind; a collective call.

    megatron-core passes the results of its writers through a ``multiprocessing`` manager, so that
    they could also be written in the background. That manager is a process which imports everything
    anew, and which goes on for ever when its rank is killed. A save that is waited for needs a queue.

    Args:
        sharded_state_dict: nested dictionaries of sharded tensors; changed by the call.
        folder: empty.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(sharded_state_dict, folder)
