"""One rank of a training run: ``torchrun ... -m megatron_vlm.training <flags>``.

Reads the same flags as ``scripts/train/run.py``, which starts it.
"""

from __future__ import annotations

import os
import sys
from functools import partial

from megatron_vlm import rank
from megatron_vlm.config.run import RunConfig
from megatron_vlm.plan.rules import validate
from megatron_vlm.training.signals import StopRequest


def main(argv: list[str]) -> int:
    """Run this rank; returns the exit code, see :mod:`megatron_vlm.system.exit_codes`."""
    rank.begin(takes_signals=True)
    stop = StopRequest().listen()
    try:
        config = RunConfig.from_flags(argv, prog="python -m megatron_vlm.training")
        validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ValueError as error:
        return rank.user_error(error, rank.is_first())
    return rank.run(partial(_train, config, stop), config.parallel.device)


def _train(config: RunConfig, stop: StopRequest) -> int:
    from megatron_vlm import parallel
    from megatron_vlm.parallel import fp8
    from megatron_vlm.parallel.deterministic import use_deterministic_algorithms
    from megatron_vlm.training.hooks.debugging import post_mortem
    from megatron_vlm.training.run import run

    if config.training.deterministic:
        use_deterministic_algorithms(parallel.choose_device(config.parallel.device)[0])
    layout = parallel.initialize(
        config.parallel.tp,
        config.parallel.pp,
        config.training.seed,
        config.parallel.device,
        config.parallel.backend,
        # With --init the first rank makes a whole model while the others wait. Longer than the watchdog
        # waits, too: a rank that hangs has to tell where, before one that waits for it gives up.
        max(
            config.parallel.distributed_timeout_minutes,
            120.0 if config.model.init else 0.0,
            config.logging.watchdog_minutes + 5.0,
        ),
        config.parallel.vpp,
    )
    if config.fp8 is not None:
        fp8.check_ranks(config.fp8.recipe, layout)
    with post_mortem(config.training.debug):
        return run(config, layout, stop)


if __name__ == "__main__":
    rank.leave(main(sys.argv[1:]))
