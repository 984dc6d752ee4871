"""Writing megatron-core's sharded checkpoints."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException


def save(sharded_state_dict: dict[str, Any], folder: str) -> None:
    """``dist_checkpointing.save``, without the process that it would leave behind; a collective call.

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
    except CheckpointException as error:
        causes = [part for failure in error.failures.values() for part in _chain(failure[0])]
        for cause in causes:
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, folder) from None
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
