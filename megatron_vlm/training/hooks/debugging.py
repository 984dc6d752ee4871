"""The additions of ``--debug``: a look at every batch and at the gradients of every module."""

from __future__ import annotations

import contextlib
import pdb
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from megatron_vlm.data.batch import IGNORE_INDEX, Microbatch
from megatron_vlm.data.preview.text import describe
from megatron_vlm.data.processing import Processing
from megatron_vlm.parallel.optimizer import Optimizer
from megatron_vlm.training.batch import Batch, GlobalBatch
from megatron_vlm.training.checkpoint import RunState
from megatron_vlm.training.freezing import MODULES, Regime
from megatron_vlm.training.hooks import Hook


class Debugger(Hook):
    """A hook that prints what goes into a step and what comes out, and lets autograd name the operation
    behind a NaN.

    Args:
        say: prints, on one rank.
    """

    def __init__(
        self,
        regime: Regime,
        optimizer: Optimizer,
        processing: Processing,
        state: RunState,
        say: Callable[[str], None],
    ) -> None:
        torch.autograd.set_detect_anomaly(True)
        for _, parameter in regime.own:
            # Kernels that add to main_grad themselves hand autograd memory as it was, which may hold a NaN;
            # by this mark Transformer Engine and megatron-core fill it with zeros.
            parameter.zero_out_wgrad = True  # type: ignore[attr-defined]
        self.optimizer = optimizer
        self.processing = processing
        self.state = state
        self.say = say
        self.modules = {
            module: [p for name, p in regime.own if name.startswith(prefix) and name in regime.trained]
            for module, prefix in MODULES.items()
        }

    def before_step(self, batch: GlobalBatch) -> None:
        """Print the first sample as the model sees it, and the shapes of this rank's microbatches."""
        self.say(f"debug: iteration {self.state.iteration + 1}")
        for number, microbatch in enumerate(batch.microbatches):
            if number == 0 and batch.keys:
                first = Microbatch(
                    input_ids=microbatch.input_ids.cpu(),
                    labels=microbatch.labels.where(microbatch.loss_mask, IGNORE_INDEX).cpu(),
                    lengths=_length_of_first(microbatch),
                    keys=batch.keys[0],
                    packed=microbatch.packed_seq_params is not None,
                )
                shown = describe(first, self.processing.tokenizer, self.processing.image_token_id)
                self.say(f"debug:   first sample: {shown}")
            inputs = [
                f"{name} {list(tensor.shape)}"
                for media in microbatch.media.values()
                for name, tensor in media.inputs.items()
            ]
            self.say(
                f"debug:   microbatch {number}: input_ids {list(microbatch.input_ids.shape)}, "
                f"{int(microbatch.loss_mask.sum())} trained tokens, {', '.join(inputs) or 'no media'}"
            )

    def before_update(self) -> None:
        """Print the norm of each module's gradient before clipping; a collective call."""
        squares = self.optimizer.squared_gradients(list(self.modules.values()))
        dist.all_reduce(squares)
        norms = zip(self.modules, squares.sqrt().tolist(), strict=True)
        self.say("debug:   gradient norms: " + ", ".join(f"{module} {norm:.6g}" for module, norm in norms))


def _length_of_first(batch: Batch) -> torch.Tensor:
    """Return int64 ``[1]``; without packing up to the last trained token, since the rest may be padding."""
    if batch.packed_seq_params is not None:
        return batch.packed_seq_params.cu_seqlens_q.diff()[:1].cpu()
    trained = batch.loss_mask[0].nonzero()  # each is the place before its token
    return trained[-1].cpu() + 2 if len(trained) else torch.tensor([batch.input_ids.shape[1]])


@contextlib.contextmanager
def post_mortem(wanted: bool) -> Iterator[None]:
    """Open Python's debugger where an error arose, if this is the only rank and has a terminal."""
    try:
        yield
    except Exception as error:
        if wanted and dist.get_world_size() == 1 and sys.stdin.isatty():
            traceback.print_exc()
            pdb.post_mortem(error.__traceback__)
        raise
